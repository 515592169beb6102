// ``quantized_linear`` for one row: a whole sparse site over 8- or 4-bit weights in one launch. See larosa_fx.kernels.ops.
//
// A row of the weight belongs to one input channel, so its scale multiplies that channel's value, and a row that is not
// listed is not read. Tensor cores multiply what is stored as it is, by integers: a warp takes 32 listed rows at a time, and
// what multiplies a row, value times scale, is a number of 24 bits in three digits to the base 256, which are three of the
// eight columns of an operand. So a weight costs an instruction or less, where a float of each would cost three, and sums are
// exact until they are scaled: equal inputs give equal bits.
//
// The unit of these numbers is a part in 2^23 of the largest of a warp's. The coefficients of at most STEPS times 32 rows are
// made at a time, while the first of their weights are on their way. NaN or infinity in any of them makes all of their sums
// NaN. A coefficient below 1e-30 is a multiple of 1e-37.
//
// The SPLIT blocks of a cluster share a tile. Each has its share of the channels, every SPLIT-th 64 of them, lists those of them
// that are kept and multiplies their rows; a Top-K, which ranks all channels, has one list in all blocks, of which each takes
// its part. The sums meet in the block that finishes their columns, always in the same order.
//
// BESIDE: in the same launch some warps of each block multiply x as it is by a residual adapter, whose result a later site adds.
// An adapter reads all of its rows, so they have work while the channels of the site itself are chosen. Blocks of their own
// would find their places where the kernel before this one ends first, two to a multiprocessor, and leave others with nothing.
//
// Compiled at run time with these constants, besides those of selection.cuh: COLUMNS (N), BITS (8 or 4), GROUP (columns
// that share a scale), ADAPTER (rows of a residual adapter, in 8 bits, for a residual of STREAM values that begins anew behind
// its last), CHOSEN (rows of 8 bits behind these, for channels of x that are named), TILE (columns a cluster reads), WIDTH (of
// them a thread's, 8 or 16), BATCH (times 32 rows a warp has in flight), RESIDENT (blocks that find room on a multiprocessor),
// SPLIT (blocks of a cluster), HELD (whether scales have room in shared memory), SHARED (its bytes), the flags FULL, BIAS,
// RESIDUAL, EARLY and GAIN, as sparse_linear.cu describes them, and WIDE_RESIDUAL (the residual is float32). BESIDE is the
// number of columns of the adapter beside, 0 without, and BESIDE_ROWS of its rows, whose values begin anew behind the last
// channel; BESIDE_TILE, BESIDE_WIDTH and BESIDE_BATCH are to it what TILE, WIDTH and BATCH are to the weight, and BESIDE_WARPS of
// a block's warps, the last ones, are its.
//
// 8 bits: w = s q, q signed. 4 bits: w = s u + m, u = 0..15, two to a byte, the lower column in the lower half; s and m,
// 16 bits each, lie side by side. The scales of all rows for one group of columns lie together, ADAPTER_SPAN of the adapter's: a
// block brings those of its channels to shared memory before x is there. Row by row they would be a line of memory each.

#include "cluster.cuh"
#include "shares.cuh"

constexpr int OUT_COLUMNS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int OUT_TILE = GATE ? TILE / 2 : TILE;
constexpr int STEPS = 8;  // of 32 rows, that coefficients are made for at a time
constexpr int DIGITS = 3;
constexpr int MAIN_BLOCKS = (OUT_COLUMNS + OUT_TILE - 1) / OUT_TILE * SPLIT;

// How COUNT warps of each block of a cluster, from FIRST on, share a tile of COLUMNS_OF_TILE columns, which make OUT outputs:
// ``across`` side by side, ``deep`` in a block for the same columns. A thread has WIDE neighbouring columns.
template <int COLUMNS_OF_TILE, int OUT, int WIDE, int FIRST, int COUNT>
struct Warps {
  static constexpr int width = WIDE, columns = 8 * width, tiles = width / 2;  // a warp's; tiles of 16 columns that it multiplies
  static constexpr int sets = columns > GROUP ? columns / GROUP : 1;          // groups that a warp's columns lie in
  static constexpr int planes = sets * DIGITS;
  static constexpr int across = COLUMNS_OF_TILE / columns, deep = COUNT / across;
  static constexpr int out = OUT, halves = COLUMNS_OF_TILE / OUT;
  static constexpr int outputs = (OUT + 2 * SPLIT - 1) / (2 * SPLIT) * 2;  // that a block finishes, the last one fewer
  static constexpr int parts = deep * SPLIT, part = outputs + 4, partials = parts * halves * part;  // sums that meet in it
  static_assert(COLUMNS_OF_TILE % columns == 0 && across <= COUNT, "a warp's columns lie together");
  static_assert(OUT % columns == 0, "a warp's columns lie in one half");
  static_assert(sets <= 2, "an operand has eight columns");
  static_assert(GROUP % columns == 0 || columns % GROUP == 0, "a thread's columns share their scale");

