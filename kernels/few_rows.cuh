// A whole sparse site for a few rows, each weight row read once for all of them: what does not depend on how weights are
// stored. sparse_rows.cu and quantized_rows.cu say that; see larosa_fx.kernels.ops for what is computed.
//
// A block owns a tile of output columns. It lists the channels that any row keeps, with a value for each row that is zero
// where the row drops the channel, and multiplies by tensor cores: 16 listed channels and 16 columns at a time, for 8 rows.
// The order in which channels are added is any, since they are listed: a thread brings four neighbours of the list, and
// pairs of 16-bit weights out of two rows are what the tensor cores take. Where tiles are narrow, the SPLIT blocks of a
// cluster share one, each reads every SPLIT-th sixteen of its rows, and the sums meet in the cluster's shared memory, always
// in the same order.
//
// Where the values of all channels have no room in shared memory, they are brought in parts.
//
// Compiled at run time with these constants: CHANNELS (K), COLUMNS (N of the weight), ADAPTER (rows of the residual
// adapter), ROWS (the most rows of x: 2, 4 or 8), PART (channels brought at a time, a multiple of 16), TILE (columns of
// weight a cluster reads, a multiple of 16), WIDTH (of them a thread's, a multiple of 4), SPLIT (blocks of a cluster),
// THREADS, BATCH (times 16 rows of weight a warp has in flight), HALF (1 fp16, 0 bf16), GATE (0 none, 1 silu, 2 gelu,
// 3 gelu_tanh, 4 relu), SHARED (bytes of shared memory) and the flags NORM, BIAS, RESIDUAL, EARLY, GAIN and THRESHOLD (every
// channel is kept without).
//
// A ``Weight`` is some columns, a thread's own in the end, of rows from one on:
//   Batch                                    what a warp has in flight: BATCH times 16 rows, of which a thread has four each
//   columns(c), behind(n)                    the same from column c on, and from the n-th row on
//   adapter(n)                               the adapter's rows from the n-th on
//   request<LISTED>(batch, list, first, count, policy)  asks for a batch from step ``first`` on: of the rows that are listed,
//                                            or of all ``count``
//   add(batch, values, first, count, sums)   multiplies it by the values in the block
//   stream<LISTED>(batch, values, list, count, sums, policy)  adds the products of ``count`` rows with the values; ``batch``:
//                                            the first, asked for already
//   settle(sums)                             what is left to do to a thread's sums
#pragma once

#include "cluster.cuh"
#include "selection.cuh"

constexpr int OUT_COLUMNS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int OUT_TILE = GATE ? TILE / 2 : TILE;
constexpr int TILES = WIDTH / 2;                    // of 16 columns that a warp multiplies
constexpr int ACROSS = (TILE / WIDTH + 7) / 8;      // warps side by side
constexpr int DEEP = WARPS / ACROSS;                // warps of a block that share the rows of their columns
constexpr int APART = DEEP * SPLIT;                 // from one of a warp's steps of 16 rows to its next
constexpr int STRIDE = (PART + 63) / 64 * 64 + 16;  // between the values of two rows: eight threads meet other banks
constexpr int HELD = (PART + 4 * THREADS - 1) / (4 * THREADS) * 4;  // consecutive channels that a thread ranks
constexpr int EIGHTH = (PART < CHANNELS ? PART : CHANNELS) / 8 / 16 * 16;
constexpr int AHEAD = 16 * APART * BATCH < EIGHTH ? 16 * APART * BATCH : EIGHTH;  // see ``choose``
constexpr int OUTPUTS = ROWS * OUT_TILE / SPLIT;                                  // that a block finishes
constexpr int FOLD = fold(THREADS / OUTPUTS < APART ? THREADS / OUTPUTS : APART);  // threads that add up an output
constexpr bool ONE_EACH = OUTPUTS * FOLD <= THREADS;                               // no thread adds up a second one

// Shared memory: values of each row | list | partial sums | sums of squares | norms | scan.
constexpr int PARTIAL_ROW = TILE + 4;
constexpr int LIST_AT = ROWS * STRIDE * 2, PARTIAL_AT = LIST_AT + (THRESHOLD ? (PART + 16) * 2 : 0);
constexpr int SQUARES_AT = PARTIAL_AT + DEEP * ROWS * PARTIAL_ROW * 4, SCALES_AT = SQUARES_AT + ROWS * WARPS * 4;
constexpr int SCAN_AT = SCALES_AT + ROWS * 4;

