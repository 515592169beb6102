// ``sparse_linear`` for one row: a whole sparse site in one launch. See larosa_fx.kernels.ops for what it computes.
//
// A block owns a tile of output columns and every active row of it, so nothing is summed across blocks: no atomics on
// results, no scratch, equal inputs give equal bits. Each block finds the Top-K itself (K is some thousands: cheaper than
// a launch), or what reaches the threshold, compacts it to a list in shared memory, and streams the listed rows of its tile.
//
// Compiled at run time with these constants: CHANNELS (K), COLUMNS (N of the weight), ADAPTER (rows of the residual
// adapter), TILE (columns of weight a block reads, a multiple of 16), THREADS, BATCH (rows a thread has in flight),
// HALF (1 fp16, 0 bf16), GATE (0 none, 1 silu, 2 gelu, 3 gelu_tanh, 4 relu), SHARED (bytes of shared memory) and the
// flags FULL (every channel is kept: nothing to select), NORM, BIAS, RESIDUAL, EARLY, GAIN and THRESHOLD (not Top-K).

#include "selection.cuh"

constexpr int OUT_COLUMNS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int OUT_TILE = GATE ? TILE / 2 : TILE;
constexpr int LANES = TILE / 8;                                         // threads that read a row, 16 bytes each
constexpr int GROUPS = THREADS / LANES;                                 // rows read side by side
constexpr int FOLD = fold(THREADS / OUT_TILE);  // neighbouring threads that add up an output, a power of two
static_assert(!RESIDUAL || OUT_TILE * FOLD <= THREADS, "a thread adds one residual");

// Shared memory: histogram (for Top-K) | list | partial sums | residual | scalars.
constexpr int PARTIAL_ROW = TILE + 4;  // lanes that add up a column meet other banks
constexpr int HISTOGRAM_BYTES = THRESHOLD ? 0 : BINS * 2, PARTIAL_AT = HISTOGRAM_BYTES + CHANNELS * 4;
constexpr int RESIDUAL_AT = PARTIAL_AT + GROUPS * PARTIAL_ROW * 4;

static_assert(RESIDUAL_AT + ADAPTER * 2 + sizeof(Scalars) <= SHARED, "the host's layout is not this one");

// 16 bytes of weight, read once: past L1, and first to leave L2.
struct Pack {
  u32 word[4];
  __device__ __forceinline__ void load(const u16* address, bool wanted, u64 policy) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %6; }"
        : "=&r"(word[0]), "=&r"(word[1]), "=&r"(word[2]), "=&r"(word[3])
        : "l"(address), "r"((u32)wanted), "l"(policy));
  }
};