  // Which of these warps this one is; 0 if it is none of them.
  __device__ __forceinline__ static int warp() { return has() ? threadIdx.x / 32 - FIRST : 0; }
  __device__ __forceinline__ static bool has() {
    return threadIdx.x / 32 >= FIRST && threadIdx.x / 32 < FIRST + across * deep;
  }
};
using Main = Warps<TILE, OUT_TILE, WIDTH, 0, WARPS - BESIDE_WARPS>;
using Beside = Warps<BESIDE_TILE, BESIDE_TILE, BESIDE_WIDTH, WARPS - BESIDE_WARPS, BESIDE ? BESIDE_WARPS : WARPS>;

// Which rows of a weight a block multiplies: those of its own list, its part of a list that all blocks of the cluster have, or
// its share of the first rows.
enum class Rows { OWN_LIST, SHARED_LIST, FIRST };

// A tile's columns lie in so many groups at most, of each half so many: halves begin at multiples of a tile's outputs, the second
// behind the first half of all columns, which need not end where a group does.
constexpr int divisor(int a, int b) { return b ? divisor(b, a % b) : a; }

template <class Place>
constexpr int groups_of() {
  const int start = divisor(divisor(Place::out, Place::halves == 2 ? OUT_COLUMNS : 0), GROUP);
  return (GROUP - start + Place::out - 1) / GROUP + 1;
}

// Rows of which a block holds the scales: all, or its share of the first ``rows``.
template <Rows ROWS>
constexpr int share_of(int rows) {
  constexpr int BLOCKS = ROWS == Rows::SHARED_LIST ? 1 : SPLIT;
  return (rows + 64 * BLOCKS - 1) / (64 * BLOCKS) * 64;
}

// Shared memory: histogram (for Top-K) | list | all channels, as the weight's rows and as the adapter's beside are multiplied by
// them | residual | scales | coefficients | partial sums | chosen rows and values | what is added to the outputs, bias and
// residual | scalars.
constexpr int HISTOGRAM_BYTES = RANKED ? BINS * 2 : 0;
constexpr int LISTED = RANKED ? (CHANNELS + 31) / 32 * 32 : THRESHOLD ? OWN_CHANNELS : 0;
constexpr int COPIED_AT = HISTOGRAM_BYTES + LISTED * 4, COPY = (CHANNELS + 63) / 64 * 128;
constexpr int BESIDE_COPIED_AT = COPIED_AT + (FULL && (GAIN || !BESIDE) ? COPY : 0);
constexpr int RESIDUAL_AT = BESIDE_COPIED_AT + (BESIDE ? COPY : 0);
constexpr int SCALES_AT = RESIDUAL_AT + (ADAPTER ? (STREAM + 7) / 8 * 16 : 0);
constexpr Rows OWN_ROWS = FULL ? Rows::FIRST : THRESHOLD ? Rows::OWN_LIST : Rows::SHARED_LIST;
constexpr int OWN_SCALES = HELD ? groups_of<Main>() * Main::halves * share_of<OWN_ROWS>(CHANNELS) * (BITS == 4 ? 4 : 2) : 0;
constexpr int ADAPTER_SCALES = ADAPTER ? groups_of<Main>() * share_of<Rows::FIRST>(ADAPTER) * 2 : 0;
constexpr int BESIDE_SCALES = BESIDE ? groups_of<Beside>() * share_of<Rows::FIRST>(BESIDE_ROWS) * 2 : 0;
constexpr int BESIDE_SCALES_AT = SCALES_AT + OWN_SCALES + ADAPTER_SCALES, DIGITS_AT = BESIDE_SCALES_AT + BESIDE_SCALES;
constexpr int PLANES = BESIDE && Beside::planes > Main::planes ? Beside::planes : Main::planes;
constexpr int PARTIAL_AT = DIGITS_AT + WARPS * STEPS * PLANES * 32;
constexpr int PARTIAL_BESIDE_AT = PARTIAL_AT + Main::partials * 4;
constexpr int CHOSEN_AT = PARTIAL_BESIDE_AT + (BESIDE ? Beside::partials * 4 : 0);
constexpr int ENDS_AT = CHOSEN_AT + CHOSEN * (Main::outputs + 1) * 4;
constexpr int BIASES = BIAS ? Main::halves : 0, SCALARS_AT = ENDS_AT + (BIASES + RESIDUAL) * Main::outputs * 4;

