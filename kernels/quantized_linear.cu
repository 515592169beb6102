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
// BESIDE: in the same launch further blocks multiply x as it is by a residual adapter, whose result a later site adds: an
// adapter reads all of its rows, so its blocks have work while the others choose theirs.
//
// Compiled at run time with these constants, besides those of selection.cuh: COLUMNS (N), BITS (8 or 4), GROUP (columns
// that share a scale), ADAPTER (rows of a residual adapter, in 8 bits, for a residual of STREAM values that begins anew behind
// its last), CHOSEN (rows of 8 bits behind these, for channels of x that are named), TILE (columns a cluster reads), WIDTH (of
// them a thread's, 8 or 16), BATCH (times 32 rows a warp has in flight), RESIDENT (blocks that find room on a multiprocessor),
// SPLIT (blocks of a cluster), HELD (whether scales have room in shared memory), SHARED (its bytes), the flags FULL, BIAS,
// RESIDUAL, EARLY and GAIN, as sparse_linear.cu describes them, and WIDE_RESIDUAL (the residual is float32). BESIDE is the
// number of columns of the adapter beside, 0 without, and BESIDE_ROWS of its rows, whose values begin anew behind the last
// channel; BESIDE_TILE and BESIDE_BATCH are to it what TILE and BATCH are to the weight.
//
// 8 bits: w = s q, q signed. 4 bits: w = s u + m, u = 0..15, two to a byte, the lower column in the lower half; s and m,
// 16 bits each, lie side by side. The scales of all rows for one group of columns lie together, ADAPTER_SPAN of the adapter's: a
// block brings those of its channels to shared memory before x is there. Row by row they would be a line of memory each.

#include "cluster.cuh"
#include "shares.cuh"

constexpr int OUT_COLUMNS = GATE ? COLUMNS / 2 : COLUMNS;
constexpr int OUT_TILE = GATE ? TILE / 2 : TILE;
constexpr int WARP_COLUMNS = 8 * WIDTH;
constexpr int TILES = WIDTH / 2;  // of 16 columns that a warp multiplies
constexpr int STEPS = 8;          // of 32 rows, that coefficients are made for at a time
constexpr int SETS = WARP_COLUMNS > GROUP ? WARP_COLUMNS / GROUP : 1;  // groups that a warp's columns lie in
constexpr int DIGITS = 3, PLANES = SETS * DIGITS;
constexpr int MAIN_BLOCKS = (OUT_COLUMNS + OUT_TILE - 1) / OUT_TILE * SPLIT;

// How the warps of a cluster share a tile of COLUMNS_OF_TILE columns, which make OUT outputs: ``across`` side by side, ``deep``
// in a block for the same columns.
template <int COLUMNS_OF_TILE, int OUT>
struct Warps {
  static constexpr int across = COLUMNS_OF_TILE / WARP_COLUMNS, deep = WARPS / across;
  static constexpr int out = OUT, halves = COLUMNS_OF_TILE / OUT;
  static constexpr int outputs = (OUT + 2 * SPLIT - 1) / (2 * SPLIT) * 2;  // that a block finishes, the last one fewer
  static constexpr int parts = deep * SPLIT, part = outputs + 4, partials = parts * halves * part;  // sums that meet in it
  static_assert(COLUMNS_OF_TILE % WARP_COLUMNS == 0 && across <= WARPS, "a warp's columns lie together");
  static_assert(OUT % WARP_COLUMNS == 0, "a warp's columns lie in one half");
};
using Main = Warps<TILE, OUT_TILE>;
using Beside = Warps<BESIDE_TILE, BESIDE_TILE>;

// Which rows of a weight a block multiplies: those of its own list, its part of a list that all blocks of the cluster have, or
// its share of the first rows.
enum class Rows { OWN_LIST, SHARED_LIST, FIRST };

// A tile's columns lie in so many groups, of each half so many.
template <class Place>
constexpr int groups_of() {
  return (Place::out + GROUP - 1) / GROUP + (Place::out % GROUP && GROUP % Place::out ? 1 : 0);
}

// Rows of which a block holds the scales: all, or its share of the first ``rows``.
template <Rows ROWS>
constexpr int share_of(int rows) {
  constexpr int BLOCKS = ROWS == Rows::SHARED_LIST ? 1 : SPLIT;
  return (rows + 64 * BLOCKS - 1) / (64 * BLOCKS) * 64;
}