static_assert(SCAN_AT + WARPS * 4 <= SHARED, "the host's layout is not this one");
static_assert(TILE % 16 == 0 && OUT_TILE % WIDTH == 0 && ACROSS <= WARPS, "a thread's columns lie side by side");
static_assert(ROWS * OUT_TILE % SPLIT == 0, "outputs that no block would finish");
static_assert(!THRESHOLD || HELD <= 32, "a thread has a bit for each channel that it ranks");
static_assert(!(NORM && THRESHOLD) || PART >= CHANNELS, "a threshold is compared with what the whole row's norm makes of x");

struct Block {
  u16* values;   // [ROWS, STRIDE]
  u16* list;     // channels of the part, ascending
  float* squares;  // [ROWS, WARPS], of x itself, without the gain
  float* scales;   // [ROWS]
  u32* scan;       // [WARPS]
};

// A thread's part of the products: of 16 columns and 8 rows each what the tensor cores leave with it.
struct Sums {
  float tile[TILES][4] = {};
  float offset = 0.f;  // to be added to all columns of a row, where weights have offsets
};

template <bool FP16>
__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  if (FP16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

// The listed rows of this thread's four places of the list from ``at`` on, or those places themselves. Behind the last row one
// that is there is meant once more.
template <bool LISTED>
__device__ __forceinline__ void rows_of(u32 (&rows)[4], const u16* list, int at, int count) {
  if (LISTED) {
    const uint2 listed = *reinterpret_cast<const uint2*>(list + at);
    rows[0] = listed.x & 0xffff, rows[1] = listed.x >> 16, rows[2] = listed.y & 0xffff, rows[3] = listed.y >> 16;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = min(at + i, count - 1);
  }
}

// The first step of this thread's warp, of which it takes every APART-th.
__device__ __forceinline__ int first_step() { return threadIdx.x / 32 / ACROSS * SPLIT + blockIdx.x % SPLIT; }

__device__ __forceinline__ int steps_of(int count) { return threadIdx.x / 32 < ACROSS * DEEP ? (count + 15) / 16 : 0; }

__device__ __forceinline__ u32 gained(u32 pair, u32 gains) {
  return narrow(widen(pair & 0xffff) * widen(gains & 0xffff)) | (u32)narrow(widen(pair >> 16) * widen(gains >> 16)) << 16;
}

__device__ __forceinline__ float squared(u32 pair, float sum) {
  const float a = widen(pair & 0xffff), b = widen(pair >> 16);
  return fmaf(b, b, fmaf(a, a, sum));
}

// Brings ``count`` channels of each row of ``from``, [rows, width], to the block, zeros behind them: those that the block
// multiplies, or all for the norm. OF_X: times the gain, if there is one, and the squares are added up for the norm.
template <bool OF_X>
__device__ __forceinline__ void bring(const u16* from, int width, int count, int rows, const u16* gain, const Block& block,
                                      float (&squares)[ROWS]) {
  constexpr int EVERY = OF_X && NORM ? 1 : SPLIT;  // sixteen channels of so many
  for (int i = threadIdx.x; i < (count + 15) / 16 * 4; i += THREADS) {
    const int q = EVERY == 1 ? i : (i / 4 * EVERY + blockIdx.x % SPLIT) * 4 + i % 4;
    if (EVERY > 1 && q >= (count + 15) / 16 * 4) break;
    uint2 gains = make_uint2(0, 0);
    if (OF_X && GAIN && q * 4 < count) gains = __ldg(reinterpret_cast<const uint2*>(gain) + q);
    uint2 v[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      v[r] = r < rows && q * 4 < count ? __ldcg(reinterpret_cast<const uint2*>(from + (u64)r * width) + q) : make_uint2(0, 0);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (OF_X && NORM) squares[r] = squared(v[r].y, squared(v[r].x, squares[r]));
      if (OF_X && GAIN) v[r] = make_uint2(gained(v[r].x, gains.x), gained(v[r].y, gains.y));
      *reinterpret_cast<uint2*>(block.values + r * STRIDE + q * 4) = v[r];
    }
  }
}

// Puts the sums of the threads' squares into the block, by warps; a barrier must follow.
__device__ __forceinline__ void share_squares(float (&squares)[ROWS], const Block& block) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = warp_sum(squares[r]);
    if ((threadIdx.x & 31) == 0) block.squares[r * WARPS + threadIdx.x / 32] = sum;
  }
}

__device__ __forceinline__ float norm_of(int row, float eps, const Block& block) {
  const int lane = threadIdx.x & 31;
  return norm_scale(warp_sum(lane < WARPS ? block.squares[row * WARPS + lane] : 0.f), eps);
}