static_assert(SCALARS_AT + sizeof(Scalars) <= SHARED, "the host's layout is not this one");

// sum += a b, of 16 columns and 32 rows: a is a thread's part of the weights, four rows to a register, b of the digits.
template <bool SIGNED>
__device__ __forceinline__ void multiply(int (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, uint2 b) {
  if (SIGNED)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

// Of four words, each four bytes of a row, the four registers that hold a byte of each row.
__device__ __forceinline__ void transpose(u32 (&out)[4], u32 a, u32 b, u32 c, u32 d) {
  const u32 low = __byte_perm(a, b, 0x5140), next = __byte_perm(c, d, 0x5140);
  const u32 high = __byte_perm(a, b, 0x7362), last = __byte_perm(c, d, 0x7362);
  out[0] = __byte_perm(low, next, 0x5410), out[1] = __byte_perm(low, next, 0x7632);
  out[2] = __byte_perm(high, last, 0x5410), out[3] = __byte_perm(high, last, 0x7632);
}

// Scales that this thread brought are in shared memory; a barrier must follow.
__device__ __forceinline__ void scales_are_there() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// What a thread has of a warp's sums: columns 2 m and 2 m + 1 of its own, m = its place among four neighbours, and 4 more.
template <class Place>
struct Sums {
  float of[Place::tiles / 4][2] = {};
};

// The products of some rows of a weight of WIDE bits with their values, for this thread's columns.
//
// Lists say row << 16 | value, of LENGTH rows at most. Of the first LENGTH rows ``values`` has the values, which begin anew
// after every PERIOD. A row has ROW columns, and the scales of a group of columns lie together, SPAN rows'.
template <int WIDE, int DEPTH, Rows ROWS, int LENGTH, int PERIOD, int ROW, int SPAN, bool IN_BLOCK, class Place>
struct Product {
  static constexpr bool LIST = ROWS != Rows::FIRST;
  static constexpr int SETS = Place::sets, TILES = Place::tiles;
  static constexpr int WORDS = Place::width * WIDE / 32, PER_GROUP = WIDE == 4 ? 2 : 1, APART = Place::deep;
  static constexpr int ROW_BYTES = ROW / 8 * WIDE, SCALE_BYTES = 2 * PER_GROUP, SHARE = share_of<ROWS>(LENGTH);
  static_assert((u64)LENGTH * ROW_BYTES < 1ull << 32, "places in a weight are counted in 32 bits");
  static_assert(SPAN * SCALE_BYTES % 8 == 0, "scales come to shared memory 8 bytes at a time");

  const u8* weight;
  u32 mine;                // bytes of a row before this thread's columns
  const u8* scales[SETS];  // of a group of this warp's columns: IN_BLOCK, those of the rows that the block may multiply
  u8* digits;              // [STEPS, Place::planes, 32], this warp's
  u64 policy;

  u32* list;
  const u16* values;
  int count, steps, begin;  // steps of 32 rows for this block's warps, and the first of this one

  static constexpr int BATCH_WORDS = 8 * WORDS, HELD_WORDS = DEPTH * BATCH_WORDS;  // of a step, of all in flight

  __device__ __forceinline__ void of(u32* rows, const u16* row_values, int rows_count) {
    constexpr int UNIT = ROWS == Rows::FIRST ? 64 : 32, BLOCKS = ROWS == Rows::OWN_LIST ? 1 : SPLIT;
    const int all = (rows_count + UNIT - 1) / UNIT, rank = blockIdx.x % BLOCKS;
    const int units = (all + BLOCKS - 1 - rank) / BLOCKS;
    list = rows, values = row_values, count = rows_count;
    steps = __shfl_sync(~0u, Place::has() ? units * (UNIT / 32) : 0, 0);  // a warp's alike
    begin = __shfl_sync(~0u, Place::warp() / Place::across, 0);
  }

  // Where the 32 rows of a step begin.
  __device__ __forceinline__ int place_of(int step) const {
    const int rank = blockIdx.x % SPLIT;
    if (ROWS == Rows::OWN_LIST) return 32 * step;
    return ROWS == Rows::SHARED_LIST ? 32 * (step * SPLIT + rank) : 64 * (step / 2 * SPLIT + rank) + 32 * (step % 2);
  }

  // Asks for the first weights, which come to ``held``.
  __device__ __forceinline__ void ask(u32* held) { ask(held, begin); }

  // Brings the block the scales of the rows that it may multiply, for ``groups`` groups from one on, to ``to``.
  __device__ __forceinline__ static void bring_scales(u8* to, const u16* from, int group, int groups) {
    constexpr int UNIT = SPAN * SCALE_BYTES % 16 ? 8 : 16, EACH_64 = 64 * SCALE_BYTES / UNIT;  // bytes; units of 64 rows
    constexpr int UNITS = SHARE / 64 * EACH_64, APART_64 = ROWS == Rows::SHARED_LIST ? 1 : SPLIT;
    for (int i = threadIdx.x; i < groups * UNITS; i += THREADS) {
      const int unit = i % UNITS, block = unit / EACH_64 * APART_64 + blockIdx.x % APART_64;
      const int offset = block * 64 * SCALE_BYTES + unit % EACH_64 * UNIT;
      if (offset < LENGTH * SCALE_BYTES && group + i / UNITS < ROW / GROUP) {
        const u8* address = reinterpret_cast<const u8*>(from) + (u64)(group + i / UNITS) * (SPAN * SCALE_BYTES) + offset;
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((u32)__cvta_generic_to_shared(to + i * UNIT)),
                     "l"(address), "n"(UNIT));
      }
    }
  }

  __device__ __forceinline__ void ask(u32* held, int first) {
    if (LIST) {
      const int last = place_of(steps - 1) + (threadIdx.x & 31);  // behind the list rows that are there, for nothing
      if (steps && last >= count) list[last] = 0;
      __syncwarp();
    }
#pragma unroll
    for (int b = 0; b < DEPTH; b++)
      if (first + b * APART < steps) request(held + b * BATCH_WORDS, first + b * APART);
  }

  __device__ __forceinline__ void request(u32* to, int step) const {
    const int place = place_of(step) + threadIdx.x % 4 * 8;
    u32 row[8];
    if (LIST) {
      const uint4 *rows = reinterpret_cast<const uint4*>(list + place), a = rows[0], b = rows[1];
      row[0] = a.x >> 16, row[1] = a.y >> 16, row[2] = a.z >> 16, row[3] = a.w >> 16;
      row[4] = b.x >> 16, row[5] = b.y >> 16, row[6] = b.z >> 16, row[7] = b.w >> 16;
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) row[i] = min(place + i, count - 1);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) load_once<WORDS>(to + i * WORDS, weight + (row[i] * (u32)ROW_BYTES + mine), policy);
  }

  // Adds the products of all rows to the warp's sums. ``ask`` has been called for the first of them.
  __device__ __forceinline__ void add(Sums<Place>& sums, u32* held) {
    for (int first = begin; first < steps; first += STEPS * APART) {
      if (first > begin) ask(held, first);
      int sum[TILES][4] = {};
      float unit[SETS], offset[SETS];
      make_digits(first, unit, offset);
#pragma unroll 1
      for (int i = 0; i < STEPS; i += DEPTH) {
        if (first + i * APART >= steps) break;
#pragma unroll
        for (int b = 0; b < DEPTH; b++) {
          const int step = first + (i + b) * APART, next = step + DEPTH * APART;
          if (i + b >= STEPS || step >= steps) break;
          multiply_rows(sum, held + b * BATCH_WORDS, i + b);
          if (i + b + DEPTH < STEPS && next < steps) request(held + b * BATCH_WORDS, next);
        }
      }
      settle(sums, sum, unit, offset);
    }
  }

  // The coefficients of the rows of STEPS steps, in digits; the unit that they are multiples of, for each group, and what the
  // rows add to all columns of it alike.
  __device__ __forceinline__ void make_digits(int first, float (&unit)[SETS], float (&offset)[SETS]) {
    u32 scale[STEPS][SETS];
    constexpr float LARGEST = 0x7f7f00;  // balanced digits can say 0x7f7f7f; the rest is for the rounding of a quotient
    u32 top[SETS] = {};
    __syncwarp();  // no thread reads the digits before these any more
#pragma unroll
    for (int g = 0; g < SETS; g++) offset[g] = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const int step = first + i * APART, place = place_of(step) + (threadIdx.x & 31);
      if (step >= steps) break;
      const u32 entry = place >= count ? 0u : LIST ? list[place] : values[place % PERIOD], bits = entry & 0xffff;
      const int row = LIST ? entry >> 16 : min(place, count - 1);
      const int at = !IN_BLOCK || ROWS == Rows::SHARED_LIST ? row : row / (64 * SPLIT) * 64 + row % 64;
#pragma unroll
      for (int g = 0; g < SETS; g++) {
        const u32 pair = WIDE == 4 ? reinterpret_cast<const u32*>(scales[g])[at] : reinterpret_cast<const u16*>(scales[g])[at];
        const float c = bits ? widen(bits) * widen(pair & 0xffff) : 0.f;  // behind the last row is anything
        if (WIDE == 4 && bits) offset[g] = fmaf(widen(bits), widen(pair >> 16), offset[g]);
        scale[i][g] = __float_as_uint(c);
        top[g] = max(top[g], scale[i][g] & 0x7fffffff);
      }
    }
    float inverse[SETS];
#pragma unroll
    for (int g = 0; g < SETS; g++) {
      const u32 all = __reduce_max_sync(~0u, top[g]);
      const float largest = fmaxf(__uint_as_float(all), 1e-30f);
      unit[g] = all < 0x7f800000 ? largest / LARGEST : __uint_as_float(0x7fffffff);
      inverse[g] = LARGEST / largest;
      if (WIDE == 4) offset[g] = warp_sum(offset[g]);
    }
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      if (first + i * APART >= steps) break;
#pragma unroll
      for (int g = 0; g < SETS; g++) {
        const u32 number = __float2int_rn(__uint_as_float(scale[i][g]) * inverse[g]) + 0x808080 ^ 0x808080;
        u8* to = digits + (i * Place::planes + g * DIGITS) * 32 + (threadIdx.x & 31);
        to[0] = number, to[32] = number >> 8, to[64] = number >> 16;
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply_rows(int (&sum)[TILES][4], const u32* rows, int step) const {
    const int lane = threadIdx.x & 31, plane = min(lane / 4, Place::planes - 1);  // columns without a digit are not looked at
    const uint2 b = *reinterpret_cast<const uint2*>(digits + (step * Place::planes + plane) * 32 + lane % 4 * 8);
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      u32 front[4], back[4];
      transpose(front, rows[w], rows[WORDS + w], rows[2 * WORDS + w], rows[3 * WORDS + w]);
      transpose(back, rows[4 * WORDS + w], rows[5 * WORDS + w], rows[6 * WORDS + w], rows[7 * WORDS + w]);
      if constexpr (WIDE == 8) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          multiply<true>(sum[2 * w + i], front[2 * i], front[2 * i + 1], back[2 * i], back[2 * i + 1], b);
      } else {  // of two nibbles both together, and the upper one where it is, 16 times what it counts
#pragma unroll
        for (int i = 0; i < 4; i++)
          multiply<false>(sum[4 * w + i], front[i], front[i] & 0xf0f0f0f0, back[i], back[i] & 0xf0f0f0f0, b);
      }
    }
  }

  // Adds up the digits' sums, of which four threads have two columns each. Where a warp's columns lie in two groups, those of
  // the upper threads have the second three columns of the operand.
  __device__ __forceinline__ void settle(Sums<Place>& sums, const int (&sum)[TILES][4], const float (&unit)[SETS],
                                         const float (&offset)[SETS]) const {
    const int lane = threadIdx.x & 31, mine = lane % 4, set = SETS == 1 ? 0 : lane / 16;
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int digit = 2 * mine + i - set * DIGITS;
      weight[i] = (digit == 0 ? 1.f : digit == 1 ? 256.f : digit == 2 ? 65536.f : 0.f) * unit[SETS == 1 ? 0 : set];
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const bool lower = WIDE == 4 && half == 0;
        float total = (float)(sum[m][2 * half] - (lower ? sum[m][2] : 0)) * weight[0] +
                      (float)(sum[m][2 * half + 1] - (lower ? sum[m][3] : 0)) * weight[1];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (WIDE == 4) total = fmaf(total, half ? .0625f : 1.f, offset[SETS == 1 ? 0 : set]);
        if (m % 4 == mine) sums.of[m / 4][half] += total;
      }
  }
};