// Shared memory: histogram (for Top-K) | list | residual | scales | coefficients | partial sums | chosen rows and values |
// scalars.
constexpr int HISTOGRAM_BYTES = RANKED ? BINS * 2 : 0;
constexpr int LISTED = RANKED ? (CHANNELS + 31) / 32 * 32 : THRESHOLD ? OWN_CHANNELS : 0;
constexpr int COPIED = FULL || BESIDE ? (CHANNELS + 63) / 64 * 64 : 0;
constexpr int LIST_BYTES = LISTED * 4 > COPIED * 2 ? LISTED * 4 : COPIED * 2;
constexpr int RESIDUAL_AT = HISTOGRAM_BYTES + LIST_BYTES;
constexpr int SCALES_AT = RESIDUAL_AT + (ADAPTER ? (STREAM + 7) / 8 * 16 : 0);
constexpr Rows OWN_ROWS = FULL ? Rows::FIRST : THRESHOLD ? Rows::OWN_LIST : Rows::SHARED_LIST;
constexpr int OWN_SCALES = HELD ? groups_of<Main>() * Main::halves * share_of<OWN_ROWS>(CHANNELS) * (BITS == 4 ? 4 : 2) : 0;
constexpr int ADAPTER_SCALES = ADAPTER ? groups_of<Main>() * share_of<Rows::FIRST>(ADAPTER) * 2 : 0;
constexpr int BESIDE_SCALES = BESIDE ? groups_of<Beside>() * share_of<Rows::FIRST>(BESIDE_ROWS) * 2 : 0;
constexpr int SCALES_BYTES = OWN_SCALES + ADAPTER_SCALES > BESIDE_SCALES ? OWN_SCALES + ADAPTER_SCALES : BESIDE_SCALES;
constexpr int DIGITS_AT = SCALES_AT + SCALES_BYTES;
constexpr int PARTIAL_AT = DIGITS_AT + WARPS * STEPS * PLANES * 32;
constexpr int PARTIALS = BESIDE && Beside::partials > Main::partials ? Beside::partials : Main::partials;
constexpr int CHOSEN_AT = PARTIAL_AT + PARTIALS * 4;
constexpr int SCALARS_AT = CHOSEN_AT + CHOSEN * (Main::outputs + 1) * 4;

static_assert(SCALARS_AT + sizeof(Scalars) <= SHARED, "the host's layout is not this one");
static_assert(SETS <= 2, "an operand has eight columns");
static_assert(GROUP % WARP_COLUMNS == 0 || WARP_COLUMNS % GROUP == 0, "a thread's columns share their scale");

// A thread's WIDTH columns of a weight row, read once: past L1, and first to leave L2.
template <int WORDS>
struct Pack {
  u32 word[WORDS];
  __device__ __forceinline__ void load(const u8* address, u64 policy) {
    if constexpr (WORDS == 4)
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(address), "l"(policy));
    else if constexpr (WORDS == 2)
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                   : "=r"(word[0]), "=r"(word[1]) : "l"(address), "l"(policy));
    else
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
                   : "=r"(word[0]) : "l"(address), "l"(policy));
  }
};

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

// What a thread has of a warp's sums: columns 2 m and 2 m + 1 of its WIDTH, m = its place among four neighbours, and 4 more.
struct Sums {
  float of[TILES / 4][2] = {};
};

// The products of some rows of a weight of WIDE bits with their values, for this thread's columns.
//
// Lists say row << 16 | value, of LENGTH rows at most. Of the first LENGTH rows ``values`` has the values, which begin anew
// after every PERIOD. A row has ROW columns, and the scales of a group of columns lie together, SPAN rows'.
template <int WIDE, int DEPTH, Rows ROWS, int LENGTH, int PERIOD, int ROW, int SPAN, bool IN_BLOCK, class Place>
struct Product {
  static constexpr bool LIST = ROWS != Rows::FIRST;
  static constexpr int WORDS = WIDTH * WIDE / 32, PER_GROUP = WIDE == 4 ? 2 : 1, APART = Place::deep;
  static constexpr int ROW_BYTES = ROW / 8 * WIDE, SCALE_BYTES = 2 * PER_GROUP, SHARE = share_of<ROWS>(LENGTH);
  static_assert((u64)LENGTH * ROW_BYTES < 1ull << 32, "places in a weight are counted in 32 bits");
  static_assert(SPAN * SCALE_BYTES % 8 == 0, "scales come to shared memory 8 bytes at a time");

