// Attention of one query token over a static cache, in one launch: rotary embedding, the cache's new row, and the softmax
// over the positions that the mask allows. See larosa_fx.kernels.ops for what it computes.
//
// A cluster of SPLIT blocks owns a key/value head and all query heads that share it, so that the cache is read once. Its
// blocks take turns along the positions and keep a running maximum each (online softmax). Each then brings its parts to the
// shared memory of the block that finishes them. The order of all additions is fixed: equal inputs give equal bits.
//
// What is read before the kernel in front has ended may not be the last word, so it only says which rows of the cache to
// bring to L2 meanwhile: there they are the same for all. The mask is read again, past L1, once that kernel has ended.
//
// q, k and v lie as a product of several linears leaves them: a token's heads side by side, sequences q_stride (k_stride,
// v_stride) elements apart. y: [sequences, heads, DIM].
//
// Compiled at run time with GROUP (query heads to a key/value head) beside the constants of attention.cuh.

#include "attention.cuh"

constexpr int LANES = DIM / 8;         // threads that read a row of the cache, 16 bytes each
constexpr int SIDE = 32 / LANES;       // rows a warp reads side by side
constexpr int BATCH = GROUP > 4 ? 2 : 4;  // rows a thread has in flight, of keys and of values each
constexpr int STEP = WARPS * SIDE;
constexpr int SHARE = GROUP * DIM / SPLIT;  // results that a block finishes
// The token's rows: queries, and behind them its key and its value. A thread has one channel, of every ABREAST-th row.
constexpr int ROWS = GROUP + (WRITE ? 2 : 0), ABREAST = THREADS / DIM, TURNS = (ROWS + ABREAST - 1) / ABREAST;

// What the mask says at this moment, of one position or of four: past L1, and read anew each time.
__device__ __forceinline__ u32 read_mask(const u8* from) {
  u32 byte;
  asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(byte) : "l"(from) : "memory");
  return byte;
}
__device__ __forceinline__ u32 read_mask(const u32* from) {
  u32 bytes;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bytes) : "l"(from) : "memory");
  return bytes;
}

// One more than the last position that the mask allows, of those that this thread looks at; 0 if it allows none.
template <class Word>
__device__ __forceinline__ int last_allowed(const u8* mask, int length) {
  constexpr int TOGETHER = 8, POSITIONS = sizeof(Word);
  const Word* words = reinterpret_cast<const Word*>(mask);
  int reach = 0;
  for (int from = threadIdx.x; from < length / POSITIONS; from += TOGETHER * THREADS) {
    u32 found[TOGETHER];  // all asked for before any is looked at
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
      found[i] = from + i * THREADS < length / POSITIONS ? read_mask(words + from + i * THREADS) : 0u;
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
      if (found[i]) reach = (from + i * THREADS) * POSITIONS + (31 - __clz(found[i])) / 8 + 1;
  }
  return reach;
}

// Softmax over this thread's positions so far, for all queries of the group: the largest score, and relative to it the sum of
// the weights and, for this thread's eight channels, of the values times their weights.
struct Attend {
  float top[GROUP], sum[GROUP], mix[GROUP][8];

  __device__ __forceinline__ Attend() {
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      top[g] = NONE, sum[g] = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) mix[g][i] = 0.f;
    }
  }

  // Adds the first COUNT positions. The scores of all queries come first, so that their sums over threads do not wait for
  // each other.
  template <int COUNT>
  __device__ __forceinline__ void add(const uint4 (&key)[BATCH], const uint4 (&value)[BATCH], const bool (&seen)[BATCH],
                                      const float (&query)[GROUP][DIM], int part) {
    float score[GROUP][COUNT];
#pragma unroll
    for (int b = 0; b < COUNT; b++) {
      float w[8];
      unpack(key[b], w);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        const float4* own = reinterpret_cast<const float4*>(query[g]) + 2 * part;
        const float4 a = own[0], c = own[1];
        score[g][b] = a.x * w[0] + a.y * w[1] + a.z * w[2] + a.w * w[3];
        score[g][b] += c.x * w[4] + c.y * w[5] + c.z * w[6] + c.w * w[7];
      }
    }
#pragma unroll
    for (int o = LANES / 2; o; o >>= 1)
#pragma unroll
      for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int b = 0; b < COUNT; b++) score[g][b] += __shfl_xor_sync(~0u, score[g][b], o);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float highest = top[g];
#pragma unroll
      for (int b = 0; b < COUNT; b++) {
        score[g][b] = seen[b] ? score[g][b] : NONE;
        highest = fmaxf(highest, score[g][b]);
      }
      const float origin = origin_of(highest), faded = exp2f(top[g] - origin);
      top[g] = highest, sum[g] *= faded;