// Lists the channels of a part of x that reach the threshold in any row, with their values, and before them the first
// ``ahead``, which were asked for while nothing was known of x. Returns how many.
__device__ __forceinline__ int choose(const u16* x, int count, int ahead, int rows, const u16* gain, float eps,
                                      float threshold, const Block& block) {
  const int mine = threadIdx.x * HELD;
  u32 held[ROWS][HELD / 2];
  float squares[ROWS] = {};
#pragma unroll
  for (int i = 0; i < HELD / 4; i++) {
    const bool there = mine + 4 * i < count;
    uint2 gains = make_uint2(0, 0);
    if (GAIN && there) gains = __ldg(reinterpret_cast<const uint2*>(gain + mine) + i);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint2 v = there && r < rows ? __ldcg(reinterpret_cast<const uint2*>(x + (u64)r * CHANNELS + mine) + i)
                                        : make_uint2(0, 0);
      if (NORM) squares[r] = squared(v.y, squared(v.x, squares[r]));
      held[r][2 * i] = GAIN ? gained(v.x, gains.x) : v.x;
      held[r][2 * i + 1] = GAIN ? gained(v.y, gains.y) : v.y;
    }
  }
  if (NORM) {
    share_squares(squares, block);
    __syncthreads();
  }
  u32 any = ahead <= mine ? 0 : ahead - mine >= HELD ? (1ull << HELD) - 1 : (1u << ahead - mine) - 1;  // a bit a channel
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float scale = NORM ? norm_of(r, eps, block) : 1.f;
    u32 kept = 0;
#pragma unroll
    for (int e = 0; e < HELD; e++) {
      const u32 size = (held[r][e >> 1] >> (e & 1) * 16) & MAGNITUDE;
      if (mine + e < count && r < rows && !(widen(size) * scale < threshold)) kept |= 1u << e;
    }
    any |= kept;
#pragma unroll
    for (int e = 0; e < HELD; e++)
      if (!(kept >> e & 1)) held[r][e >> 1] &= e & 1 ? 0xffffu : 0xffff0000u;
  }
  const u32 own = __popc(any), inclusive = warp_scan(own);
  u32 at = over_warps(inclusive, block.scan) + inclusive - own;
  const int lane = threadIdx.x & 31;
  const int all = __reduce_add_sync(~0u, lane < WARPS ? block.scan[lane] : 0u);
#pragma unroll
  for (int e = 0; e < HELD; e++)
    if (any >> e & 1) {
      block.list[at] = mine + e;
#pragma unroll
      for (int r = 0; r < ROWS; r++) block.values[r * STRIDE + at] = held[r][e >> 1] >> (e & 1) * 16;
      at++;
    }
  __syncthreads();
  const int behind = all + threadIdx.x;
  if (all && behind < (all + 15) / 16 * 16) {
    block.list[behind] = block.list[0];
#pragma unroll
    for (int r = 0; r < ROWS; r++) block.values[r * STRIDE + behind] = 0;
  }
  __syncthreads();
  return all;
}

// The weight's column of one of the block's tile, COLUMNS beyond the last. With a gate the second half of the tile's are
// those to be gated.
__device__ __forceinline__ int column_of(int local) {
  const int upper = GATE && local >= OUT_TILE, column = blockIdx.x / SPLIT * OUT_TILE + local - upper * OUT_TILE;
  return local < TILE && column < OUT_COLUMNS ? column + upper * OUT_COLUMNS : COLUMNS;
}