  const u8* weight;
  u32 mine;                // bytes of a row before this thread's columns
  const u8* scales[SETS];  // of a group of this warp's columns: IN_BLOCK, those of the rows that the block may multiply
  u8* digits;              // [STEPS, PLANES, 32], this warp's
  u64 policy;

  u32* list;
  const u16* values;
  int count, steps, begin;  // steps of 32 rows for this block's warps, and the first of this one

  Pack<WORDS> pack[DEPTH][8];

  __device__ __forceinline__ void of(u32* rows, const u16* row_values, int rows_count) {
    constexpr int UNIT = ROWS == Rows::FIRST ? 64 : 32, BLOCKS = ROWS == Rows::OWN_LIST ? 1 : SPLIT;
    const int warp = threadIdx.x / 32, all = (rows_count + UNIT - 1) / UNIT, rank = blockIdx.x % BLOCKS;
    const int units = (all + BLOCKS - 1 - rank) / BLOCKS;
    list = rows, values = row_values, count = rows_count;
    steps = __shfl_sync(~0u, warp < Place::across * Place::deep ? units * (UNIT / 32) : 0, 0);  // a warp's alike
    begin = __shfl_sync(~0u, warp / Place::across, 0);
  }

  // Where the 32 rows of a step begin.
  __device__ __forceinline__ int place_of(int step) const {
    const int rank = blockIdx.x % SPLIT;
    if (ROWS == Rows::OWN_LIST) return 32 * step;
    return ROWS == Rows::SHARED_LIST ? 32 * (step * SPLIT + rank) : 64 * (step / 2 * SPLIT + rank) + 32 * (step % 2);
  }

  __device__ __forceinline__ void ask() { ask(begin); }

