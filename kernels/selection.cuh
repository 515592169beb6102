// Which channels of one row a block reads, and what surrounds a product: norm and gate.
//
// Every block of a site finds the Top-K itself, or what reaches the threshold, and compacts it to a list in shared memory.
// Constants: CHANNELS, THREADS, HALF, GATE and the flags NORM and THRESHOLD, as sparse_linear.cu describes them.
#pragma once

#include "common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int EACH = (CHANNELS + 4 * THREADS - 1) / (4 * THREADS) * 4;  // consecutive channels a thread ranks

// A bin is one bit pattern of bf16 in [2^-40, 2^24), with the rest in the outer bins; or four patterns of fp16.
constexpr u32 MAGNITUDE = 0x7fff;
constexpr int BINS = 8192, SHIFT = HALF ? 2 : 0, FIRST = HALF ? 0 : (127 - 40) << 7;

// The largest power of two up to ``threads`` and a warp: so many neighbours add up one output.
constexpr int fold(int threads) { return threads >= 32 ? 32 : threads < 2 ? 1 : 2 * fold(threads / 2); }

struct Scalars {
  u32 warp[WARPS];
  float squares[WARPS];
  u32 low, high;  // patterns between which the threshold lies
  u32 above;      // channels with a pattern above ``high``
};

__device__ __forceinline__ float gated(float gate, float up) {
  switch (GATE) {
    case 1: return gate / (1.f + expf(-gate)) * up;
    case 2: return .5f * gate * (1.f + erff(gate * .7071067811865476f)) * up;
    case 3: return .5f * gate * (1.f + tanhf(.7978845608028654f * (gate + .044715f * gate * gate * gate))) * up;
    default: return (gate > 0.f || gate != gate ? gate : 0.f) * up;
  }
}

__device__ __forceinline__ float norm_scale(float squares, float eps) {
  return NORM ? rsqrtf(squares / CHANNELS + eps) : 1.f;
}

// Sum of v over the warps before this one (of all with ``whole``), where each lane 31 holds its warp's inclusive sum.
__device__ __forceinline__ u32 over_warps(u32 v, u32* scratch, bool whole = false) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 31) scratch[warp] = v;
  __syncthreads();
  return __reduce_add_sync(~0u, lane < (whole ? WARPS : warp) ? scratch[lane] : 0u);
}

__device__ __forceinline__ u32 warp_scan(u32 v) {  // inclusive
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const u32 other = __shfl_up_sync(~0u, v, o);
    if ((threadIdx.x & 31) >= o) v += other;
  }
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Sum of the threads' v, for each of them.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_sum(lane < WARPS ? scratch[lane] : 0.f);
}

// Lists channels, ascending, those for which ``rank`` of the magnitude is 1, and of those where it is 1 << 16 as many as
// are ``missing``, the lowest ones; 0 drops. ``x``: this thread's channels, two to a word, zero beyond the last. Returns
// how many have rank 1.
template <class Rank>
__device__ __forceinline__ int compact(const u32 (&x)[EACH / 2], u32 missing, u32* list, u32* scratch, Rank rank) {
  const int mine = threadIdx.x * EACH;
  u32 counts = 0;  // rank 1 in the lower half, 1 << 16 in the upper
#pragma unroll
  for (int e = 0; e < EACH; e++)
    if (mine + e < CHANNELS) counts += rank((x[e >> 1] >> (e & 1) * 16) & MAGNITUDE);
  if (!THRESHOLD) __syncthreads();  // else the scratch has not been used
  const u32 scanned = warp_scan(counts), before = over_warps(scanned, scratch) + scanned - counts;
  const u32 all = THRESHOLD ? __reduce_add_sync(~0u, (threadIdx.x & 31) < WARPS ? scratch[threadIdx.x & 31] : 0u) : 0u;
  u32 over = before & 0xffff, at = before >> 16;
#pragma unroll
  for (int e = 0; e < EACH; e++)
    if (mine + e < CHANNELS) {
      const u32 bits = (x[e >> 1] >> (e & 1) * 16) & 0xffff, r = rank(bits & MAGNITUDE);
      if (r == 1 || r && at < missing) list[over + min(at, missing)] = (u32)(mine + e) << 16 | bits;
      over += r & 1, at += r >> 16;
    }
  __syncthreads();
  return all;
}

