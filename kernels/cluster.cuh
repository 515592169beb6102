// The SPLIT blocks of a cluster that share a tile: their barrier, and what each holds in shared memory.
#pragma once

#include "common.cuh"

__device__ __forceinline__ void cluster_barrier() {
  if constexpr (SPLIT > 1)
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  else
    __syncthreads();
}

// The first half of a barrier, and the second, where something else is done between them: that the others have begun, before
// anything is written to their shared memory.
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (SPLIT > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;");
}
__device__ __forceinline__ void cluster_wait() {
  if constexpr (SPLIT > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Writes two floats where ``address`` of this block's shared memory, a multiple of 8 bytes, is that of block ``rank``.
__device__ __forceinline__ void to_block(float* address, u32 rank, float a, float b) {
  if constexpr (SPLIT == 1) {
    *reinterpret_cast<float2*>(address) = make_float2(a, b);
  } else {
    u32 there, here = (u32)__cvta_generic_to_shared(address);
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(a), "f"(b) : "memory");
  }
}

// The float at ``address`` of this block's shared memory, as block ``rank`` of the cluster holds it.
__device__ __forceinline__ float of_block(const float* address, u32 rank) {
  if constexpr (SPLIT == 1) {
    return *address;
  } else {
    float f;
    u32 there, here = (u32)__cvta_generic_to_shared(address);
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(there) : "memory");
    return f;
  }
}

#if __CUDA_ARCH__ >= 900
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER  // SPLIT is 1
#endif