  // Brings the block the scales of the rows that it may multiply, for ``groups`` groups from one on, to ``to``.
  __device__ __forceinline__ static void bring_scales(u8* to, const u16* from, int group, int groups) {
    constexpr int UNIT = SPAN * SCALE_BYTES % 16 ? 8 : 16, EACH_64 = 64 * SCALE_BYTES / UNIT;  // bytes; units of 64 rows
    constexpr int UNITS = SHARE / 64 * EACH_64, APART_64 = ROWS == Rows::SHARED_LIST ? 1 : SPLIT;
    for (int i = threadIdx.x; i < groups * UNITS; i += THREADS) {
      const int unit = i % UNITS, block = unit / EACH_64 * APART_64 + blockIdx.x % APART_64;
      const int offset = block * 64 * SCALE_BYTES + unit % EACH_64 * UNIT;
      if (offset < SPAN * SCALE_BYTES && group + i / UNITS < ROW / GROUP) {
        const u8* address = reinterpret_cast<const u8*>(from) + (u64)(group + i / UNITS) * (SPAN * SCALE_BYTES) + offset;
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((u32)__cvta_generic_to_shared(to + i * UNIT)),
                     "l"(address), "n"(UNIT));
      }
    }
  }

  // Asks for the first weights from step ``first`` on.
  __device__ __forceinline__ void ask(int first) {
    if (LIST) {
      const int last = place_of(steps - 1) + (threadIdx.x & 31);  // behind the list rows that are there, for nothing
      if (steps && last >= count) list[last] = 0;
      __syncwarp();
    }
#pragma unroll
    for (int b = 0; b < DEPTH; b++)
      if (first + b * APART < steps) request(pack[b], first + b * APART);
  }

  __device__ __forceinline__ void request(Pack<WORDS> (&to)[8], int step) const {
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
    for (int i = 0; i < 8; i++) to[i].load(weight + (row[i] * (u32)ROW_BYTES + mine), policy);
  }

  // Adds the products of all rows to the warp's sums. ``ask`` has been called for the first of them.
  __device__ __forceinline__ void add(Sums& sums) {
    for (int first = begin; first < steps; first += STEPS * APART) {
      if (first > begin) ask(first);
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
          multiply_rows(sum, pack[b], i + b);
          if (i + b + DEPTH < STEPS && next < steps) request(pack[b], next);
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
        u8* to = digits + (i * PLANES + g * DIGITS) * 32 + (threadIdx.x & 31);
        to[0] = number, to[32] = number >> 8, to[64] = number >> 16;
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply_rows(int (&sum)[TILES][4], const Pack<WORDS> (&rows)[8], int step) const {
    const int lane = threadIdx.x & 31, plane = min(lane / 4, PLANES - 1);  // columns without a digit are not looked at
    const uint2 b = *reinterpret_cast<const uint2*>(digits + (step * PLANES + plane) * 32 + lane % 4 * 8);
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      u32 front[4], back[4];
      transpose(front, rows[0].word[w], rows[1].word[w], rows[2].word[w], rows[3].word[w]);
      transpose(back, rows[4].word[w], rows[5].word[w], rows[6].word[w], rows[7].word[w]);
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
  __device__ __forceinline__ void settle(Sums& sums, const int (&sum)[TILES][4], const float (&unit)[SETS],
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
  static constexpr int GROUPS = groups_of<Place>();
  int column;                      // of the weight, this thread's first
  int group[SETS];                 // of the tile's, this warp's
  int first_group[Place::halves];  // of the weight, that the tile's begin with

  // ``of``: the weight's column of one of the tile's, or -1. Threads that have none read their warp's first, and warps that
  // have none the weight's, for nothing.
  template <class Of>
  __device__ __forceinline__ explicit Columns(Of of) {
    const int start = threadIdx.x / 32 % Place::across * WARP_COLUMNS, local = start + threadIdx.x % 32 / 4 * WIDTH;
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

// The sums of the tile's outputs that this block finishes, over the warps that share their columns, and over the cluster: each
// warp brings its own to the block that finishes them. Calls finish(number of the output in the tile, its sum, that of its
// second half).
template <class Place, class Finish>
__device__ __forceinline__ void sum_up(char* memory, const Sums& sums, Finish finish) {
  constexpr int FOLD = fold(THREADS / Place::outputs < Place::parts ? THREADS / Place::outputs : Place::parts);
  float* partial = reinterpret_cast<float*>(memory + PARTIAL_AT);
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  cluster_wait();
  if (warp < Place::across * Place::deep)
#pragma unroll
    for (int i = 0; i < TILES / 4; i++) {
      const int local = warp % Place::across * WARP_COLUMNS + lane / 4 * WIDTH + 2 * (lane % 4 + 4 * i);
      const int half = local / Place::out, at = local % Place::out, part = warp / Place::across * SPLIT + blockIdx.x % SPLIT;
      to_block(partial + (part * Place::halves + half) * Place::part + at % Place::outputs, at / Place::outputs,
               sums.of[i][0], sums.of[i][1]);
    }
  cluster_barrier();
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

// A block of those that multiply x by the adapter beside.
__device__ __forceinline__ void multiply_beside(char* memory, const u16* x, const u8* adapter, const u16* scales,
                                                float* result, u64 policy) {
  const int tile = (blockIdx.x - MAIN_BLOCKS) / SPLIT * BESIDE_TILE;
  u16* values = reinterpret_cast<u16*>(memory + HISTOGRAM_BYTES);
  const Columns<Beside> mine([=](int local) { return tile + local < BESIDE ? tile + local : -1; });
  Sums sums;
  auto all = mine.template product<8, BESIDE_BATCH, Rows::FIRST, BESIDE_ROWS, CHANNELS, BESIDE, ADAPTER_SPAN>(
      memory, adapter, scales, reinterpret_cast<u8*>(memory + SCALES_AT), policy);
  all.of(nullptr, values, BESIDE_ROWS);
  all.ask();
  wait_for_producer();
  scales_are_there();
  Row channels;
  channels.fetch(x);
  channels.copy(values);
  __syncthreads();
  all.add(sums);
  sum_up<Beside>(memory, sums, [=](int i, float total, float) {
    const int to = tile + blockIdx.x % SPLIT * Beside::outputs + i;
    if (to < BESIDE) result[to] = total;
  });
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, RESIDENT)
quantized_linear(const u16* __restrict__ x, const u8* __restrict__ weight, const u16* __restrict__ scales,
                 const u8* __restrict__ adapter, const u16* __restrict__ adapter_scales, const u16* __restrict__ bias,
                 const void* __restrict__ residual, const u16* __restrict__ gain, const long long* __restrict__ chosen,
                 u16* __restrict__ y, float* __restrict__ result_beside, int keep, float eps, float threshold) {
  constexpr int OUTPUTS = Main::outputs;
  extern __shared__ __align__(16) char memory[];
  u32* histogram = reinterpret_cast<u32*>(memory);
  u32* list = reinterpret_cast<u32*>(memory + HISTOGRAM_BYTES);
  u16* carried = reinterpret_cast<u16*>(memory + RESIDUAL_AT);
  float *beside = reinterpret_cast<float*>(memory + CHOSEN_AT), *named = beside + CHOSEN * OUTPUTS;
  Scalars* scalars = reinterpret_cast<Scalars*>(memory + SCALARS_AT);
  const int t = threadIdx.x, tile = blockIdx.x / SPLIT * OUT_TILE;
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  cluster_arrive();
  if constexpr (BESIDE > 0)
    if (blockIdx.x >= MAIN_BLOCKS) return multiply_beside(memory, x, adapter, adapter_scales, result_beside, policy);

  // With a gate the second half of the tile's columns are those to be gated.
  const auto column_of = [=](int local) {
    const int upper = GATE && local >= OUT_TILE, column = tile + local - upper * OUT_TILE;
    return local < TILE && column < OUT_COLUMNS ? column + upper * OUT_COLUMNS : -1;
  };
  const Columns<Main> mine(column_of);
  u8* table = reinterpret_cast<u8*>(memory + SCALES_AT);
  Sums sums;
  auto own = mine.template product<BITS, BATCH, OWN_ROWS, CHANNELS, CHANNELS, COLUMNS, CHANNELS, HELD>(
      memory, weight, scales, table, policy);
  for (int i = t; RANKED && i < HISTOGRAM_BYTES / 16; i += THREADS)
    reinterpret_cast<uint4*>(histogram)[i] = make_uint4(0, 0, 0, 0);
  Row gains;
  if (GAIN) gains.fetch(gain);  // before the wait: a weight, which no kernel in flight writes
  for (int i = t; i < CHOSEN * OUTPUTS; i += THREADS) {
    const int row = ADAPTER + i / OUTPUTS, to = column_of(blockIdx.x % SPLIT * OUTPUTS + i % OUTPUTS);
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
    added.ask();
    scales_are_there();
    __syncthreads();
    added.add(sums);
  }
  if (FULL) own.of(nullptr, reinterpret_cast<const u16*>(list), CHANNELS), own.ask();
  if (EARLY) wait_for_producer();
  scales_are_there();

  Row channels;
  channels.fetch(x);
  if (CHOSEN && t < CHOSEN) {
    const u64 of = chosen[t];
    named[t] = of < CHANNELS ? widen(__ldcg(x + of)) : __uint_as_float(0x7fffffff);  // nothing outside of x is read
  }
  float squares = NORM ? channels.squares(x) : 0.f;  // of x itself, without the gain
  if (GAIN) multiply_by(channels, gains);
  if (FULL) {
    channels.copy(reinterpret_cast<u16*>(list));
    squares = block_sum(squares, scalars->squares);
  } else {
    own.of(list, nullptr, channels.choose(squares, keep, eps, threshold, histogram, list, scalars));
    own.ask();
  }
  own.add(sums);

  const float scale = norm_scale(squares, eps);
  sum_up<Main>(memory, sums, [=](int i, float first, float second) {
    const int to = tile + blockIdx.x % SPLIT * OUTPUTS + i;
    if (to >= OUT_COLUMNS) return;
    float total[2] = {first, second};
#pragma unroll
    for (int half = 0; half <= (GATE ? 1 : 0); half++) {
      total[half] *= scale;
      if (BIAS) total[half] += widen(__ldg(bias + to + half * OUT_COLUMNS));
    }
#pragma unroll
    for (int e = 0; e < CHOSEN; e++)
      total[0] = fmaf(named[e], beside[e * OUTPUTS + i], total[0]);
    if (GATE) total[0] = gated(total[0], total[1]);
    if (RESIDUAL)
      total[0] += WIDE_RESIDUAL ? __ldcg(static_cast<const float*>(residual) + to)
                                : widen(__ldcg(static_cast<const u16*>(residual) + to));
    y[to] = narrow(total[0]);
  });
}