// This thread's columns of a tile, and what it takes to read them.
template <class Place>
struct Columns {
  static constexpr int GROUPS = groups_of<Place>(), SETS = Place::sets;
  int column;                      // of the weight, this thread's first
  int group[SETS];                 // of the tile's, this warp's
  int first_group[Place::halves];  // of the weight, that the tile's begin with

  // ``of``: the weight's column of one of the tile's, or -1. Threads that have none read their warp's first, and warps that
  // have none the weight's, for nothing.
  template <class Of>
  __device__ __forceinline__ explicit Columns(Of of) {
    const int start = Place::warp() % Place::across * Place::columns, local = start + threadIdx.x % 32 / 4 * Place::width;
    const int first = max(of(start), 0), half = start / Place::out;
    column = of(local) < 0 ? first : of(local);
#pragma unroll
    for (int h = 0; h < Place::halves; h++) first_group[h] = of(h * Place::out) / GROUP;
#pragma unroll
    for (int g = 0; g < SETS; g++) {
      const int there = of(start + g * GROUP) < 0 ? first : of(start + g * GROUP);
      group[g] = of(start) < 0 ? 0 : half * GROUPS + there / GROUP - of(half * Place::out) / GROUP;
    }
  }

  // Of rows of a weight; ``scales`` are brought to ``table``, if it has room for them.
  template <int WIDE, int DEPTH, Rows ROWS, int LENGTH, int PERIOD, int ROW, int SPAN, bool IN_BLOCK = true>
  __device__ __forceinline__ auto product(char* memory, const u8* weight, const u16* scales, u8* table, u64 policy) const {
    using P = Product<WIDE, DEPTH, ROWS, LENGTH, PERIOD, ROW, SPAN, IN_BLOCK, Place>;
    constexpr int BYTES = P::SHARE * P::SCALE_BYTES;
#pragma unroll
    for (int h = 0; IN_BLOCK && h < Place::halves; h++)
      P::bring_scales(table + h * GROUPS * BYTES, scales, first_group[h], GROUPS);
    P p;
    p.weight = weight, p.mine = column / 8 * WIDE, p.policy = policy;
    p.digits = reinterpret_cast<u8*>(memory + DIGITS_AT) + threadIdx.x / 32 * (STEPS * PLANES * 32);
#pragma unroll
    for (int g = 0; g < SETS; g++)
      p.scales[g] = IN_BLOCK ? table + group[g] * BYTES
                             : reinterpret_cast<const u8*>(scales) +
                                   (u64)(first_group[group[g] / GROUPS] + group[g] % GROUPS) * (SPAN * P::SCALE_BYTES);
    return p;
  }
};

