// A whole sparse site: norm, selection, and the product with what stands round it.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "cpu_gemv.h"
#include "cpu_select.h"

template <class D>
static float mean_square(const typename D::T* x, int64_t n) {
  vf p = {}, q = {}, a, b;
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) D::get(x + i, a, b), p += a * a, q += b * b;
  float sum = total(p + q);
  for (; i < n; i++) sum += D::get1(x[i]) * D::get1(x[i]);
  return sum / n;
}

template <class D>
static void scale_channels(const typename D::T* x, const typename D::T* gain, int64_t n, typename D::T* out) {
  vf a, b, c, d;
  int64_t i = 0;
  for (; i + PAIR <= n; i += PAIR) D::get(x + i, a, b), D::get(gain + i, c, d), D::put(out + i, a * c, b * d);
  for (; i < n; i++) out[i] = D::put1(D::get1(x[i]) * D::get1(gain[i]));
}

// The list of every row: the k largest channels of x times gain, or those that reach the threshold, scaled by x's norm,
// and behind them all of the adapter's rows.
template <class D>
static int linear(const void* x_, const void* weight, const void* bias, const void* residual_, const void* gain, void* out,
                  int64_t rows, int64_t channels, int64_t adapter, int64_t columns, int64_t k, double threshold, double eps,
                  int64_t gate, int64_t threads) {
  typedef typename D::T T;
  typedef typename D::Bits Bits;
  if (rows * columns == 0) return 0;
  const T *x = (const T*)x_, *residual = (const T*)residual_;
  int64_t most = k + adapter;
  float* wide = (float*)malloc(rows * most * (sizeof(float) + sizeof(int32_t)) + (k + channels) * sizeof(T));
  if (!wide) return 2;
  int32_t* index = (int32_t*)(wide + rows * most);
  T *chosen = (T*)(index + rows * most), *gained = chosen + k;
  Gemv<D> job = {wide, index, (const T*)weight, (T*)out, rows, columns, most, gate, (const T*)bias,
                 adapter ? nullptr : residual};
  for (int64_t m = 0; m < rows; m++, x += channels) {
    float* v = wide + m * most;
    int32_t* list = index + m * most;
    if (gain) scale_channels<D>(x, (const T*)gain, channels, gained);
    const T* z = gain ? gained : x;
    float scale = eps < 0 ? 1 : 1 / sqrtf(mean_square<D>(x, channels) + (float)eps);
    int64_t n = k;
    if (threshold < 0)
      select_row<Bits>(z, channels, k, chosen, list);
    else
      n = compact<Bits>(z, 0, channels, reaching<D>((float)threshold, scale), chosen, list, 0, k);
    for (int64_t j = 0; j < n; j++) v[j] = D::get1(chosen[j]) * scale;
    for (int64_t j = 0; j < adapter; j++)
      v[n + j] = D::get1(residual[m * adapter + j]), list[n + j] = (int32_t)(channels + j);
    job.length[m] = n + adapter;
  }
  bool done = job.multiply(threads);
  free(wide);
  return done ? 0 : 2;
}
