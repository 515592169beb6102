// ``sparse_linear`` for a few rows: a whole sparse site in one launch, each weight row read once for all of them. See
// larosa_fx.kernels.ops for what it computes, and sparse_linear.cu for one row.
//
// A block owns a tile of output columns. It lists the channels that any row keeps, with a value for each row that is zero
// where the row drops the channel, and multiplies by tensor cores: 16 listed channels and 16 columns at a time, for 8 rows.
// The order in which channels are added is any, since they are listed: a thread brings four neighbours of the list, and
// pairs of 16-bit weights out of two rows are what the tensor cores take. Nothing is summed across blocks.
//
// Where the values of all channels have no room in shared memory, they are brought in parts.
//
// Compiled at run time with these constants: CHANNELS (K), COLUMNS (N of the weight), ADAPTER (rows of the residual
// adapter), ROWS (the most rows of x: 2, 4 or 8), PART (channels brought at a time, a multiple of 16), TILE (columns of
// weight a block reads, a multiple of 16), WIDTH (of them a thread's, 4 or 8), THREADS, BATCH (times 16 rows of weight a
// warp has in flight), HALF (1 fp16, 0 bf16), GATE (0 none, 1 silu, 2 gelu, 3 gelu_tanh, 4 relu), SHARED (bytes of shared
// memory) and the flags NORM, BIAS, RESIDUAL, EARLY, GAIN and THRESHOLD (every channel is kept without).

#include "selection.cuh"

constexpr int OUT_COLUMNS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int OUT_TILE = GATE ? TILE / 2 : TILE;
constexpr int PAIRS = WIDTH / 2;                    // words of a row that a thread reads, and tiles of 16 columns of a warp
constexpr int ACROSS = (TILE / WIDTH + 7) / 8;      // warps side by side
constexpr int DEEP = WARPS / ACROSS;                // warps that share the rows of their columns
constexpr int STRIDE = (PART + 63) / 64 * 64 + 16;  // between the values of two rows: eight threads meet other banks
constexpr int HELD = (PART + 4 * THREADS - 1) / (4 * THREADS) * 4;  // consecutive channels that a thread ranks
constexpr int EIGHTH = (PART < CHANNELS ? PART : CHANNELS) / 8 / 16 * 16;
constexpr int AHEAD = 16 * DEEP * BATCH < EIGHTH ? 16 * DEEP * BATCH : EIGHTH;  // see ``choose``
constexpr int OUTPUTS = ROWS * OUT_TILE;
constexpr int FOLD = fold(THREADS / OUTPUTS < DEEP ? THREADS / OUTPUTS : DEEP);  // threads that add up an output
constexpr bool ONE_EACH = OUTPUTS * FOLD <= THREADS;                             // no thread adds up a second one

// Shared memory: values of each row | list | partial sums | sums of squares | norms | scan.
constexpr int PARTIAL_ROW = TILE + 4;
constexpr int LIST_AT = ROWS * STRIDE * 2, PARTIAL_AT = LIST_AT + (THRESHOLD ? (PART + 16) * 2 : 0);
constexpr int SQUARES_AT = PARTIAL_AT + DEEP * ROWS * PARTIAL_ROW * 4, SCALES_AT = SQUARES_AT + ROWS * WARPS * 4;
constexpr int SCAN_AT = SCALES_AT + ROWS * 4;

static_assert(SCAN_AT + WARPS * 4 <= SHARED, "the host's layout is not this one");
static_assert(TILE % 16 == 0 && OUT_TILE % WIDTH == 0 && ACROSS <= WARPS, "a thread's columns lie side by side");
static_assert(!THRESHOLD || HELD <= 32, "a thread has a bit for each channel that it ranks");
static_assert(!(NORM && THRESHOLD) || PART >= CHANNELS, "a threshold is compared with what the whole row's norm makes of x");

struct Block {
  u16* values;   // [ROWS, STRIDE]
  u16* list;     // channels of the part, ascending
  float* squares;  // [ROWS, WARPS], of x itself, without the gain
  float* scales;   // [ROWS]
  u32* scan;       // [WARPS]
};

__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  if (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

// A thread's columns of a weight row, read once: past L1, and first to leave L2.
struct Pack {
  u32 word[PAIRS];
  __device__ __forceinline__ void load(const u16* address, u64 policy) {
    if constexpr (PAIRS == 4)
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(address), "l"(policy));
    else
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                   : "=r"(word[0]), "=r"(word[1]) : "l"(address), "l"(policy));
  }
};