// The sums of a tile meet in the block that finishes their outputs, in ``partial``: each warp brings its own there. A barrier of
// the cluster must follow.
template <class Place>
__device__ __forceinline__ void bring(float* partial, const Sums<Place>& sums) {
  const int warp = Place::warp(), lane = threadIdx.x & 31;
  if (Place::has())
#pragma unroll
    for (int i = 0; i < Place::tiles / 4; i++) {
      const int local = warp % Place::across * Place::columns + lane / 4 * Place::width + 2 * (lane % 4 + 4 * i);
      const int half = local / Place::out, at = local % Place::out, part = warp / Place::across * SPLIT + blockIdx.x % SPLIT;
      to_block(partial + (part * Place::halves + half) * Place::part + at % Place::outputs, at / Place::outputs,
               sums.of[i][0], sums.of[i][1]);
    }
}

// Adds up what was brought, always in one order, and calls finish(number of the output among this block's, its sum, that of its
// second half).
template <class Place, class Finish>
__device__ __forceinline__ void add_up(const float* partial, Finish finish) {
  constexpr int FOLD = fold(THREADS / Place::outputs < Place::parts ? THREADS / Place::outputs : Place::parts);
  for (int i = threadIdx.x / FOLD; i < (Place::outputs + 31) / 32 * 32; i += THREADS / FOLD) {  // whole warps: they shuffle
    float total[2] = {0.f, 0.f};
    for (int part = threadIdx.x % FOLD; part < Place::parts && i < Place::outputs; part += FOLD)
#pragma unroll
      for (int half = 0; half < Place::halves; half++)
        total[half] += partial[(part * Place::halves + half) * Place::part + i];
#pragma unroll
    for (int o = FOLD / 2; o; o >>= 1)
#pragma unroll
      for (int half = 0; half < Place::halves; half++) total[half] += __shfl_xor_sync(~0u, total[half], o);
    if (threadIdx.x % FOLD == 0 && i < Place::outputs && (int)blockIdx.x % SPLIT * Place::outputs + i < Place::out)
      finish(i, total[0], total[1]);
  }
}