template <class Weight>
__device__ __forceinline__ void few_rows(const u16* __restrict__ x, const Weight all, const u16* __restrict__ bias,
                                         const u16* __restrict__ residual,
                                         const u16* __restrict__ gain, u16* __restrict__ y, int rows, float eps,
                                         float threshold) {
  extern __shared__ __align__(16) char memory[];
  const Block block = {reinterpret_cast<u16*>(memory), reinterpret_cast<u16*>(memory + LIST_AT),
                       reinterpret_cast<float*>(memory + SQUARES_AT), reinterpret_cast<float*>(memory + SCALES_AT),
                       reinterpret_cast<u32*>(memory + SCAN_AT)};
  float* partial = reinterpret_cast<float*>(memory + PARTIAL_AT);
  const int t = threadIdx.x, warp = t / 32, lane = t & 31;
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

  // This thread's columns. Threads that have none read their warp's first, for nothing, as a neighbour does.
  const int local = (warp % ACROSS * 8 + lane / 4) * WIDTH;
  const bool reads = column_of(local) < COLUMNS;
  const int beside = column_of(warp % ACROSS * 8 * WIDTH), column = reads ? column_of(local) : beside < COLUMNS ? beside : 0;
  const Weight weight = all.columns(column);
  Sums sums;
  float squares[ROWS] = {};
  bool streamed = false;  // the block's values are in use until a barrier
  typename Weight::Batch batch;
  const int rank = blockIdx.x % SPLIT, begin = warp / ACROSS * SPLIT + rank;

  const auto adapt = [&] {
    for (int first = 0; first < ADAPTER; first += PART) {
      const int count = min(PART, ADAPTER - first);
      const auto from = weight.adapter(first);
      if (streamed) __syncthreads();
      from.template request<false>(batch, nullptr, begin, count, policy);
      bring<false>(residual + first, ADAPTER, count, rows, nullptr, block, squares);
      __syncthreads();
      from.template stream<false>(batch, block.values, nullptr, count, sums, policy);
      streamed = true;
    }
  };

  // EARLY: the kernel before this one read the residual too, so it is complete although that kernel may not be. Weights
  // are written by no kernel in flight: which rows are read is known before x is, where all are.
  if (EARLY) adapt();
  weight.template request<false>(batch, nullptr, begin, THRESHOLD ? AHEAD : min(PART, CHANNELS), policy);
  wait_for_producer();
  float added = 0.f;  // to this thread's output; read now, so that it is there when it is needed
  const int output = rank * OUTPUTS + t / FOLD, out_row = output / OUT_TILE;
  const int out = blockIdx.x / SPLIT * OUT_TILE + output % OUT_TILE;
  if (RESIDUAL && ONE_EACH && out_row < rows && out < OUT_COLUMNS)
    added = widen(__ldcg(residual + (u64)out_row * OUT_COLUMNS + out));

  for (int first = 0; first < CHANNELS; first += PART) {
    const int count = min(PART, CHANNELS - first);
    const u16* gains = GAIN ? gain + first : nullptr;
    const auto from = weight.behind(first);
    if (streamed) __syncthreads();
    if (THRESHOLD) {
      const int ahead = first ? 0 : AHEAD, kept = choose(x + first, count, ahead, rows, gains, eps, threshold, block) - ahead;
      if (!first) weight.add(batch, block.values, begin, AHEAD, sums);
      from.template request<true>(batch, block.list + ahead, begin, kept, policy);
      from.template stream<true>(batch, block.values + ahead, block.list + ahead, kept, sums, policy);
    } else {
      if (first) from.template request<false>(batch, nullptr, begin, count, policy);
      bring<true>(x + first, CHANNELS, count, rows, gains, block, squares);
      if (NORM && first + PART >= CHANNELS) share_squares(squares, block);
      __syncthreads();
      from.template stream<false>(batch, block.values, nullptr, count, sums, policy);
    }
    streamed = true;
  }
  if (!EARLY) adapt();

  // Sum over the warps that share columns, and over the cluster.
  weight.settle(sums);
  if (reads && warp < ACROSS * DEEP) {
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = lane % 4 * 2 + (i & 1);
        if (row < ROWS) partial[(warp / ACROSS * ROWS + row) * PARTIAL_ROW + local + 2 * m + (i >> 1)] = sums.tile[m][i];
      }
  }
  if (NORM && warp < ROWS) {
    const float scale = norm_of(warp, eps, block);
    if (lane == 0) block.scales[warp] = scale;
  }
  cluster_barrier();
  for (int i = t / FOLD; i < (OUTPUTS + 31) / 32 * 32; i += THREADS / FOLD) {  // whole warps, for the shuffles
    const int row = (rank * OUTPUTS + i) / OUT_TILE, at = (rank * OUTPUTS + i) % OUT_TILE;
    const int to = blockIdx.x / SPLIT * OUT_TILE + at;
    float total[2] = {0.f, 0.f};
    for (int part = t % FOLD; part < APART && i < OUTPUTS; part += FOLD) {
      const float* from = partial + (part / SPLIT * ROWS + row) * PARTIAL_ROW + at;
      total[0] += of_block(from, part % SPLIT);
      if (GATE) total[1] += of_block(from + OUT_TILE, part % SPLIT);
    }
#pragma unroll
    for (int o = FOLD / 2; o; o >>= 1)
#pragma unroll
      for (int half = 0; half <= (GATE ? 1 : 0); half++) total[half] += __shfl_xor_sync(~0u, total[half], o);
    if (t % FOLD || SPLIT > 1 && i >= OUTPUTS || row >= rows || to >= OUT_COLUMNS) continue;
    const float scale = NORM ? block.scales[row] : 1.f;
#pragma unroll
    for (int half = 0; half <= (GATE ? 1 : 0); half++) {
      total[half] *= scale;
      if (BIAS) total[half] += widen(__ldg(bias + to + half * OUT_COLUMNS));
    }
    if (GATE) total[0] = gated(total[0], total[1]);
    if (RESIDUAL) total[0] += ONE_EACH ? added : widen(__ldcg(residual + (u64)row * OUT_COLUMNS + to));
    y[(u64)row * OUT_COLUMNS + to] = narrow(total[0]);
  }
  if (SPLIT > 1) cluster_barrier();  // the others may still be reading this block's sums
}
