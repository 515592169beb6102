// The product of a few rows with a weight that lies as nn.Linear has it.
#pragma once

#include <stdlib.h>

#include "cpu_dtypes.h"
#include "cpu_threads.h"

// out[m][n] = x[m] . w[n], a weight's row for each output. x lies as get leaves it: PAIR channels by two vectors, then the
// rest. Every sum goes over its channels in one order, so how rows and outputs are grouped leaves the bits alone.
template <class D>
struct Dots {
  typedef typename D::T T;
  int64_t next, items;
  const float* x;  // [rows, channels]
  const T* w;
  T* out;  // [rows, columns]
  int64_t rows, channels, columns;
  static constexpr int64_t CHUNK = 64;  // outputs of an item
  static constexpr int MOST = 4;        // rows that share what is read of a weight

  // R outputs of M rows: R streams side by side, and the R behind them are prefetched, since a weight's row may be short.
  template <int R, int M>
  void dots(int64_t m, int64_t n) {
    constexpr int LINE = min(64 / sizeof(T), PAIR);
    const T* row = w + n * channels;
    const float* z = x + m * channels;
    vf p[R][M] = {}, q[R][M] = {};
    int64_t c = 0;
    for (; c + PAIR <= channels; c += PAIR) {
      vf u[M], v[M];
      for (int i = 0; i < M; i++) u[i] = load<vf>(z + i * channels + c), v[i] = load<vf>(z + i * channels + c + LANES);
      for (int r = 0; r < R; r++) {
        vf a, b;
        D::get(row + r * channels + c, a, b);
        for (int l = 0; l < PAIR; l += LINE) __builtin_prefetch(row + (r + R) * channels + c + l);
        for (int i = 0; i < M; i++) p[r][i] += a * u[i], q[r][i] += b * v[i];
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < M; i++) {
        float sum = total(p[r][i] + q[r][i]);
        for (int64_t j = c; j < channels; j++) sum += z[i * channels + j] * D::get1(row[r * channels + j]);
        out[(m + i) * columns + n + r] = D::put1(sum);
      }
  }

  // Outputs [n, end) of ``more`` rows, M at most.
  template <int M = MOST>
  void outputs(int64_t m, int64_t more, int64_t n, int64_t end) {
    if (more < M) {
      if constexpr (M > 1) outputs<M - 1>(m, more, n, end);
      return;
    }
    constexpr int R = M == 1 ? 8 : M == 2 ? 4 : 2;
    for (; n + R <= end; n += R) dots<R, M>(m, n);
    for (; n < end; n++) dots<1, M>(m, n);
  }

  void item(int64_t i) {
    const int64_t n = i * CHUNK, parts = (rows + MOST - 1) / MOST;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t m = rows * part / parts, end = rows * (part + 1) / parts;
      outputs(m, end - m, n, min(n + CHUNK, columns));
    }
  }
};

template <class D>
static int dense(const void* x_, const void* weight, void* out, int64_t rows, int64_t channels, int64_t columns,
                 int64_t threads) {
  typedef typename D::T T;
  float* wide = (float*)malloc(rows * channels * sizeof(float) + 1);
  if (!wide) return 2;
  for (int64_t m = 0; m < rows; m++) {
    const T* x = (const T*)x_ + m * channels;
    float* to = wide + m * channels;
    int64_t c = 0;
    for (vf a, b; c + PAIR <= channels; c += PAIR) D::get(x + c, a, b), store(to + c, a), store(to + c + LANES, b);
    for (; c < channels; c++) to[c] = D::get1(x[c]);
  }
  const int64_t items = (columns + Dots<D>::CHUNK - 1) / Dots<D>::CHUNK;
  Dots<D> job = {0, items, wide, (const T*)weight, (T*)out, rows, channels, columns};
  parallel(job, (int)(channels * columns * (int64_t)sizeof(T) < SERIAL ? 1 : threads));
  free(wide);
  return 0;
}
