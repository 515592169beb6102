// ``quantized_linear`` for a few rows, of 8- or 4-bit weights: see few_rows.cuh, and quantized_linear.cu for one row and the
// formats.
//
// Tensor cores multiply 16-bit floats: q, -128..127, and u + 16, u = 0..15, are exact in bf16. A scale belongs to a channel and
// a group of columns, and all columns of a warp lie in one group, so scales multiply the values, not the weights: the product
// of a value and a scale is cut into two bf16, which for bf16 are the product itself, and for fp16 miss 2^-18 of it at
// most. Eight columns of an operand are eight rows of x, each multiplied twice; or up to four rows and their second parts.
//
// The scales of a group lie together, those of all rows of the table, and then those of the next group.
//
// Compiled at run time with the constants of few_rows.cuh, SPLIT among them, and: BITS (8 or 4), GROUP (columns that share a
// scale, a multiple of 8 WIDTH). WIDTH is 4, 8 or 16. The adapter has 8 bits.

#include "few_rows.cuh"

constexpr u32 UPPER = 0xffff0000;          // half of a word
constexpr float MIDDLE = HALF ? 8.f : 0.f;  // of u: what two parts miss of a product multiplies u - MIDDLE
constexpr bool BOTH_PARTS = ROWS <= 4;      // of a product are in one operand

static_assert(TILE % (8 * WIDTH) == 0 && OUT_TILE % (8 * WIDTH) == 0, "a warp's columns are there, or none of them");
static_assert(GROUP % (8 * WIDTH) == 0 && OUT_COLUMNS % (8 * WIDTH) == 0, "a warp's columns share their scales");

// A thread's WIDTH columns of a weight row. 4 bits take half of the words.
struct Pack {
  u32 word[WIDTH / 4];
};

// Two floats as bf16, the first in the lower half.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What ``pair`` misses of the two floats.
__device__ __forceinline__ u32 remainder(float low, float high, u32 pair) {
  return narrow_pair(low - __uint_as_float(pair << 16), high - __uint_as_float(pair & UPPER));
}

// What two bf16, each in the upper half, make together.
__device__ __forceinline__ float both(u32 first, u32 second) { return __uint_as_float(first) + __uint_as_float(second); }

// bits & MASK | MAGIC in one instruction, which compilers make two of.
template <u32 MASK, u32 MAGIC>
__device__ __forceinline__ u32 masked(u32 bits) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "n"(MASK), "n"(MAGIC));
  return result;
}

// Of two channels the signed bytes that stand in the lower bytes of the halves of ``bytes``, as bf16: 128 and the lower seven
// bits, less 128, or 256 where the sign is set.
__device__ __forceinline__ u32 signed_pair(u32 bytes) {
  const u32 raised = masked<0x007f007f, 0x43004300>(bytes), less = masked<0x00800080, 0xc300c300>(bytes);
  u32 pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(raised), "r"(0x3f803f80), "r"(less));
  return pair;
}

// Of two channels the nibbles that stand at place PLACE of the halves of ``nibbles``, as bf16, and 16 more: bits three to six
// of a bf16 of the magnitude 16 count units.
template <int PLACE>
__device__ __forceinline__ u32 raised_pair(u32 nibbles) {
  return masked<0x00780078, 0x41804180>(PLACE ? nibbles >> (4 * PLACE - 3) : nibbles << 3);
}

// Of columns 2 m and 2 m + 1 of two channels the weights without their scales, channels side by side.
template <int WIDE>
__device__ __forceinline__ void pairs(u32 (&pair)[2], const Pack& a, const Pack& b, int m) {
  if constexpr (WIDE == 8) {
    const u32 x = a.word[m / 2], y = b.word[m / 2];
    pair[0] = signed_pair(__byte_perm(x, y, m % 2 ? 0x6622 : 0x4400));
    pair[1] = signed_pair(__byte_perm(x, y, m % 2 ? 0x7733 : 0x5511));
  } else {
    const u32 nibbles = __byte_perm(a.word[m / 4], b.word[m / 4], m % 4 / 2 ? 0x7632 : 0x5410);
    pair[0] = m % 2 ? raised_pair<2>(nibbles) : raised_pair<0>(nibbles);
    pair[1] = m % 2 ? raised_pair<3>(nibbles) : raised_pair<1>(nibbles);
  }
}

// Of 16 rows a thread's four, on their way, with their scales; 4 bits: the scale in the lower half, the offset in the upper.
struct Step {
  Pack pack[4];
  u32 scale[4];
};

// Rows of a weight of WIDE bits from one on; HEIGHT: rows of the whole weight.
template <int WIDE, int HEIGHT>
struct Rows {
  using Batch = Step[BATCH];
  static constexpr int PER_GROUP = WIDE == 4 ? 2 : 1;  // scales

  const u8* at;
  const u16* scales;

  __device__ __forceinline__ Rows columns(int from) const {
    return {at + from * WIDE / 8, scales + (u64)(from / GROUP) * (HEIGHT * PER_GROUP)};
  }
  __device__ __forceinline__ Rows behind(int rows) const {
    return {at + (u64)rows * (COLUMNS / 8 * WIDE), scales + rows * PER_GROUP};
  }

