// What attention over a static cache is put together from, for one new token of a sequence and for several: blocks that take
// turns along the positions, and read each other's shared memory in the end.
//
// Compiled at run time with these constants: DIM (channels of a head, 64, 128 or 256), SPLIT (blocks in a cluster), HALF (1
// fp16, 0 bf16), the flags MASK and WRITE (the cache's new rows), and ROPE (1 with cosines for all sequences, 2 with each
// sequence's own, 0 without).
#pragma once

#include "cluster.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr float LOG2E = 1.4426950408889634f, NONE = -1.f / 0.f;

// What exponents of scores are relative to: the highest of them. Where there is none all may be NaN, which must not get lost.
__device__ __forceinline__ float origin_of(float highest) { return highest == NONE ? 0.f : highest; }

__device__ __forceinline__ void unpack(const uint4& v, float (&to)[8]) {
  const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) to[2 * i] = widen(word[i] & 0xffff), to[2 * i + 1] = widen(word[i] >> 16);
}
