// Attention of one query token over a static cache, in one launch: rotary embedding, the cache's new row, and the softmax
// over the positions that the mask allows. See larosa_fx.kernels.ops for what it computes.
//
// A cluster of SPLIT blocks owns a key/value head and all query heads that share it, so that the cache is read once. Its
// blocks take turns along the positions, keep a running maximum each (online softmax), and put their parts together
// through distributed shared memory. The order of all additions is fixed: equal inputs give equal bits.
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

// x * cos + rotate_half(x) * sin, channel i of one head.
__device__ __forceinline__ float rope(const u16* x, const u16* cosine, const u16* sine, int i) {
  const float own = widen(x[i]);
  if (!ROPE) return own;
  const float other = widen(x[i < DIM / 2 ? i + DIM / 2 : i - DIM / 2]);
  return own * widen(cosine[i]) + (i < DIM / 2 ? -other : other) * widen(sine[i]);
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
decode_attention(const u16* __restrict__ q, u16* keys, u16* values, const u8* __restrict__ mask,
                 const u16* __restrict__ k, const u16* __restrict__ v, const long long* __restrict__ position,
                 const u16* __restrict__ cosine, const u16* __restrict__ sine, u16* __restrict__ y, int length,
                 int mask_stride, float scale, int q_stride, int k_stride, int v_stride) {
  __shared__ __align__(16) float query[GROUP][DIM];
  __shared__ __align__(16) u16 fresh[2][DIM];  // the cache's new row: key, value
  __shared__ float high[WARPS][GROUP], mass[WARPS][GROUP], mixed[WARPS][GROUP][DIM];
  __shared__ float block_high[GROUP], block_mass[GROUP], block_mixed[GROUP][DIM];
  __shared__ int last;
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, part = lane % LANES;
  const int heads = gridDim.y, head = blockIdx.z * heads + blockIdx.y;  // of all sequences

  if (t == 0) last = MASK ? 0 : length;
  wait_for_producer();
  __syncthreads();
  mask += (long long)blockIdx.z * mask_stride;
  q += (long long)blockIdx.z * q_stride + blockIdx.y * GROUP * DIM;
  k += (long long)blockIdx.z * k_stride + blockIdx.y * DIM;
  v += (long long)blockIdx.z * v_stride + blockIdx.y * DIM;
  if (ROPE == 2) cosine += (long long)blockIdx.z * DIM, sine += (long long)blockIdx.z * DIM;
  if (MASK) {
    int reach = 0;
#pragma unroll 8
    for (int i = t; i < length; i += THREADS)
      if (mask[i]) reach = i + 1;
    reach = __reduce_max_sync(~0u, reach);
    if (lane == 0 && reach) atomicMax(&last, reach);
  }
  for (int i = t; i < GROUP * DIM; i += THREADS)
    query[i / DIM][i % DIM] =
        rope(q + i / DIM * DIM, cosine, sine, i % DIM) * scale * LOG2E;
  const long long base = (long long)head * length * DIM;
  // Nothing is written outside the cache: where the position lies there, the result is NaN, for all to see.
  const bool inside = !WRITE || (u64)*position < (u64)length;
  const int now = WRITE && inside ? (int)*position : -1;
  if (WRITE && inside)
    for (int i = t; i < DIM; i += THREADS) {
      const u16 key = narrow(rope(k, cosine, sine, i)), value = v[i];
      fresh[0][i] = key, fresh[1][i] = value;
      if (blockIdx.x == 0) keys[base + (long long)now * DIM + i] = key, values[base + (long long)now * DIM + i] = value;
    }
  __syncthreads();

  float top[GROUP], sum[GROUP], mix[GROUP][8];
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    top[g] = NONE, sum[g] = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) mix[g][i] = 0.f;
  }
  const int reach = last;
  for (int first = blockIdx.x * STEP + warp * SIDE + lane / LANES; first - lane / LANES < reach;
       first += SPLIT * STEP * BATCH) {
    uint4 key[BATCH], value[BATCH];
    bool seen[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * SPLIT * STEP;
      seen[b] = at < reach && (!MASK || mask[at]);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * SPLIT * STEP;
      const uint4 zero = make_uint4(0, 0, 0, 0);
      if (at == now) {
        key[b] = reinterpret_cast<const uint4*>(fresh[0])[part];
        value[b] = reinterpret_cast<const uint4*>(fresh[1])[part];
      } else {
        const long long row = (base + (long long)at * DIM) / 8 + part;
        key[b] = seen[b] ? __ldcg(reinterpret_cast<const uint4*>(keys) + row) : zero;
        value[b] = seen[b] ? __ldcg(reinterpret_cast<const uint4*>(values) + row) : zero;
      }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float score[BATCH], highest = top[g];
      const float4* own = reinterpret_cast<const float4*>(query[g]) + 2 * part;
      const float4 a = own[0], c = own[1];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        float w[8];
        unpack(key[b], w);
        float dot = a.x * w[0] + a.y * w[1] + a.z * w[2] + a.w * w[3];
        dot += c.x * w[4] + c.y * w[5] + c.z * w[6] + c.w * w[7];
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
        score[b] = seen[b] ? dot : NONE;
        highest = fmaxf(highest, score[b]);
      }
      const float origin = highest == NONE ? 0.f : highest, faded = exp2f(top[g] - origin);
      top[g] = highest, sum[g] *= faded;
#pragma unroll
      for (int i = 0; i < 8; i++) mix[g][i] *= faded;
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const float weight = exp2f(score[b] - origin);
        float w[8];
        unpack(value[b], w);
        sum[g] += weight;
#pragma unroll
        for (int i = 0; i < 8; i++) mix[g][i] = fmaf(weight, w[i], mix[g][i]);
      }
    }
  }

  // The rows side by side in a warp, then the warps, then the blocks.
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    float highest = top[g];
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, o));
    const float faded = highest == NONE ? 0.f : exp2f(top[g] - highest);
    sum[g] *= faded;