// Adds up rows of this thread's 8 columns. LISTED: the ``count`` rows of the list, an entry being row << 16 | value;
// else ``count`` rows from the first on, with a value each.
template <bool LISTED>
__device__ __forceinline__ void stream(const u16* weight, const void* rows, int count, bool reads, float (&sum)[8],
                                       u64 policy) {
  for (int first = threadIdx.x / LANES; first < count; first += GROUPS * BATCH) {
    Pack pack[BATCH];
    float value[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = first + b * GROUPS;
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
      pack[b].load(weight + (u64)row * COLUMNS, wanted, policy);
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        sum[2 * q] = fmaf(value[b], widen(pack[b].word[q] & 0xffff), sum[2 * q]);
        sum[2 * q + 1] = fmaf(value[b], widen(pack[b].word[q] >> 16), sum[2 * q + 1]);
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_linear(const u16* __restrict__ x, const u16* __restrict__ weight, const u16* __restrict__ bias,
              const u16* __restrict__ residual, const u16* __restrict__ gain, u16* __restrict__ y, int keep, float eps,
              float threshold) {
  extern __shared__ __align__(16) char memory[];
  u32* histogram = reinterpret_cast<u32*>(memory);
  u32* list = reinterpret_cast<u32*>(memory + HISTOGRAM_BYTES);
  float* partial = reinterpret_cast<float*>(memory + PARTIAL_AT);
  u16* carried = reinterpret_cast<u16*>(memory + RESIDUAL_AT);
  Scalars* scalars = reinterpret_cast<Scalars*>(memory + RESIDUAL_AT + ADAPTER * 2);
  const int t = threadIdx.x, lane = t % LANES;
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));

  // This thread's 8 columns. With a gate the second half of the lanes reads the columns to be gated.
  const int column = GATE ? blockIdx.x * OUT_TILE + lane % (LANES / 2) * 8 : blockIdx.x * OUT_TILE + lane * 8;
  const bool reads = column < OUT_COLUMNS && t < GROUPS * LANES;
  const u16* mine = weight + column + (GATE && lane >= LANES / 2 ? OUT_COLUMNS : 0);
  float sum[8] = {};
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
    if (EARLY) stream<false>(mine + (u64)CHANNELS * COLUMNS, carried, ADAPTER, reads, sum, policy);
  }
  if (EARLY) wait_for_producer();

  float added = 0.f;  // this thread's output; read now, so that it is there when it is needed
  if (RESIDUAL && blockIdx.x * OUT_TILE + t / FOLD < OUT_COLUMNS && t / FOLD < OUT_TILE)
    added = widen(__ldcg(residual + blockIdx.x * OUT_TILE + t / FOLD));
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
    stream<false>(mine, list, CHANNELS, reads, sum, policy);
  } else if (THRESHOLD) {
    if (NORM) squares = block_sum(squares, scalars->squares);
    const float scale = norm_scale(squares, eps);
    const int kept = compact(channels, 0, list, scalars->warp,
                             [=](u32 key) { return widen(key) * scale < threshold ? 0u : 1u; });
    stream<true>(mine, list, kept, reads, sum, policy);
  } else {
    squares = select(channels, squares, keep, histogram, list, scalars);
    stream<true>(mine, list, keep, reads, sum, policy);
  }
  if (ADAPTER && !EARLY) stream<false>(mine + (u64)CHANNELS * COLUMNS, carried, ADAPTER, reads, sum, policy);

  // Sum over the groups of rows: within a warp, then FOLD neighbouring threads to an output.
  constexpr bool IN_WARP = LANES < 32 && (LANES & LANES - 1) == 0;
  constexpr int PARTS = IN_WARP ? WARPS : GROUPS;
  if (IN_WARP)
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int o = 16; o >= LANES; o >>= 1) sum[i] += __shfl_xor_sync(~0u, sum[i], o);
  if (IN_WARP ? (t & 31) < LANES : t < GROUPS * LANES) {
    float4* to = reinterpret_cast<float4*>(partial + (IN_WARP ? t / 32 : t / LANES) * PARTIAL_ROW + lane * 8);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
  __syncthreads();
  for (int i = t / FOLD; i < (OUT_TILE + 31) / 32 * 32; i += THREADS / FOLD) {  // whole warps, for the shuffles
    float total[2] = {0.f, 0.f};
    for (int part = t % FOLD; part < PARTS && i < OUT_TILE; part += FOLD) {
      total[0] += partial[part * PARTIAL_ROW + i];
      if (GATE) total[1] += partial[part * PARTIAL_ROW + OUT_TILE + i];
    }
#pragma unroll
    for (int o = FOLD / 2; o; o >>= 1)
#pragma unroll
      for (int half = 0; half <= (GATE ? 1 : 0); half++) total[half] += __shfl_xor_sync(~0u, total[half], o);
    const int to = blockIdx.x * OUT_TILE + i;
    if (t % FOLD || i >= OUT_TILE || to >= OUT_COLUMNS) continue;
    const float scale = norm_scale(squares, eps);
#pragma unroll
    for (int half = 0; half <= (GATE ? 1 : 0); half++) {
      total[half] *= scale;
      if (BIAS) total[half] += widen(__ldg(bias + to + half * OUT_COLUMNS));
    }
    if (GATE) total[0] = gated(total[0], total[1]);
    if (RESIDUAL) total[0] += added;
    y[to] = narrow(total[0]);
  }
}
