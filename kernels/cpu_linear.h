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

// What stands round a product, as the entry points have it.
struct Around {
  const void *bias, *residual, *gain;
  int64_t channels, k;
  double threshold, eps;
  int64_t gate;
};

// What an adapter's rows multiply: the residual's channels, again as far as all rows but the last go, and x's chosen ones.
struct Adapter {
  int64_t rows, stream;
  const int64_t* chosen;
  int64_t picked;
};

// The list of every row: the k largest channels of x times gain, or those that reach the threshold, scaled by x's norm,
// and behind them all of the adapter's rows, which follow the weight's own or are apart, in 8 bits.
template <class D, class F>
static int linear(const void* x_, F weight, Int8<D> apart, const Adapter& adapter, void* out, int64_t rows, int64_t columns,
                  const Around& around, int64_t threads) {
  typedef typename D::T T;
  typedef typename D::Bits Bits;
  if (rows * columns == 0) return 0;
  const T *x = (const T*)x_, *residual = (const T*)around.residual, *gain = (const T*)around.gain;
  const int64_t channels = around.channels, k = around.k, most = k + adapter.rows;
  float* wide = (float*)malloc(rows * most * (sizeof(float) + sizeof(int32_t)) + (k + channels) * sizeof(T));
  if (!wide) return 2;
  int32_t* index = (int32_t*)(wide + rows * most);
  T *chosen = (T*)(index + rows * most), *gained = chosen + k;
  Gemv<D, F> job = {wide, index, weight, apart, (T*)out, rows, columns, most, around.gate, (const T*)around.bias,
                    adapter.rows ? nullptr : residual};
  for (int64_t m = 0; m < rows; m++, x += channels) {
    float* v = wide + m * most;
    int32_t* list = index + m * most;
    if (gain) scale_channels<D>(x, gain, channels, gained);
    const T* z = gain ? gained : x;
    float scale = around.eps < 0 ? 1 : 1 / sqrtf(mean_square<D>(x, channels) + (float)around.eps);
    int64_t n = k;
    if (around.threshold < 0)
      select_row<Bits>(z, channels, k, chosen, list);
    else
      n = compact<Bits>(z, 0, channels, reaching<D>((float)around.threshold, scale), chosen, list, 0, k);
    for (int64_t j = 0; j < n; j++) v[j] = D::get1(chosen[j]) * scale;
    float* carried = v + n;
    const T* stream = residual + m * adapter.stream;
    for (int64_t left = adapter.rows - adapter.picked; left > 0; left -= adapter.stream)
      for (int64_t j = 0; j < min(left, adapter.stream); j++) *carried++ = D::get1(stream[j]);
    for (int64_t j = 0; j < adapter.picked; j++) carried[j] = D::get1(x[adapter.chosen[j]]);
    for (int64_t j = 0; j < adapter.rows; j++) list[n + j] = (int32_t)(F::ORDERED ? channels + j : j);
    job.length[m] = n + adapter.rows, job.own[m] = F::ORDERED ? job.length[m] : n;
  }
  bool done = job.multiply(threads);
  free(wide);
  return done ? 0 : 2;
}

template <class D>
static int dense_linear(const void* x, const void* weight, int64_t adapter, void* out, int64_t rows, int64_t columns,
                        const Around& around, int64_t threads) {
  return linear<D, Dense<D>>(x, {(const typename D::T*)weight, columns}, {}, {adapter, adapter, nullptr, 0}, out, rows,
                             columns, around, threads);
}

// The widest vectors whose columns share a scale, and fill what lies on either side of a gate.
template <class D, int L>
static int four_bits(const void* x, Scaled<D, 4> weight, Int8<D> apart, const Adapter& adapter, void* out, int64_t rows,
                     const Around& around, int64_t threads) {
  const int64_t outs = around.gate ? weight.columns / 2 : weight.columns;
  if constexpr (L > 4)
    if (weight.share % (8 * L) || outs % (8 * L))
      return four_bits<D, L / 2>(x, weight, apart, adapter, out, rows, around, threads);
  return linear<D, Int4<D, L>>(x, {weight}, apart, adapter, out, rows, weight.columns, around, threads);
}

template <class D>
static int quantized(const void* x, const void* weight, const void* scales, const void* adapter, const void* adapter_scales,
                     const Adapter& adapted, void* out, int64_t rows, int64_t columns, int64_t bits, int64_t share,
                     int64_t adapter_share, const Around& around, int64_t threads) {
  typedef typename D::T T;
  for (int64_t j = 0; j < adapted.picked; j++)
    if (adapted.chosen[j] < 0 || adapted.chosen[j] >= around.channels) return 1;
  const Int8<D> apart{{(const uint8_t*)adapter, (const T*)adapter_scales, columns, adapter_share}};
  if (bits == 4)
    return four_bits<D, LANES>(x, {(const uint8_t*)weight, (const T*)scales, columns, share}, apart, adapted, out, rows,
                               around, threads);
  const Int8<D> bytes{{(const uint8_t*)weight, (const T*)scales, columns, share}};
  return linear<D, Int8<D>>(x, bytes, apart, adapted, out, rows, columns, around, threads);
}