#pragma unroll
    for (int i = 0; i < 8; i++) mix[g][i] *= faded;
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) {
      sum[g] += __shfl_xor_sync(~0u, sum[g], o);
#pragma unroll
      for (int i = 0; i < 8; i++) mix[g][i] += __shfl_xor_sync(~0u, mix[g][i], o);
    }
    if (lane == 0) high[warp][g] = highest, mass[warp][g] = sum[g];
    if (lane < LANES)
#pragma unroll
      for (int i = 0; i < 8; i++) mixed[warp][g][8 * part + i] = mix[g][i];
  }
  __syncthreads();
  for (int i = t; i < GROUP * DIM; i += THREADS) {
    const int g = i / DIM, c = i % DIM;
    float highest = NONE, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, high[w][g]);
    if (highest != NONE)
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float faded = exp2f(high[w][g] - highest);
        total += faded * mass[w][g], value += faded * mixed[w][g][c];
      }
    block_mixed[g][c] = value;
    if (c == 0) block_high[g] = highest, block_mass[g] = total;
  }
  cluster_barrier();
  for (int i = blockIdx.x * THREADS + t; i < GROUP * DIM; i += SPLIT * THREADS) {
    const int g = i / DIM, c = i % DIM;
    float high_of[SPLIT], highest = NONE, total = 0.f, value = 0.f;
#pragma unroll
    for (int r = 0; r < SPLIT; r++) highest = fmaxf(highest, high_of[r] = of_block(&block_high[g], r));
    if (highest != NONE)
#pragma unroll
      for (int r = 0; r < SPLIT; r++) {
        const float faded = exp2f(high_of[r] - highest);
        total += faded * of_block(&block_mass[g], r), value += faded * of_block(&block_mixed[g][c], r);
      }
    const float mean = total > 0.f ? value / total : total;
    y[((long long)head * GROUP + g) * DIM + c] = narrow(inside ? mean : __int_as_float(0x7fffffff));
  }
  cluster_barrier();  // no block ends while another still reads its shared memory
}
