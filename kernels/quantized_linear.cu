// ``quantized_linear`` for one row: a whole sparse site over 8- or 4-bit weights in one launch. See larosa_fx.kernels.ops.
//
// A row of the weight belongs to one input channel, so its scale multiplies that channel's value, and a row that is not
// listed is not read. Rows are a quarter to a half as long as in 16 bits: a tile of one block would be shorter than the
// memory's sectors serve well. So the SPLIT blocks of a cluster share a tile, each reads every SPLIT-th listed row of it,
// and the sums meet in the cluster's shared memory, always in the same order: equal inputs give equal bits.
//
// Compiled at run time with these constants, besides those of selection.cuh: COLUMNS (N), BITS (8 or 4), GROUP (columns
// that share a scale), ADAPTER (rows of the residual adapter, in 8 bits), TILE (columns a cluster reads, a multiple of 32),
// BATCH (rows a thread asks for at a time), SPLIT (blocks of a cluster), SHARED (bytes of shared memory), and the flags FULL,
// BIAS, RESIDUAL, EARLY and GAIN, as sparse_linear.cu describes them.
//
// 8 bits: w = s q, q signed. 4 bits: w = s u + m, u = 0..15, two to a byte, the lower column in the lower half; s and m,
// 16 bits each, lie side by side.

#include "cluster.cuh"
#include "selection.cuh"

constexpr int OUT_COLUMNS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int OUT_TILE = GATE ? TILE / 2 : TILE;
constexpr int WIDTH = 16;             // columns a thread adds up: 16 bytes of 8-bit weights, 8 bytes of 4-bit ones
constexpr int LANES = TILE / WIDTH;   // threads that read a row
constexpr int GROUPS = THREADS / LANES;  // rows read side by side
constexpr bool IN_WARP = LANES < 32 && (LANES & LANES - 1) == 0;
constexpr int FOLD = fold(THREADS / TILE);  // neighbouring threads that add up a column of the block, a power of two
constexpr int EACH_OUT = OUT_TILE / SPLIT;  // outputs that a block of the cluster finishes
static_assert(OUT_TILE % SPLIT == 0, "outputs that no block would finish");
constexpr int PARTS = IN_WARP ? WARPS : GROUPS;  // partial sums of a column that meet in shared memory

// Shared memory: histogram (for Top-K) | list | partial sums | sums of the block | residual | scalars.
constexpr int PARTIAL_ROW = TILE + 4;  // lanes that add up a column meet other banks
constexpr int HISTOGRAM_BYTES = THRESHOLD ? 0 : BINS * 2, PARTIAL_AT = HISTOGRAM_BYTES + CHANNELS * 4;
constexpr int TOTAL_AT = PARTIAL_AT + PARTS * PARTIAL_ROW * 4, RESIDUAL_AT = TOTAL_AT + TILE * 4;
static_assert(RESIDUAL_AT + ADAPTER * 2 + sizeof(Scalars) <= SHARED, "the host's layout is not this one");

template <int WORDS>
struct Pack {
  u32 word[WORDS];
  __device__ __forceinline__ void load(const u8* address, bool wanted, u64 policy) {
    if constexpr (WORDS == 4)
      asm volatile(
          "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
          "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6; }"
          : "=&r"(word[0]), "=&r"(word[1]), "=&r"(word[2]), "=&r"(word[3])
          : "l"(address), "r"((u32)wanted), "l"(policy));
    else
      asm volatile(
          "{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;\n"
          "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %4; }"
          : "=&r"(word[0]), "=&r"(word[1])
          : "l"(address), "r"((u32)wanted), "l"(policy));
  }
};

constexpr u32 MAGIC = 0x4b000000;  // the float 2^23, whose last bits count units
constexpr float UNIT = 8388608.f;

// sum[i] += c q[i] for the 16 signed bytes of a pack. A byte, made unsigned, stands in the last bits of a float.
__device__ __forceinline__ void add(const Pack<4>& pack, float c, float (&sum)[WIDTH]) {
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const u32 raised = pack.word[w] ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; i++)
      sum[4 * w + i] = fmaf(c, __uint_as_float(__byte_perm(raised, MAGIC, 0x7650 + i)) - (UNIT + 128.f), sum[4 * w + i]);
  }
}

// sum[i] += c u[i] for the 16 nibbles of a pack. A nibble is left where it stands: it counts 2^(4 place) units there, and
// the coefficient makes up for it.
__device__ __forceinline__ void add(const Pack<2>& pack, float c, float (&sum)[WIDTH]) {
  const float scaled[5] = {c, c * .0625f, c * .00390625f, c * .000244140625f, c * .0000152587890625f};
#pragma unroll
  for (int w = 0; w < 2; w++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = i < 5 ? i : i - 3;  // the upper three from a shifted word
      const u32 word = i < 5 ? pack.word[w] : pack.word[w] >> 12;
      const float u = __uint_as_float((word & 15u << 4 * place) | MAGIC) - UNIT;
      sum[8 * w + i] = fmaf(scaled[place], u, sum[8 * w + i]);
    }
}

