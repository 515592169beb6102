// The channels of one row as the SPLIT blocks of a cluster share them where none is ranked among all: every SPLIT-th 64 of them
// to a block. Of these a warp has 64 at a time, two to a thread, and lists what it keeps by two votes.
//
// Constants: those of selection.cuh, SPLIT and FULL.
#pragma once

#include "selection.cuh"

constexpr bool RANKED = !THRESHOLD && !FULL;
constexpr int TURNS = (CHANNELS + 64 * WARPS * SPLIT - 1) / (64 * WARPS * SPLIT);  // that a warp takes to its share
constexpr int OWN_CHANNELS = TURNS * 64 * WARPS;                                   // that a block lists at most

// A row without ranks: this thread's part of the block's share, zero beyond the last channel.
struct Shared {
  u32 pair[TURNS];

  // The first channel of the i-th pair; ``further``: of the block so many behind this one.
  __device__ __forceinline__ static int channel_of(int i, int further = 0) {
    return 64 * ((i * WARPS + threadIdx.x / 32) * SPLIT + (blockIdx.x + further) % SPLIT) + 2 * (threadIdx.x & 31);
  }

  __device__ __forceinline__ static float squared(u32 pair, float sum) {
    const float a = widen(pair & 0xffff), b = widen(pair >> 16);
    return fmaf(b, b, fmaf(a, a, sum));
  }

  __device__ __forceinline__ void fetch(const u16* from) {
#pragma unroll
    for (int i = 0; i < TURNS; i++)
      pair[i] = channel_of(i) < CHANNELS ? __ldcg(reinterpret_cast<const u32*>(from + channel_of(i))) : 0u;
  }

  // A thread's part of the squares of all of ``from``, which it has fetched its own channels from: the others it would have in
  // the cluster's other blocks.
  __device__ __forceinline__ float squares(const u16* from) const {
    float sum = 0.f;
#pragma unroll
    for (int further = 1; further < SPLIT; further++)
#pragma unroll
      for (int i = 0; i < TURNS; i++)
        if (channel_of(i, further) < CHANNELS)
          sum = squared(__ldcg(reinterpret_cast<const u32*>(from + channel_of(i, further))), sum);
#pragma unroll
    for (int i = 0; i < TURNS; i++) sum = squared(pair[i], sum);
    return sum;
  }

  // Copies the block's channels to their places in shared memory; a barrier must follow.
  __device__ __forceinline__ void copy(u16* to) const {
#pragma unroll
    for (int i = 0; i < TURNS; i++)
      if (channel_of(i) < CHANNELS) *reinterpret_cast<u32*>(to + channel_of(i)) = pair[i];
  }

  // Lists the channels that reach the threshold, of a warp's 64 those at even places before the others. Returns how many, and in
  // ``squares`` the sum of the threads'.
  __device__ __forceinline__ int choose(float& squares, int, float eps, float threshold, u32*, u32* list, Scalars* s) const {
    if (NORM) squares = block_sum(squares, s->squares);
    const float scale = norm_scale(squares, eps);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, before = (1u << lane) - 1;
    u32 votes[TURNS][2], count = 0;
#pragma unroll
    for (int i = 0; i < TURNS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float size = widen(pair[i] >> half * 16 & MAGNITUDE) * scale;
        votes[i][half] = __ballot_sync(~0u, channel_of(i) < CHANNELS && !(size < threshold));
        count += __popc(votes[i][half]);
      }
    if (lane == 0) s->warp[warp] = count;
    __syncthreads();
    const u32 counts = lane < WARPS ? s->warp[lane] : 0u, all = __reduce_add_sync(~0u, counts);
    u32 at = __reduce_add_sync(~0u, lane < warp ? counts : 0u);
#pragma unroll
    for (int i = 0; i < TURNS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (votes[i][half] >> lane & 1)
          list[at + __popc(votes[i][half] & before)] = (u32)(channel_of(i) + half) << 16 | (pair[i] >> half * 16 & 0xffff);
        at += __popc(votes[i][half]);
      }
    __syncthreads();
    return all;
  }
};

// A row whose channels are ranked: each block has all of them, and a thread neighbours.
struct Ranked {
  u32 pair[EACH / 2];

  __device__ __forceinline__ void fetch(const u16* from) { ::fetch(pair, from); }

  __device__ __forceinline__ float squares(const u16*) const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH / 2; i++) sum = Shared::squared(pair[i], sum);
    return sum;
  }

  __device__ __forceinline__ void copy(u16* to) const {
#pragma unroll
    for (int i = 0; i < EACH / 2; i++)
      if (threadIdx.x * EACH + 2 * i < CHANNELS) *reinterpret_cast<u32*>(to + threadIdx.x * EACH + 2 * i) = pair[i];
  }

  // Lists the ``keep`` largest, as ``select`` does.
  __device__ __forceinline__ int choose(float& squares, int keep, float, float, u32* histogram, u32* list, Scalars* s) const {
    __syncthreads();  // the histogram is empty
    squares = select(pair, squares, keep, histogram, list, s);
    return keep;
  }
};

template <bool>
struct Chosen {
  using Row = Shared;
};
template <>
struct Chosen<true> {
  using Row = Ranked;
};
using Row = Chosen<RANKED>::Row;

// The channels times their gains.
__device__ __forceinline__ void multiply_by(Row& row, const Row& gains) {
#pragma unroll
  for (int i = 0; i < sizeof(Row) / 4; i++)
    row.pair[i] = narrow(widen(row.pair[i] & 0xffff) * widen(gains.pair[i] & 0xffff)) |
                  (u32)narrow(widen(row.pair[i] >> 16) * widen(gains.pair[i] >> 16)) << 16;
}