// The adapter beside, of COLUMNS columns: what its warps and the whole block have to do with it.
template <int COLUMNS_BESIDE>
struct AdapterBeside {
  Sums<Beside> sums;
  Product<8, BESIDE_BATCH, Rows::FIRST, BESIDE_ROWS, CHANNELS, COLUMNS_BESIDE, ADAPTER_SPAN, true, Beside> product;
  static constexpr int HELD_WORDS = decltype(product)::HELD_WORDS;

  __device__ __forceinline__ static int column_of(int local) {
    const int column = blockIdx.x / SPLIT * BESIDE_TILE + local;
    return column < COLUMNS_BESIDE ? column : -1;
  }

  // Asks for the first weights: what they are multiplied by, all channels, will lie at BESIDE_COPIED_AT.
  __device__ __forceinline__ AdapterBeside(char* memory, const u8* adapter, const u16* scales, u64 policy, u32* held)
      : product(Columns<Beside>(column_of).template product<8, BESIDE_BATCH, Rows::FIRST, BESIDE_ROWS, CHANNELS, COLUMNS_BESIDE,
                                                           ADAPTER_SPAN>(
            memory, adapter, scales, reinterpret_cast<u8*>(memory + BESIDE_SCALES_AT), policy)) {
    const bool has = (int)blockIdx.x < (COLUMNS_BESIDE + BESIDE_TILE - 1) / BESIDE_TILE * SPLIT;
    product.of(nullptr, reinterpret_cast<const u16*>(memory + BESIDE_COPIED_AT), has ? BESIDE_ROWS : 0);
    product.ask(held);
  }