// Lists the ``keep`` channels of largest magnitude, ascending; equal magnitudes from the lowest channel up. ``x``: this
// thread's channels, two to a word, zero beyond the last. Returns the sum of the threads' ``squares``.
__device__ __forceinline__ float select(const u32 (&x)[EACH / 2], float squares, int keep, u32* histogram, u32* list,
                                        Scalars* s) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, mine = threadIdx.x * EACH;
#pragma unroll
  for (int e = 0; e < EACH; e++)
    if (mine + e < CHANNELS) {
      const u32 key = (x[e >> 1] >> (e & 1) * 16) & MAGNITUDE;
      const int bin = min(max((int)(key >> SHIFT) - FIRST, 0), BINS - 1);
      atomicAdd(&histogram[bin >> 1], 1u << (bin & 1) * 16);
    }
  if (NORM) squares = warp_sum(squares);
  __syncthreads();

  // Thread 0 takes the topmost bins, so that a scan counts from the largest magnitude down.
  constexpr int WORDS = BINS / THREADS / 2;
  const int top = THREADS - 1 - threadIdx.x;
  u32 pair[WORDS], both = 0;
#pragma unroll
  for (int i = 0; i < WORDS; i += 4) {
    const uint4 v = reinterpret_cast<const uint4*>(histogram)[(top * WORDS + i) / 4];
    pair[i] = v.x, pair[i + 1] = v.y, pair[i + 2] = v.z, pair[i + 3] = v.w;
    both += v.x + v.y + v.z + v.w;  // no carry: all counts together are fewer than 2^16
  }
  const u32 own = (both & 0xffff) + (both >> 16), inclusive = warp_scan(own);
  if (NORM && lane == 0) s->squares[warp] = squares;
  const u32 reached = over_warps(inclusive, s->warp) + inclusive;
  if (reached >= keep && reached - own < keep) {
    u32 count = reached - own;
    int bin = -1;
    u32 over = 0;
#pragma unroll
    for (int i = 2 * WORDS - 1; i >= 0; i--) {
      const u32 here = (pair[i >> 1] >> (i & 1) * 16) & 0xffff;
      if (bin < 0 && count + here >= keep) bin = i, over = count;
      count += here;
    }
    bin += top * 2 * WORDS;
    s->above = over;
    s->low = SHIFT == 0 && bin == 0 ? 0 : bin + FIRST << SHIFT;
    s->high = SHIFT == 0 && bin == BINS - 1 ? MAGNITUDE : (bin + FIRST + 1 << SHIFT) - 1;
  }
  __syncthreads();
  u32 low = s->low, high = s->high, above = s->above;
  if (NORM) squares = warp_sum(lane < WARPS ? s->squares[lane] : 0.f);

  while (low < high) {  // more than one pattern in the bin: halve it. Rare for bf16, twice for fp16.
    const u32 middle = low + (high - low) / 2;
    u32 count = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const u32 key = (x[e >> 1] >> (e & 1) * 16) & MAGNITUDE;
      count += mine + e < CHANNELS && key > middle && key <= high;
    }
    count = warp_scan(count);
    __syncthreads();
    const u32 upper = over_warps(count, s->warp, true);
    if (above + upper >= keep)
      low = middle + 1;
    else
      high = middle, above += upper;
  }

  // The threshold is ``low``.
  compact(x, keep - above, list, s->warp, [=](u32 key) { return key > low ? 1u : key == low ? 1u << 16 : 0u; });
  return squares;
}

// Copies all channels to shared memory. Returns the sum of the threads' ``squares``.
__device__ __forceinline__ float copy(const u32 (&x)[EACH / 2], float squares, u16* to, Scalars* s) {
  const int mine = threadIdx.x * EACH;
#pragma unroll
  for (int e = 0; e < EACH; e += 2)
    if (mine + e < CHANNELS) *reinterpret_cast<u32*>(to + mine + e) = x[e >> 1];
  return block_sum(squares, s->squares);
}

// This thread's channels, two to a word, zero beyond the last.
__device__ __forceinline__ void fetch(u32 (&to)[EACH / 2], const u16* from) {
#pragma unroll
  for (int i = 0; i < EACH / 4; i++) {
    const int q = threadIdx.x * (EACH / 4) + i;
    const uint2 v = q < CHANNELS / 4 ? __ldcg(reinterpret_cast<const uint2*>(from) + q) : make_uint2(0, 0);
    to[2 * i] = v.x, to[2 * i + 1] = v.y;
  }
}