  template <bool LISTED>
  __device__ __forceinline__ void request(Step& step, const u16* list, int number, int count, u64 policy) const {
    u32 rows[4];
    rows_of<LISTED>(rows, list, number * 16 + threadIdx.x % 4 * 4, count);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Rows row = behind(rows[i]);
      load_once<WIDTH * WIDE / 32>(step.pack[i].word, row.at, policy);
      step.scale[i] = WIDE == 4 ? __ldg(reinterpret_cast<const u32*>(row.scales)) : __ldg(row.scales);
    }
  }

  __device__ __forceinline__ void add(const Step& step, const u16* values, int number, Sums& sums) const {
    const int place = threadIdx.x % 32 / 4, row = BOTH_PARTS ? place % 4 : place;
    uint2 value = make_uint2(0, 0);
    if (row < ROWS) value = *reinterpret_cast<const uint2*>(values + row * STRIDE + number * 16 + threadIdx.x % 4 * 4);
    const float x[4] = {widen(value.x & 0xffff), widen(value.x >> 16), widen(value.y & 0xffff), widen(value.y >> 16)};
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scaled[i] = x[i] * widen(step.scale[i] & 0xffff);
    uint2 first = make_uint2(narrow_pair(scaled[0], scaled[1]), narrow_pair(scaled[2], scaled[3]));
    const uint2 second = make_uint2(remainder(scaled[0], scaled[1], first.x), remainder(scaled[2], scaled[3], first.y));
    if (WIDE == 4) {
      const float used[4] = {both(first.x << 16, second.x << 16), both(first.x & UPPER, second.x & UPPER),
                             both(first.y << 16, second.y << 16), both(first.y & UPPER, second.y & UPPER)};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float middle = HALF ? fmaf(MIDDLE, scaled[i], sums.offset) : sums.offset;
        const float lowered = fmaf(-16.f - MIDDLE, HALF ? used[i] : scaled[i], middle);
        sums.offset = fmaf(x[i], widen(step.scale[i] >> 16), lowered);
      }
    }
    if (BOTH_PARTS && place >= 4) first = second;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      u32 front[2], back[2];
      pairs<WIDE>(front, step.pack[0], step.pack[1], m);
      pairs<WIDE>(back, step.pack[2], step.pack[3], m);
      multiply<false>(sums.tile[m], front[0], front[1], back[0], back[1], first);
      if (!BOTH_PARTS) multiply<false>(sums.tile[m], front[0], front[1], back[0], back[1], second);
    }
  }

  template <bool LISTED>
  __device__ __forceinline__ void request(Batch& batch, const u16* list, int first, int count, u64 policy) const {
#pragma unroll
    for (int b = 0; b < BATCH; b++)
      if (first + b * APART < steps_of(count)) request<LISTED>(batch[b], list, first + b * APART, count, policy);
  }

  __device__ __forceinline__ void add(const Batch& batch, const u16* values, int first, int count, Sums& sums) const {
#pragma unroll
    for (int b = 0; b < BATCH; b++)
      if (first + b * APART < steps_of(count)) add(batch[b], values, first + b * APART, sums);
  }

  // What has been multiplied makes room for what is asked for next.
  template <bool LISTED>
  __device__ __forceinline__ void stream(Batch& batch, const u16* values, const u16* list, int count, Sums& sums,
                                         u64 policy) const {
    const int begin = __shfl_sync(~0u, first_step(), 0), steps = __shfl_sync(~0u, steps_of(count), 0);  // a warp's alike
    for (int first = begin; first < steps; first += APART * BATCH)
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int step = first + b * APART, next = step + APART * BATCH;
        if (step >= steps) break;
        add(batch[b], values, step, sums);
        if (next < steps) request<LISTED>(batch[b], list, next, count, policy);
      }
  }
};

using Own = Rows<BITS, CHANNELS>;
using Adapter = Rows<8, ADAPTER>;

struct Weight : Own {
  Adapter beside;

  __device__ __forceinline__ Weight columns(int from) const { return {Own::columns(from), beside.columns(from)}; }
  __device__ __forceinline__ Adapter adapter(int rows) const { return beside.behind(rows); }

  // Adds both parts of a row's products, which are two threads', and its offset, of which four threads have each a part.
  __device__ __forceinline__ void settle(Sums& sums) const {
    float offset[2] = {0.f, 0.f};  // of the two rows whose sums are this thread's
    if (BITS == 4) {
      float all = sums.offset;
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
#pragma unroll
      for (int i = 0; i < 2; i++) offset[i] = __shfl_sync(~0u, all, threadIdx.x % 4 * 8 + 4 * i);
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (BOTH_PARTS) sums.tile[m][i] += __shfl_xor_sync(~0u, sums.tile[m][i], 2);
        sums.tile[m][i] += offset[i & 1];
      }
  }
};

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
quantized_rows(const u16* __restrict__ x, const u8* __restrict__ weight, const u16* __restrict__ scales,
               const u8* __restrict__ adapter, const u16* __restrict__ adapter_scales, const u16* __restrict__ bias,
               const u16* __restrict__ residual, const u16* __restrict__ gain, u16* __restrict__ y, int rows, float eps,
               float threshold) {
  few_rows(x, Weight{{weight, scales}, {adapter, adapter_scales}}, bias, residual, gain, y, rows, eps, threshold);
}
