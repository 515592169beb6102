// ``sparse_linear`` for a few rows, of 16-bit weights: see few_rows.cuh, whose constants it is compiled with, WIDTH 4 or 8, and
// sparse_linear.cu for one row.

constexpr int SPLIT = 1;

#include "few_rows.cuh"

// A thread's columns of a weight row, read once: past L1, and first to leave L2.
struct Pack {
  u32 word[TILES];
  __device__ __forceinline__ void load(const u16* address, u64 policy) {
    if constexpr (TILES == 4)
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(address), "l"(policy));
    else
      asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                   : "=r"(word[0]), "=r"(word[1]) : "l"(address), "l"(policy));
  }
};

// This thread's columns of the rows from one on.
struct Weight {
  using Batch = Pack[BATCH][4];

  const u16* at;

  __device__ __forceinline__ Weight columns(int from) const { return {at + from}; }
  __device__ __forceinline__ Weight behind(int rows) const { return {at + (u64)rows * COLUMNS}; }
  __device__ __forceinline__ Weight adapter(int rows) const { return behind(CHANNELS + rows); }

  // Behind the last row one that is there is read once more; its values are zero.
  template <bool LISTED>
  __device__ __forceinline__ void request(Batch& batch, const u16* list, int first, int count, u64 policy) const {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int step = first + b * APART, from = step * 16 + threadIdx.x % 4 * 4;
      if (step >= steps_of(count)) break;
      u32 rows[4];
      rows_of<LISTED>(rows, list, from, count);
#pragma unroll
      for (int i = 0; i < 4; i++) batch[b][i].load(at + (u64)rows[i] * COLUMNS, policy);
    }
  }

  __device__ __forceinline__ void add(const Batch& batch, const u16* values, int first, int count, Sums& sums) const {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int step = first + b * APART;
      if (step >= steps_of(count)) break;
      uint2 value = make_uint2(0, 0);
      if (row < ROWS) value = *reinterpret_cast<const uint2*>(values + row * STRIDE + step * 16 + threadIdx.x % 4 * 4);
      const Pack(&p)[4] = batch[b];
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        const u32 low[2] = {__byte_perm(p[0].word[m], p[1].word[m], 0x5410), __byte_perm(p[2].word[m], p[3].word[m], 0x5410)};
        const u32 high[2] = {__byte_perm(p[0].word[m], p[1].word[m], 0x7632), __byte_perm(p[2].word[m], p[3].word[m], 0x7632)};
        multiply<HALF>(sums.tile[m], low[0], high[0], low[1], high[1], value);
      }
    }
  }

  template <bool LISTED>
  __device__ __forceinline__ void stream(Batch& batch, const u16* values, const u16* list, int count, Sums& sums,
                                         u64 policy) const {
    for (int first = first_step(); first < steps_of(count); first += APART * BATCH) {
      add(batch, values, first, count, sums);
      request<LISTED>(batch, list, first + APART * BATCH, count, policy);
    }
  }

  __device__ __forceinline__ void settle(Sums&) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_rows(const u16* __restrict__ x, const u16* __restrict__ weight, const u16* __restrict__ bias,
            const u16* __restrict__ residual, const u16* __restrict__ gain, u16* __restrict__ y, int rows, float eps,
            float threshold) {
  few_rows(x, Weight{weight}, bias, residual, gain, y, rows, eps, threshold);
}