// BATCH rows of this thread's 16 columns on their way, with each row's value and scale. 4 bits: ``offset`` collects what rows
// add to each of the columns alike.
template <int WIDE>
struct Batch {
  Pack<WIDE / 2> pack[BATCH];
  float value[BATCH];
  u32 scale[BATCH];

  // LISTED: of the ``count`` rows of the list, an entry being row << 16 | value; else of as many rows from the first on,
  // with a value each.
  template <bool LISTED>
  __device__ __forceinline__ void ask(const u8* weight, const u16* scales, const void* rows, int first, int count,
                                      bool reads, u64 policy) {
    constexpr int PER_ROW = COLUMNS / GROUP * (WIDE == 4 ? 2 : 1);
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * GROUPS * SPLIT;
      const bool wanted = reads && at < count;
      u32 row = at, bits = 0;
      if (wanted) {
        if (LISTED) {
          const u32 entry = static_cast<const u32*>(rows)[at];
          row = entry >> 16, bits = entry & 0xffff;
        } else {
          bits = static_cast<const u16*>(rows)[at];
        }
      }
      value[b] = widen(bits);
      pack[b].load(weight + (u64)row * (COLUMNS / 8 * WIDE), wanted, policy);
      const u16* s = scales + (u64)row * PER_ROW;
      scale[b] = !wanted ? 0u : WIDE == 4 ? __ldg(reinterpret_cast<const u32*>(s)) : __ldg(s);
    }
  }

  __device__ __forceinline__ void take(float (&sum)[WIDTH], float& offset) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      add(pack[b], value[b] * widen(scale[b] & 0xffff), sum);
      if (WIDE == 4) offset = fmaf(value[b], widen(scale[b] >> 16), offset);
    }
  }
};