#pragma unroll
      for (int i = 0; i < 8; i++) mix[g][i] *= faded;
#pragma unroll
      for (int b = 0; b < COUNT; b++) sum[g] += score[g][b] = exp2f(score[g][b] - origin);
    }
#pragma unroll
    for (int b = 0; b < COUNT; b++) {
      float w[8];
      unpack(value[b], w);
#pragma unroll
      for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) mix[g][i] = fmaf(score[g][b], w[i], mix[g][i]);
    }
  }
};

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
decode_attention(const u16* __restrict__ q, u16* keys, u16* values, const u8* __restrict__ mask,
                 const u16* __restrict__ k, const u16* __restrict__ v, const long long* __restrict__ position,
                 const u16* __restrict__ cosine, const u16* __restrict__ sine, u16* __restrict__ y, int length,
                 int mask_stride, float scale, int q_stride, int k_stride, int v_stride) {
  __shared__ __align__(16) float query[GROUP][DIM];
  __shared__ __align__(16) u16 fresh[2][DIM];  // the cache's new row: key, value
  __shared__ __align__(16) float mixed[WARPS][GROUP][DIM];
  __shared__ float high[WARPS][GROUP], mass[WARPS][GROUP];
  __shared__ __align__(8) float met_mixed[SPLIT][SHARE];  // what the blocks of the cluster bring
  __shared__ __align__(8) float met[SPLIT][GROUP][2];     // their maxima and masses
  __shared__ int last;
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, part = lane % LANES;
  const int heads = gridDim.y, head = blockIdx.z * heads + blockIdx.y;  // of all sequences

  cluster_arrive();
  if (t == 0) last = MASK ? 0 : length;
  mask += (long long)blockIdx.z * mask_stride;
  const long long base = (long long)head * length * DIM;
  int first = blockIdx.x * STEP + warp * SIDE + lane / LANES;  // of this thread's positions, SPLIT * STEP apart
  const auto look = [&](bool (&seen)[BATCH]) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * SPLIT * STEP;
      seen[b] = at < length && (!MASK || read_mask(mask + at));
    }
  };
  bool there[BATCH], seen[BATCH];  // what has been asked for, and what takes part
  look(there);
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const int at = first + b * SPLIT * STEP;
    if (there[b]) {
      const long long row = base + (long long)at * DIM + 8 * part;
      asm volatile("prefetch.global.L2 [%0];\nprefetch.global.L2 [%1];" ::"l"(keys + row), "l"(values + row));
    }
  }
  wait_for_producer();
  uint4 key[BATCH], value[BATCH];
  const auto fetch = [&](int b) {
    const long long row = (base + (long long)(first + b * SPLIT * STEP) * DIM) / 8 + part;
    key[b] = __ldcg(reinterpret_cast<const uint4*>(keys) + row);
    value[b] = __ldcg(reinterpret_cast<const uint4*>(values) + row);
  };