// What a warp has in flight: of BATCH times 16 rows of weight a thread's columns of four each.
using Batch = Pack[BATCH][4];

__device__ __forceinline__ int steps_of(int count) { return threadIdx.x / 32 < ACROSS * DEEP ? (count + 15) / 16 : 0; }

// Asks for a batch from step ``first`` on: of the rows that are listed, or of all ``count``. Behind the last row one that is
// there is read once more; its values are zero.
template <bool LISTED>
__device__ __forceinline__ void request(Batch& batch, const u16* weight, const u16* list, int first, int count,
                                        u64 policy) {
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const int step = first + b * DEEP, at = step * 16 + threadIdx.x % 4 * 4;
    if (step >= steps_of(count)) break;
    u32 rows[4];
    if (LISTED) {
      const uint2 listed = *reinterpret_cast<const uint2*>(list + at);
      rows[0] = listed.x & 0xffff, rows[1] = listed.x >> 16, rows[2] = listed.y & 0xffff, rows[3] = listed.y >> 16;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) rows[i] = min(at + i, count - 1);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) batch[b][i].load(weight + (u64)rows[i] * COLUMNS, policy);
  }
}

// Multiplies a batch by the values in the block.
__device__ __forceinline__ void add(const Batch& batch, const u16* values, int first, int count,
                                    float (&sum)[PAIRS][4]) {
  const int row = threadIdx.x % 32 / 4;
#pragma unroll
  for (int b = 0; b < BATCH; b++) {
    const int step = first + b * DEEP;
    if (step >= steps_of(count)) break;
    uint2 value = make_uint2(0, 0);
    if (row < ROWS) value = *reinterpret_cast<const uint2*>(values + row * STRIDE + step * 16 + threadIdx.x % 4 * 4);
    const Pack(&p)[4] = batch[b];
#pragma unroll
    for (int m = 0; m < PAIRS; m++) {
      const u32 low[2] = {__byte_perm(p[0].word[m], p[1].word[m], 0x5410), __byte_perm(p[2].word[m], p[3].word[m], 0x5410)};
      const u32 high[2] = {__byte_perm(p[0].word[m], p[1].word[m], 0x7632), __byte_perm(p[2].word[m], p[3].word[m], 0x7632)};
      multiply(sum[m], low[0], high[0], low[1], high[1], value);
    }
  }
}

// Adds the products of ``count`` rows with the values. ``batch``: the first, asked for already.
template <bool LISTED>
__device__ __forceinline__ void stream(Batch& batch, const u16* weight, const u16* values, const u16* list, int count,
                                       float (&sum)[PAIRS][4], u64 policy) {
  for (int first = threadIdx.x / 32 / ACROSS; first < steps_of(count); first += DEEP * BATCH) {
    add(batch, values, first, count, sum);
    request<LISTED>(batch, weight, list, first + DEEP * BATCH, count, policy);
  }
}

__device__ __forceinline__ u32 gained(u32 pair, u32 gains) {
  return narrow(widen(pair & 0xffff) * widen(gains & 0xffff)) | (u32)narrow(widen(pair >> 16) * widen(gains >> 16)) << 16;
}

__device__ __forceinline__ float squared(u32 pair, float sum) {
  const float a = widen(pair & 0xffff), b = widen(pair >> 16);
  return fmaf(b, b, fmaf(a, a, sum));
}

