// The product of one row with a weight that lies as nn.Linear has it.
#pragma once

#include <stdlib.h>

#include "cpu_dtypes.h"
#include "cpu_threads.h"

// out[n] = x . w[n], a weight's row for each output. x lies as get leaves it: PAIR channels by two vectors, then the rest.
template <class D>
struct Dots {
  typedef typename D::T T;
  int64_t next, items;
  const float* x;
  const T* w;
  T* out;
  int64_t channels, columns;
  static constexpr int64_t CHUNK = 64;  // outputs of an item

  // R outputs: so many streams side by side, and the R behind them are prefetched, since a row may be short.
  template <int R>
  void dots(int64_t n) {
    constexpr int LINE = min(64 / sizeof(T), PAIR);
    const T* row = w + n * channels;
    vf p[R] = {}, q[R] = {};
    int64_t c = 0;
    for (; c + PAIR <= channels; c += PAIR) {
      vf u = load<vf>(x + c), v = load<vf>(x + c + LANES);
      for (int r = 0; r < R; r++) {
        vf a, b;
        D::get(row + r * channels + c, a, b);
        for (int l = 0; l < PAIR; l += LINE) __builtin_prefetch(row + (r + R) * channels + c + l);
        p[r] += a * u, q[r] += b * v;
      }
    }
    for (int r = 0; r < R; r++) {
      float sum = total(p[r] + q[r]);
      for (int64_t j = c; j < channels; j++) sum += x[j] * D::get1(row[r * channels + j]);
      out[n + r] = D::put1(sum);
    }
  }

  void item(int64_t i) {
    int64_t n = i * CHUNK, end = min(n + CHUNK, columns);
    for (; n + 8 <= end; n += 8) dots<8>(n);
    for (; n < end; n++) dots<1>(n);
  }
};

template <class D>
static int dense(const void* x_, const void* weight, void* out, int64_t channels, int64_t columns, int64_t threads) {
  typedef typename D::T T;
  const T* x = (const T*)x_;
  float* wide = (float*)malloc(channels * sizeof(float) + 1);
  if (!wide) return 2;
  int64_t c = 0;
  for (vf a, b; c + PAIR <= channels; c += PAIR) D::get(x + c, a, b), store(wide + c, a), store(wide + c + LANES, b);
  for (; c < channels; c++) wide[c] = D::get1(x[c]);
  Dots<D> job = {0, (columns + Dots<D>::CHUNK - 1) / Dots<D>::CHUNK, wide, (const T*)weight, (T*)out, channels, columns};
  parallel(job, (int)(channels * columns * (int64_t)sizeof(T) < SERIAL ? 1 : threads));
  free(wide);
  return 0;
}