  __device__ __forceinline__ void add(u32* held) { product.add(sums, held); }

  __device__ __forceinline__ void bring_sums(char* memory) const {
    bring<Beside>(reinterpret_cast<float*>(memory + PARTIAL_BESIDE_AT), sums);
  }

  __device__ __forceinline__ void finish(const char* memory, float* result) const {
    add_up<Beside>(reinterpret_cast<const float*>(memory + PARTIAL_BESIDE_AT), [=](int i, float total, float) {
      const int to = column_of(blockIdx.x % SPLIT * Beside::outputs + i);
      if (to >= 0) result[to] = total;
    });
  }
};

template <>
struct AdapterBeside<0> {
  static constexpr int HELD_WORDS = 0;

  __device__ __forceinline__ AdapterBeside(char*, const u8*, const u16*, u64, u32*) {}
  __device__ __forceinline__ void add(u32*) {}
  __device__ __forceinline__ void bring_sums(char*) const {}
  __device__ __forceinline__ void finish(const char*, float*) const {}
};

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, RESIDENT)
quantized_linear(const u16* __restrict__ x, const u8* __restrict__ weight, const u16* __restrict__ scales,
                 const u8* __restrict__ adapter, const u16* __restrict__ adapter_scales, const u16* __restrict__ bias,
                 const void* __restrict__ residual, const u16* __restrict__ gain, const long long* __restrict__ chosen,
                 u16* __restrict__ y, float* __restrict__ result_beside, int keep, float eps, float threshold) {
  constexpr int OUTPUTS = Main::outputs;
  extern __shared__ __align__(16) char memory[];
  u32* histogram = reinterpret_cast<u32*>(memory);
  u32* list = reinterpret_cast<u32*>(memory + HISTOGRAM_BYTES);
  u16* copied = reinterpret_cast<u16*>(memory + COPIED_AT);
  u16* carried = reinterpret_cast<u16*>(memory + RESIDUAL_AT);
  float *beside = reinterpret_cast<float*>(memory + CHOSEN_AT), *named = beside + CHOSEN * OUTPUTS;
  float *biases = reinterpret_cast<float*>(memory + ENDS_AT), *residuals = biases + BIASES * OUTPUTS;
  Scalars* scalars = reinterpret_cast<Scalars*>(memory + SCALARS_AT);
  const int t = threadIdx.x, tile = blockIdx.x / SPLIT * OUT_TILE;
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  cluster_arrive();
  const bool has_own = !BESIDE || blockIdx.x < MAIN_BLOCKS;

  // With a gate the second half of the tile's columns are those to be gated.
  const auto column_of = [=](int local) {
    const int upper = GATE && local >= OUT_TILE, column = tile + local - upper * OUT_TILE;
    return local < TILE && column < OUT_COLUMNS ? column + upper * OUT_COLUMNS : -1;
  };
  const Columns<Main> mine(column_of);
  u8* table = reinterpret_cast<u8*>(memory + SCALES_AT);
  Sums<Main> sums;
  auto own = mine.template product<BITS, BATCH, OWN_ROWS, CHANNELS, CHANNELS, COLUMNS, CHANNELS, HELD>(
      memory, weight, scales, table, policy);
  // A warp multiplies by one of the two, and both have these registers for what is in flight.
  constexpr int OWN_WORDS = decltype(own)::HELD_WORDS, FURTHER_WORDS = AdapterBeside<BESIDE>::HELD_WORDS;
  u32 in_flight[OWN_WORDS > FURTHER_WORDS ? OWN_WORDS : FURTHER_WORDS];
  AdapterBeside<BESIDE> further(memory, adapter, adapter_scales, policy, in_flight);
  for (int i = t; RANKED && i < HISTOGRAM_BYTES / 16; i += THREADS)
    reinterpret_cast<uint4*>(histogram)[i] = make_uint4(0, 0, 0, 0);
  Row gains;
  if (GAIN) gains.fetch(gain);  // before the wait: a weight, which no kernel in flight writes
  const u64 of = CHOSEN && t < CHOSEN ? chosen[t] : 0;
  const int first_output = blockIdx.x % SPLIT * OUTPUTS;
  for (int i = t; i < BIASES * OUTPUTS; i += THREADS) {
    const int to = tile + first_output + i % OUTPUTS;
    biases[i] = to < OUT_COLUMNS ? widen(__ldg(bias + to + i / OUTPUTS * OUT_COLUMNS)) : 0.f;
  }
  for (int i = t; i < CHOSEN * OUTPUTS; i += THREADS) {
    const int row = ADAPTER + i / OUTPUTS, to = column_of(first_output + i % OUTPUTS);
    beside[i] = to < 0 ? 0.f : widen(__ldg(adapter_scales + (u64)(to / GROUP) * ADAPTER_SPAN + row)) *
                                   (signed char)__ldg(adapter + (u64)row * COLUMNS + to);
  }

  // EARLY: the kernel before this one read the residual too, so it is complete although that kernel may not be.
  if (!EARLY) wait_for_producer();
  if constexpr (ADAPTER > 0) {
    for (int i = t; i < STREAM / 8; i += THREADS)
      reinterpret_cast<uint4*>(carried)[i] = __ldcg(static_cast<const uint4*>(residual) + i);
    constexpr int DEPTH = BATCH * BITS / 8 ? BATCH * BITS / 8 : 1;
    auto added = mine.template product<8, DEPTH, Rows::FIRST, ADAPTER, STREAM, COLUMNS, ADAPTER_SPAN>(
        memory, adapter, adapter_scales, table + OWN_SCALES, policy);
    added.of(nullptr, carried, ADAPTER);
    u32 of_adapter[decltype(added)::HELD_WORDS];
    added.ask(of_adapter);
    scales_are_there();
    __syncthreads();
    added.add(sums, of_adapter);
  }
  if (FULL) own.of(nullptr, copied, has_own ? CHANNELS : 0), own.ask(in_flight);
  if (EARLY) wait_for_producer();
  scales_are_there();

  Row channels;
  // Asked for together with x, and put down behind the weights: no block waits for these alone.
  channels.fetch(x);
  const u32 value = CHOSEN && t < CHOSEN && of < CHANNELS ? __ldcg(x + of) : 0u;
  float held[RESIDUAL ? (OUTPUTS + THREADS - 1) / THREADS : 1];
  if (RESIDUAL)
#pragma unroll
    for (int i = 0; i * THREADS < OUTPUTS; i++) {
      const int output = i * THREADS + t, to = output < OUTPUTS ? tile + first_output + output : OUT_COLUMNS;
      held[i] = to >= OUT_COLUMNS ? 0.f
                : WIDE_RESIDUAL   ? __ldcg(static_cast<const float*>(residual) + to)
                                  : widen(__ldcg(static_cast<const u16*>(residual) + to));
    }
  float squares = NORM ? channels.squares(x) : 0.f;  // of x itself, without the gain
  if (BESIDE) channels.copy(reinterpret_cast<u16*>(memory + BESIDE_COPIED_AT));
  if (GAIN) multiply_by(channels, gains);
  if (FULL && (GAIN || !BESIDE)) channels.copy(copied);
  if (FULL) {
    squares = block_sum(squares, scalars->squares);
  } else {
    const int kept = channels.choose(squares, keep, eps, threshold, histogram, list, scalars);
    own.of(list, nullptr, has_own ? kept : 0);
    own.ask(in_flight);
  }
  if (CHOSEN && t < CHOSEN) named[t] = of < CHANNELS ? widen(value) : __uint_as_float(0x7fffffff);
  if (RESIDUAL)
#pragma unroll
    for (int i = 0; i * THREADS < OUTPUTS; i++)
      if (i * THREADS + t < OUTPUTS) residuals[i * THREADS + t] = held[i];
  if (Main::has())
    own.add(sums, in_flight);
  else
    further.add(in_flight);
  float* partial = reinterpret_cast<float*>(memory + PARTIAL_AT);
  cluster_wait();
  bring<Main>(partial, sums);
  further.bring_sums(memory);
  cluster_barrier();
  further.finish(memory, result_beside);

  const float scale = norm_scale(squares, eps);
  add_up<Main>(partial, [=](int i, float first, float second) {
    const int to = tile + first_output + i;
    if (to >= OUT_COLUMNS) return;
    float total[2] = {first, second};
#pragma unroll
    for (int half = 0; half <= (GATE ? 1 : 0); half++) {
      total[half] *= scale;
      if (BIAS) total[half] += biases[half * OUTPUTS + i];
    }
#pragma unroll
    for (int e = 0; e < CHOSEN; e++)
      total[0] = fmaf(named[e], beside[e * OUTPUTS + i], total[0]);
    if (GATE) total[0] = gated(total[0], total[1]);
    if (RESIDUAL) total[0] += residuals[i];
    y[to] = narrow(total[0]);
  });
}
