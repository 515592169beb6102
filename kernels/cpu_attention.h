// Attention of one token over a static cache, with the cache's new row and the rotary embedding.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "cpu_dtypes.h"
#include "cpu_gates.h"
#include "cpu_threads.h"

template <class D>
struct Attention {
  typedef typename D::T T;
  int64_t next, items;  // item = a key/value head and the query heads that share it, so that the cache is read once
  const T* q;           // [items, group, dim]
  T *keys, *values;     // [items, length, dim]
  const uint8_t* mask;  // [length] every ``mask_stride`` bytes for each sequence of ``heads`` items, or null
  const T *k, *v;       // [items, dim]: the cache's new row, or null
  const T *cosine, *sine;  // [dim], or null
  T* out;               // like q
  float* scratch;       // [items, group, dim + length] and then [items, length] integers
  int64_t heads, group, length, dim, mask_stride, position;
  float scale;

  // x * cos + rotate_half(x) * sin at channels i..i+PAIR of a head. Half of dim is a multiple of PAIR.
  INLINE void turned(const Attention& t, const T* x, int64_t i, vf& a, vf& b) {
    D::get(x + i, a, b);
    if (!t.cosine) return;
    vf c, d, e, f;
    D::get(t.cosine + i, c, d), a *= c, b *= d;
    bool first = i < t.dim / 2;
    D::get(x + (first ? i + t.dim / 2 : i - t.dim / 2), c, d), D::get(t.sine + i, e, f);
    if (first)
      a -= c * e, b -= d * f;
    else
      a += c * e, b += d * f;
  }

  void item(int64_t i) {
    T *key = keys + i * length * dim, *value = values + i * length * dim;
    float *query = scratch + i * group * (dim + length), *score = query + group * dim;
    int32_t* seen = (int32_t*)(scratch + items * group * (dim + length)) + i * length;
    vf a, b, x, y;
    if (k) {
      for (int64_t c = 0; c < dim; c += PAIR)
        turned(*this, k + i * dim, c, a, b), D::put(key + position * dim + c, a, b);
      memcpy(value + position * dim, v + i * dim, dim * sizeof(T));
    }
    for (int64_t g = 0; g < group; g++)
      for (int64_t c = 0; c < dim; c += PAIR) {
        turned(*this, q + (i * group + g) * dim, c, a, b);
        store(query + g * dim + c, a * scale), store(query + g * dim + c + LANES, b * scale);
      }
    const uint8_t* allowed = mask ? mask + i / heads * mask_stride : nullptr;
    int64_t n = 0;
    for (int64_t j = 0; j < length; j++) seen[n] = (int32_t)j, n += !allowed || allowed[j];

    for (int64_t j = 0; j < n; j++)
      for (int64_t g = 0; g < group; g++) {
        vf p = {}, r = {};
        for (int64_t c = 0; c < dim; c += PAIR) {
          D::get(key + seen[j] * dim + c, a, b);
          p += a * load<vf>(query + g * dim + c), r += b * load<vf>(query + g * dim + c + LANES);
        }
        score[g * length + j] = total(p + r);
      }
    for (int64_t g = 0; g < group; g++) {
      float *s = score + g * length, top = -INFINITY;
      vf sums = {};
      for (int64_t j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
      for (int64_t j = 0; j < n; j += LANES) {
        vf e = {};
        int64_t width = min(LANES, n - j);
        memcpy(&e, s + j, width * sizeof(float));
        e = exponential(e - top);
        memcpy(s + j, &e, width * sizeof(float));
        for (int64_t l = width; l < LANES; l++) e[l] = 0;
        sums += e;
      }
      for (int64_t c = 0; c < dim; c += PAIR) {
        x = vf{}, y = vf{};
        for (int64_t j = 0; j < n; j++) D::get(value + seen[j] * dim + c, a, b), x += a * s[j], y += b * s[j];
        float share = n ? 1 / total(sums) : 0;
        D::put(out + (i * group + g) * dim + c, x * share, y * share);
      }
    }
  }
};

template <class D>
static int attend(const void* q, void* keys, void* values, const void* mask, const void* k, const void* v,
                  const int64_t* position, const void* cosine, const void* sine, void* out, int64_t batch, int64_t heads,
                  int64_t group, int64_t length, int64_t dim, int64_t mask_stride, double scale, int64_t threads) {
  typedef typename D::T T;
  if (k && (uint64_t)*position >= (uint64_t)length) return 1;
  int64_t items = batch * heads;
  float* scratch = (float*)malloc(items * (group * (dim + length) * sizeof(float) + length * sizeof(int32_t)) + 1);
  if (!scratch) return 2;
  Attention<D> job = {0, items, (const T*)q, (T*)keys, (T*)values, (const uint8_t*)mask, (const T*)k, (const T*)v,
                      (const T*)cosine, (const T*)sine, (T*)out, scratch, heads, group, length, dim, mask_stride,
                      k ? *position : 0, (float)scale};
  parallel(job, (int)(items * length * dim * (int64_t)sizeof(T) < SERIAL ? 1 : threads));
  free(scratch);
  return 0;
}
