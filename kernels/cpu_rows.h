// Several rows of activations times the same rows of a weight, each of which is fetched, and widened, once for all of them.
#pragma once

#include <stdlib.h>

#include "cpu_dtypes.h"

constexpr int TOGETHER = VB == 64 ? 8 : 6;  // rows whose sums of PAIR columns stay in registers, beside what they multiply

// acc[m * pitch + (0..width)) += sum over r in [0, R) of v[r * rows + m] * w[r][0..width), m < M, one r after the other in
// every column, as for one row alone: so how rows are grouped leaves the bits alone. next: prefetched meanwhile, or null.
template <class D, int M, int R>
__attribute__((noinline)) static void add_shared(float* acc, int64_t pitch, int64_t width, const float* v, int64_t rows,
                                                 const typename D::T* const* w, const typename D::T* const* next) {
  constexpr int LINE = min(64 / sizeof(typename D::T), PAIR);
  int64_t c = 0;
  for (; c + PAIR <= width; c += PAIR) {
    vf p[M], q[M];
    for (int m = 0; m < M; m++) p[m] = load<vf>(acc + m * pitch + c), q[m] = load<vf>(acc + m * pitch + c + LANES);
    for (int r = 0; r < R; r++) {
      vf a, b;
      D::get(w[r] + c, a, b);
      if (next)
        for (int l = 0; l < PAIR; l += LINE) __builtin_prefetch(next[r] + c + l);
      for (int m = 0; m < M; m++) p[m] += a * v[r * rows + m], q[m] += b * v[r * rows + m];
    }
    for (int m = 0; m < M; m++) store(acc + m * pitch + c, p[m]), store(acc + m * pitch + c + LANES, q[m]);
  }
  for (; c < width; c++)
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) acc[m * pitch + c] += D::get1(w[r][c]) * v[r * rows + m];
}

// The same for m of them, M at most.
template <class D, int R, int M = TOGETHER>
static void add_shared(int64_t m, float* acc, int64_t pitch, int64_t width, const float* v, int64_t rows,
                       const typename D::T* const* w, const typename D::T* const* next) {
  if (m == M)
    add_shared<D, M, R>(acc, pitch, width, v, rows, w, next);
  else if constexpr (M > 1)
    add_shared<D, R, M - 1>(m, acc, pitch, width, v, rows, w, next);
}

// What several lists of channels name, in ascending order, and of each channel every list's value, zero where it names none.
struct Union {
  int32_t* index = nullptr;  // [count]
  float* values = nullptr;   // [count, rows]
  int64_t count = 0;

  // lists, v: [rows, stride], of which row m's lie at [from[m], to[m]). scratch: [channels], all -1, and so afterwards.
  // Returns whether all lists ascend: others have no such order.
  bool unite(const int32_t* lists, const float* v, int64_t stride, int64_t rows, const int64_t* from, const int64_t* to,
             int32_t* scratch, int64_t channels) {
    for (int64_t m = 0; m < rows; m++)
      for (int64_t j = from[m]; j < to[m]; j++) {
        if (j > from[m] && lists[m * stride + j] <= lists[m * stride + j - 1]) return false;
        scratch[lists[m * stride + j]] = 0;
      }
    count = 0;
    for (int64_t channel = 0; channel < channels; channel++)
      if (scratch[channel] == 0) index[count] = (int32_t)channel, scratch[channel] = (int32_t)count++;
    memset(values, 0, count * rows * sizeof(float));
    for (int64_t m = 0; m < rows; m++)
      for (int64_t j = from[m]; j < to[m]; j++)
        values[scratch[lists[m * stride + j]] * rows + m] = v[m * stride + j];
    for (int64_t i = 0; i < count; i++) scratch[index[i]] = -1;
    return true;
  }

  // Adds the rows of w that the union names to the sums of all its lists.
  template <class D>
  void add(float* acc, int64_t pitch, int64_t width, int64_t rows, const typename D::T* w, int64_t stride) const {
    constexpr int R = 8;
    const int64_t parts = (rows + TOGETHER - 1) / TOGETHER;
    for (int64_t i = 0; i < count;) {
      const bool many = i + R <= count, ahead = i + 2 * R <= count;
      const typename D::T *now[R], *next[R];
      for (int r = 0; r < (many ? R : 1); r++) now[r] = w + index[i + r] * stride;
      for (int r = 0; r < (ahead ? R : 0); r++) next[r] = w + index[i + R + r] * stride;
      for (int64_t part = 0; part < parts; part++) {
        const int64_t m = rows * part / parts, more = rows * (part + 1) / parts - m;
        const float* v = values + i * rows + m;
        if (many)
          add_shared<D, R>(more, acc + m * pitch, pitch, width, v, rows, now, ahead && part == 0 ? next : nullptr);
        else
          add_shared<D, 1>(more, acc + m * pitch, pitch, width, v, rows, now, nullptr);
      }
      i += many ? R : 1;
    }
  }
};