#pragma unroll
  for (int b = 0; b < BATCH; b++)
    if (there[b]) fetch(b);
  look(seen);
  // All that is read of the token is asked for before any of it is looked at.
  q += (long long)blockIdx.z * q_stride + blockIdx.y * GROUP * DIM;
  k += (long long)blockIdx.z * k_stride + blockIdx.y * DIM;
  v += (long long)blockIdx.z * v_stride + blockIdx.y * DIM;
  if (ROPE == 2) cosine += (long long)blockIdx.z * DIM, sine += (long long)blockIdx.z * DIM;
  const int channel = t % DIM, half = DIM / 2;
  const float cos = ROPE ? widen(__ldcg(cosine + channel)) : 1.f, sin = ROPE ? widen(__ldcg(sine + channel)) : 0.f;
  u16 own[TURNS], other[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int row = t / DIM + i * ABREAST;
    const u16* from = row < GROUP ? q + row * DIM : row == GROUP ? k : v;
    own[i] = row < ROWS ? __ldcg(from + channel) : 0;
    other[i] = ROPE && row < ROWS ? __ldcg(from + (channel ^ half)) : 0;
  }
  const u64 place = WRITE ? __ldcg(position) : 0;
  __syncthreads();  // the first thread has set what is last
  if (MASK) {
    const int reach = __reduce_max_sync(~0u, length % 4 ? last_allowed<u8>(mask, length) : last_allowed<u32>(mask, length));
    if (lane == 0 && reach) atomicMax(&last, reach);
  }
  // Nothing is written outside the cache: where the position lies there, the result is NaN, for all to see.
  const bool inside = !WRITE || place < (u64)length;
  const int now = WRITE && inside ? (int)place : -1;
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int row = t / DIM + i * ABREAST;
    const float turned = widen(own[i]) * cos + (channel < half ? -widen(other[i]) : widen(other[i])) * sin;
    if (row < GROUP) query[row][channel] = turned * scale * LOG2E;
    if (row < GROUP || row >= ROWS) continue;
    const u16 written = row == GROUP ? narrow(turned) : own[i];
    fresh[row - GROUP][channel] = written;
    if (inside && blockIdx.x == 0) (row == GROUP ? keys : values)[base + (long long)now * DIM + channel] = written;
  }
  __syncthreads();

  Attend attend;
  const int reach = last;
  // Rows that take part, but for those that are there; zeros for the others.
  const auto complete = [&]() {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (!seen[b]) {
        key[b] = value[b] = make_uint4(0, 0, 0, 0);
      } else if (first + b * SPLIT * STEP == now) {
        key[b] = reinterpret_cast<const uint4*>(fresh[0])[part];
        value[b] = reinterpret_cast<const uint4*>(fresh[1])[part];
      } else if (!there[b]) {
        fetch(b);
      }
    }
  };
  complete();
  while (first - lane / LANES < reach) {
    // Steps that a warp has positions in: of a short cache not all.
    const int steps = (reach - first + lane / LANES + SPLIT * STEP - 1) / (SPLIT * STEP);
    if (steps > BATCH / 2)
      attend.add<BATCH>(key, value, seen, query, part);
    else if (steps > BATCH / 4)
      attend.add<BATCH / 2>(key, value, seen, query, part);
    else
      attend.add<BATCH / 4 ? BATCH / 4 : 1>(key, value, seen, query, part);
    first += SPLIT * STEP * BATCH;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * SPLIT * STEP;
      seen[b] = at < reach && (!MASK || mask[at]), there[b] = false;
    }
    complete();
  }

  // The rows side by side in a warp, then the warps, then the blocks.
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    float highest = attend.top[g];
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, o));
    const float faded = exp2f(attend.top[g] - origin_of(highest));
    attend.sum[g] *= faded;
#pragma unroll
    for (int i = 0; i < 8; i++) attend.mix[g][i] *= faded;
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) {
      attend.sum[g] += __shfl_xor_sync(~0u, attend.sum[g], o);
#pragma unroll
      for (int i = 0; i < 8; i++) attend.mix[g][i] += __shfl_xor_sync(~0u, attend.mix[g][i], o);
    }
    if (lane == 0) high[warp][g] = highest, mass[warp][g] = attend.sum[g];
    if (lane < LANES)
#pragma unroll
      for (int i = 0; i < 8; i++) mixed[warp][g][8 * part + i] = attend.mix[g][i];
  }
  __syncthreads();
  const auto highest_of = [&](int g) {
    float highest = NONE;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, high[w][g]);
    return highest;
  };
  cluster_wait();
  for (int i = 2 * t; i < GROUP * DIM; i += 2 * THREADS) {
    const int g = i / DIM, c = i % DIM;
    const float origin = origin_of(highest_of(g));
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float faded = exp2f(high[w][g] - origin);
      sums[0] += faded * mixed[w][g][c], sums[1] += faded * mixed[w][g][c + 1];
    }
    to_block(&met_mixed[blockIdx.x][i % SHARE], i / SHARE, sums[0], sums[1]);
  }
  for (int i = t; i < GROUP * SPLIT; i += THREADS) {
    const int g = i / SPLIT;
    const float highest = highest_of(g);
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += exp2f(high[w][g] - origin_of(highest)) * mass[w][g];
    to_block(met[blockIdx.x][g], i % SPLIT, highest, total);
  }
  cluster_barrier();
  for (int i = t; i < SHARE; i += THREADS) {
    const int of_all = blockIdx.x * SHARE + i, g = of_all / DIM;
    float highest = NONE, total = 0.f, value = 0.f;
#pragma unroll
    for (int r = 0; r < SPLIT; r++) highest = fmaxf(highest, met[r][g][0]);
#pragma unroll
    for (int r = 0; r < SPLIT; r++) {
      const float faded = exp2f(met[r][g][0] - origin_of(highest));
      total += faded * met[r][g][1], value += faded * met_mixed[r][i];
    }
    const float mean = total > 0.f ? value / total : total;
    y[(long long)head * GROUP * DIM + of_all] = narrow(inside ? mean : __int_as_float(0x7fffffff));
  }
}