// Adds up the rows that fall to this block of the cluster. One batch is on its way while another is added up: without that
// all warps wait for memory at one time, and compute at another.
template <int WIDE, bool LISTED>
__device__ __forceinline__ void stream(const u8* weight, const u16* scales, const void* rows, int count, bool reads,
                                       int rank, float (&sum)[WIDTH], float& offset, u64 policy) {
  constexpr int STEP = GROUPS * SPLIT * BATCH;
  Batch<WIDE> even, odd;
  int first = threadIdx.x / LANES * SPLIT + rank;
  even.template ask<LISTED>(weight, scales, rows, first, count, reads, policy);
  for (; first < count; first += 2 * STEP) {
    odd.template ask<LISTED>(weight, scales, rows, first + STEP, count, reads, policy);
    even.take(sum, offset);
    even.template ask<LISTED>(weight, scales, rows, first + 2 * STEP, count, reads, policy);
    odd.take(sum, offset);
  }
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
quantized_linear(const u16* __restrict__ x, const u8* __restrict__ weight, const u16* __restrict__ scales,
                 const u8* __restrict__ adapter, const u16* __restrict__ adapter_scales, const u16* __restrict__ bias,
                 const u16* __restrict__ residual, const u16* __restrict__ gain, u16* __restrict__ y, int keep, float eps,
                 float threshold) {
  extern __shared__ __align__(16) char memory[];
  u32* histogram = reinterpret_cast<u32*>(memory);
  u32* list = reinterpret_cast<u32*>(memory + HISTOGRAM_BYTES);
  float* partial = reinterpret_cast<float*>(memory + PARTIAL_AT);
  float* totals = reinterpret_cast<float*>(memory + TOTAL_AT);
  u16* carried = reinterpret_cast<u16*>(memory + RESIDUAL_AT);
  Scalars* scalars = reinterpret_cast<Scalars*>(memory + RESIDUAL_AT + ADAPTER * 2);
  const int t = threadIdx.x, lane = t % LANES, rank = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT * OUT_TILE;
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

  // This thread's 16 columns. With a gate the second half of the lanes reads the columns to be gated.
  const int column = tile + (GATE ? lane % (LANES / 2) : lane) * WIDTH;
  const bool reads = column < OUT_COLUMNS && t < GROUPS * LANES;
  const int mine = column + (GATE && lane >= LANES / 2 ? OUT_COLUMNS : 0);
  const u8* rows = weight + mine / 8 * BITS;
  const u16* row_scales = scales + mine / GROUP * (BITS == 4 ? 2 : 1);
  float sum[WIDTH] = {}, offset = 0.f;
  for (int i = t; !FULL && i < HISTOGRAM_BYTES / 16; i += THREADS)
    reinterpret_cast<uint4*>(histogram)[i] = make_uint4(0, 0, 0, 0);
  u32 gains[EACH / 2];
  if (GAIN) fetch(gains, gain);  // before the wait: a weight, which no kernel in flight writes

  // EARLY: the kernel before this one read the residual too, so it is complete although that kernel may not be.
  if (!EARLY) wait_for_producer();
  if (ADAPTER) {
    for (int i = t; i < ADAPTER / 8; i += THREADS)
      reinterpret_cast<uint4*>(carried)[i] = __ldcg(reinterpret_cast<const uint4*>(residual) + i);
    __syncthreads();
    stream<8, false>(adapter + mine, adapter_scales + mine / GROUP, carried, ADAPTER, reads, rank, sum, offset, policy);
  }
  if (EARLY) wait_for_producer();

  u32 channels[EACH / 2];
  fetch(channels, x);
  float squares = 0.f;  // of x itself, without the gain
#pragma unroll
  for (int i = 0; i < EACH / 2; i++) {
    const float a = widen(channels[i] & 0xffff), b = widen(channels[i] >> 16);
    if (NORM) squares = fmaf(b, b, fmaf(a, a, squares));
    if (GAIN) channels[i] = narrow(a * widen(gains[i] & 0xffff)) | (u32)narrow(b * widen(gains[i] >> 16)) << 16;
  }
  if (!THRESHOLD) __syncthreads();  // the histogram is empty
  if (FULL) {
    squares = copy(channels, squares, reinterpret_cast<u16*>(list), scalars);
    stream<BITS, false>(rows, row_scales, list, CHANNELS, reads, rank, sum, offset, policy);
  } else if (THRESHOLD) {
    if (NORM) squares = block_sum(squares, scalars->squares);
    const float scale = norm_scale(squares, eps);
    const int kept = compact(channels, 0, list, scalars->warp,
                             [=](u32 key) { return widen(key) * scale < threshold ? 0u : 1u; });
    stream<BITS, true>(rows, row_scales, list, kept, reads, rank, sum, offset, policy);
  } else {
    squares = select(channels, squares, keep, histogram, list, scalars);
    stream<BITS, true>(rows, row_scales, list, keep, reads, rank, sum, offset, policy);
  }

  // Sum over the groups of rows: within a warp, over the block, over the cluster.
#pragma unroll
  for (int i = 0; i < WIDTH; i++) {
    sum[i] += offset;
    if (IN_WARP)
#pragma unroll
      for (int o = 16; o >= LANES; o >>= 1) sum[i] += __shfl_xor_sync(~0u, sum[i], o);
  }
  if (IN_WARP ? (t & 31) < LANES : t < GROUPS * LANES) {
    float4* to = reinterpret_cast<float4*>(partial + (IN_WARP ? t / 32 : t / LANES) * PARTIAL_ROW + lane * WIDTH);
#pragma unroll
    for (int i = 0; i < WIDTH / 4; i++) to[i] = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
  }
  __syncthreads();
  for (int i = t / FOLD; i < (TILE + 31) / 32 * 32; i += THREADS / FOLD) {  // whole warps, for the shuffles
    float total = 0.f;
    for (int part = t % FOLD; part < PARTS && i < TILE; part += FOLD) total += partial[part * PARTIAL_ROW + i];
#pragma unroll
    for (int o = FOLD / 2; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
    if (t % FOLD == 0 && i < TILE) totals[i] = total;
  }
  cluster_barrier();
  const float scale = norm_scale(squares, eps);
  for (int i = rank * EACH_OUT + t; i < (rank + 1) * EACH_OUT && tile + i < OUT_COLUMNS; i += THREADS) {
    const int to = tile + i;
    float total[2] = {0.f, 0.f};
#pragma unroll
    for (int block = 0; block < SPLIT; block++)
#pragma unroll
      for (int half = 0; half <= (GATE ? 1 : 0); half++) total[half] += of_block(totals + half * OUT_TILE + i, block);
#pragma unroll
    for (int half = 0; half <= (GATE ? 1 : 0); half++) {
      total[half] *= scale;
      if (BIAS) total[half] += widen(__ldg(bias + to + half * OUT_COLUMNS));
    }
    if (GATE) total[0] = gated(total[0], total[1]);
    if (RESIDUAL) total[0] += widen(__ldcg(residual + to));
    y[to] = narrow(total[0]);
  }
  if (SPLIT > 1) cluster_barrier();  // the others may still be reading this block's sums
}
