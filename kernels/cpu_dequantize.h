// A weight of 8 or 4 bits as floats, for products of many rows. The bits are those of plain torch: every operation is
// rounded in float32 by itself, the result once more to its dtype.
#pragma once

#include "cpu_dtypes.h"
#include "cpu_formats.h"
#include "cpu_threads.h"

// D: the dtype of scales and result. BITS: of a number, as in cpu_formats.h.
template <class D, int BITS>
struct Dequantize {
  typedef typename D::T T;
  static_assert(FEWEST % PAIR == 0, "a scale serves whole pairs of vectors");
  static constexpr bool HALVED = D::place(1) != 1;  // D::put takes the even columns, then the odd ones
  int64_t next, items;
  Scaled<D, BITS> weight;
  T* out;  // [rows, columns]
  int64_t rows, each;  // rows of an item

  // The PAIR numbers from q on, as D::put takes columns: by shifts, masks and whole loads alone, since g++ and clang++ spell
  // a shuffle differently.
  INLINE void get(const uint8_t* q, vi& a, vi& b) {
    if constexpr (BITS == 4) {
      const vi bytes = widen_bytes(q);
      a = bytes & 15, b = bytes >> 4 & 15;  // the lower column is in the lower half
      if constexpr (!HALVED) {
        alignas(VB) uint16_t columns[PAIR];
        store(columns, a | b << 16);
        a = (vi)widen_words(columns), b = (vi)widen_words(columns + LANES);
      }
    } else if constexpr (HALVED) {
      const vu words = widen_words(q);
      a = (vi)(words << 24) >> 24, b = (vi)(words << 16) >> 24;
    } else {
      a = widen_bytes(q), b = widen_bytes(q + LANES);
    }
  }

  INLINE vf value(vi number, float scale, float offset) {
    const vf product = __builtin_convertvector(number, vf) * scale;
    return BITS == 4 ? rounded(product) + offset : product;
  }

  void item(int64_t i) {
    for (int64_t row = i * each; row < min(rows, (i + 1) * each); row++) {
      const uint8_t* q = weight.at(row, 0);
      const T* s = weight.scales(row, 0);
      T* to = out + row * weight.columns;
      for (int64_t c = 0; c < weight.columns; s += weight.EACH) {
        const float scale = D::get1(s[0]), offset = BITS == 4 ? D::get1(s[weight.EACH - 1]) : 0;
        for (const int64_t end = c + weight.share; c < end; c += PAIR) {
          vi a, b;
          get(q + c * BITS / 8, a, b);
          D::put(to + c, value(a, scale, offset), value(b, scale, offset));
        }
      }
    }
  }
};

template <class D, int BITS>
static void dequantize(const void* weight, const void* scales, void* out, int64_t rows, int64_t columns, int64_t share,
                       int64_t threads) {
  typedef typename D::T T;
  const int64_t each = max(1, SERIAL / (columns * (int64_t)sizeof(T)));  // more is written than read
  const Scaled<D, BITS> stored = {(const uint8_t*)weight, (const T*)scales, columns, share};
  Dequantize<D, BITS> job = {0, (rows + each - 1) / each, stored, (T*)out, rows, each};
  parallel(job, (int)threads);
}