// Brings ``count`` channels of each row of ``from``, [rows, width], to the block, zeros behind them. OF_X: times the gain,
// if there is one, and the squares are added up for the norm.
template <bool OF_X>
__device__ __forceinline__ void bring(const u16* from, int width, int count, int rows, const u16* gain, const Block& block,
                                      float (&squares)[ROWS]) {
  for (int q = threadIdx.x; q < (count + 15) / 16 * 4; q += THREADS) {
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
  const int upper = GATE && local >= OUT_TILE, column = blockIdx.x * OUT_TILE + local - upper * OUT_TILE;
  return local < TILE && column < OUT_COLUMNS ? column + upper * OUT_COLUMNS : COLUMNS;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_rows(const u16* __restrict__ x, const u16* __restrict__ weight, const u16* __restrict__ bias,
            const u16* __restrict__ residual, const u16* __restrict__ gain, u16* __restrict__ y, int rows, float eps,
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
  const int beside = column_of(warp % ACROSS * 8 * WIDTH);
  const u16* mine = weight + (reads ? column_of(local) : beside < COLUMNS ? beside : 0);
  float sum[PAIRS][4] = {}, squares[ROWS] = {};
  bool streamed = false;  // the block's values are in use until a barrier
  Batch batch;
  const int begin = warp / ACROSS;  // this warp's first step

  const auto adapt = [&] {
    for (int first = 0; first < ADAPTER; first += PART) {
      const int count = min(PART, ADAPTER - first);
      const u16* from = mine + (u64)(CHANNELS + first) * COLUMNS;
      if (streamed) __syncthreads();
      request<false>(batch, from, nullptr, begin, count, policy);
      bring<false>(residual + first, ADAPTER, count, rows, nullptr, block, squares);
      __syncthreads();
      stream<false>(batch, from, block.values, nullptr, count, sum, policy);
      streamed = true;
    }
  };

  // EARLY: the kernel before this one read the residual too, so it is complete although that kernel may not be. Weights
  // are written by no kernel in flight: which rows are read is known before x is, where all are.
  if (EARLY) adapt();
  request<false>(batch, mine, nullptr, begin, THRESHOLD ? AHEAD : min(PART, CHANNELS), policy);
  wait_for_producer();
  float added = 0.f;  // to this thread's output; read now, so that it is there when it is needed
  const int output = t / FOLD, out_row = output / OUT_TILE, out = blockIdx.x * OUT_TILE + output % OUT_TILE;
  if (RESIDUAL && ONE_EACH && out_row < rows && out < OUT_COLUMNS)
    added = widen(__ldcg(residual + (u64)out_row * OUT_COLUMNS + out));

  for (int first = 0; first < CHANNELS; first += PART) {
    const int count = min(PART, CHANNELS - first);
    const u16 *gains = GAIN ? gain + first : nullptr, *from = mine + (u64)first * COLUMNS;
    if (streamed) __syncthreads();
    if (THRESHOLD) {
      const int ahead = first ? 0 : AHEAD, kept = choose(x + first, count, ahead, rows, gains, eps, threshold, block) - ahead;
      if (!first) add(batch, block.values, begin, AHEAD, sum);
      request<true>(batch, from, block.list + ahead, begin, kept, policy);
      stream<true>(batch, from, block.values + ahead, block.list + ahead, kept, sum, policy);
    } else {
      if (first) request<false>(batch, from, nullptr, begin, count, policy);
      bring<true>(x + first, CHANNELS, count, rows, gains, block, squares);
      if (NORM && first + PART >= CHANNELS) share_squares(squares, block);
      __syncthreads();
      stream<false>(batch, from, block.values, nullptr, count, sum, policy);
    }
    streamed = true;
  }
  if (!EARLY) adapt();

  // Sum over the warps that share columns.
  if (reads && warp < ACROSS * DEEP) {
#pragma unroll
    for (int m = 0; m < PAIRS; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = lane % 4 * 2 + (i & 1);
        if (row < ROWS) partial[(warp / ACROSS * ROWS + row) * PARTIAL_ROW + local + 2 * m + (i >> 1)] = sum[m][i];
      }
  }
  if (NORM && warp < ROWS) {
    const float scale = norm_of(warp, eps, block);
    if (lane == 0) block.scales[warp] = scale;
  }
  __syncthreads();
  for (int i = t / FOLD; i < (OUTPUTS + 31) / 32 * 32; i += THREADS / FOLD) {  // whole warps, for the shuffles
    const int row = i / OUT_TILE, at = i % OUT_TILE, to = blockIdx.x * OUT_TILE + at;
    float total[2] = {0.f, 0.f};
    for (int part = t % FOLD; part < DEEP && i < OUTPUTS; part += FOLD) {
      const float* from = partial + (part * ROWS + row) * PARTIAL_ROW + at;
      total[0] += from[0];
      if (GATE) total[1] += from[OUT_TILE];
    }
#pragma unroll
    for (int o = FOLD / 2; o; o >>= 1)
#pragma unroll
      for (int half = 0; half <= (GATE ? 1 : 0); half++) total[half] += __shfl_xor_sync(~0u, total[half], o);
    if (t % FOLD || row >= rows || to >= OUT_COLUMNS) continue;
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
}
