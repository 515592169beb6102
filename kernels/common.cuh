// What the CUDA kernels share: 16-bit floats, which HALF tells apart (1 fp16, 0 bf16), and launches that overlap.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float widen(u32 bits) {
  if (HALF) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
    return f;
  }
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ u16 narrow(float f) {
  u16 bits;
  if (HALF)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

// WORDS times four bytes that nobody reads again, a thread's part of a weight row: past L1, and first to leave L2.
template <int WORDS>
__device__ __forceinline__ void load_once(u32* word, const u8* address, u64 policy) {
  if constexpr (WORDS == 4)
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(address), "l"(policy));
  else if constexpr (WORDS == 2)
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(word[0]), "=r"(word[1]) : "l"(address), "l"(policy));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(word[0]) : "l"(address), "l"(policy));
}

// Wait for the kernel before this one, then let the one behind it start: its blocks wait here in turn. Where the
// hardware has no such launches, one kernel starts when the other has ended.
__device__ __forceinline__ void wait_for_producer() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
