// Attention of the new tokens of each sequence over a static cache, with the cache's new rows and the rotary embedding.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "cpu_dtypes.h"
#include "cpu_gates.h"
#include "cpu_threads.h"

// In q, k, v and the result each token's heads lie together: [batch, tokens, heads, dim].
template <class D>
struct Attention {
  typedef typename D::T T;
  static constexpr int SIDE = 4;          // queries that share a key or a value while it is in registers
  static constexpr int64_t STRETCH = 64;  // positions whose values all queries take before the next are read
  int64_t next, items;  // item = a key/value head and the queries of all tokens in the heads that share it
  const T* q;
  T *keys, *values;         // [items, length, dim]
  const uint8_t* mask;      // [tokens, length] every ``mask_stride`` bytes for each sequence, or null
  const T *k, *v;           // the cache's new rows, or null
  const int64_t* position;  // [tokens]: where they go
  const T *cosine, *sine;   // [tokens, dim] every ``turn_stride`` elements for each sequence, or null
  T* out;
  float* scratch;  // for each item queries * (dim + length + 1) floats and ``length`` integers, queries = tokens * group
  int64_t heads, group, tokens, length, dim, mask_stride, turn_stride;
  float scale;

  // x * cos + rotate_half(x) * sin at channels i..i+PAIR of a head. Half of dim is a multiple of PAIR.
  void turned(const T* x, int64_t sequence, int64_t token, int64_t i, vf& a, vf& b) const {
    D::get(x + i, a, b);
    if (!cosine) return;
    const int64_t angle = sequence * turn_stride + token * dim;
    vf c, d, e, f;
    D::get(cosine + angle + i, c, d), a *= c, b *= d;
    bool first = i < dim / 2;
    D::get(x + (first ? i + dim / 2 : i - dim / 2), c, d), D::get(sine + angle + i, e, f);
    if (first)
      a -= c * e, b -= d * f;
    else
      a += c * e, b += d * f;
  }

  // The products of N queries with a key, each to a score ``length`` behind the last.
  template <int N>
  void dots(const T* key, const float* query, float* score) const {
    const int64_t dim = this->dim;  // in a register: for all the compiler knows, a store might reach a member
    vf p[N] = {}, r[N] = {}, a, b;
    for (int64_t c = 0; c < dim; c += PAIR) {
      D::get(key + c, a, b);
      for (int n = 0; n < N; n++)
        p[n] += a * load<vf>(query + n * dim + c), r[n] += b * load<vf>(query + n * dim + c + LANES);
    }
    for (int n = 0; n < N; n++) score[n * length] = total(p[n] + r[n]);
  }

  // Adds to N sums the values of some positions, weighted.
  template <int N>
  void mix(const T* value, const int32_t* seen, int64_t count, const float* weight, float* sum) const {
    const int64_t dim = this->dim, length = this->length;
    vf x[N], y[N], a, b;
    for (int64_t c = 0; c < dim; c += PAIR) {
      for (int n = 0; n < N; n++) x[n] = load<vf>(sum + n * dim + c), y[n] = load<vf>(sum + n * dim + c + LANES);
      for (int64_t j = 0; j < count; j++) {
        D::get(value + seen[j] * dim + c, a, b);
        for (int n = 0; n < N; n++) x[n] += a * weight[n * length + j], y[n] += b * weight[n * length + j];
      }
      for (int n = 0; n < N; n++) store(sum + n * dim + c, x[n]), store(sum + n * dim + c + LANES, y[n]);
    }
  }

  // Scores become e^(score - highest), 0 where ``allowed`` hides a position; null hides none. Returns what to multiply them
  // by for their sum to be 1.
  static float weigh(float* score, const int32_t* seen, int64_t count, const uint8_t* allowed) {
    int64_t shown = count;
    float top = -INFINITY;
    vf sums = {};
    for (int64_t j = 0; allowed && j < count; j++)
      if (!allowed[seen[j]]) score[j] = -INFINITY, shown--;
    for (int64_t j = 0; j < count; j++) top = score[j] > top ? score[j] : top;
    if (!shown) top = 0;
    for (int64_t j = 0; j < count; j += LANES) {
      vf e = {};
      int64_t width = min(LANES, count - j);
      memcpy(&e, score + j, width * sizeof(float));
      e = exponential(e - top);
      memcpy(score + j, &e, width * sizeof(float));
      for (int64_t l = width; l < LANES; l++) e[l] = 0;
      sums += e;
    }
    return shown ? 1 / total(sums) : 0;
  }

  void item(int64_t i) {
    const int64_t sequence = i / heads, head = i % heads, queries = tokens * group;
    T *key = keys + i * length * dim, *value = values + i * length * dim;
    float *query = scratch + i * (queries * (dim + length + 1) + length), *score = query + queries * dim;
    float* share = score + queries * length;
    int32_t* seen = (int32_t*)(share + queries);
    vf a, b;
    if (k)
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t from = ((sequence * tokens + t) * heads + head) * dim, to = position[t] * dim;
        for (int64_t c = 0; c < dim; c += PAIR) turned(k + from, sequence, t, c, a, b), D::put(key + to + c, a, b);
        memcpy(value + to, v + from, dim * sizeof(T));
      }
    // Query n is token n / group's in head n % group of the group.
    const auto place = [&](int64_t n) {
      return (((sequence * tokens + n / group) * heads + head) * group + n % group) * dim;
    };
    for (int64_t n = 0; n < queries; n++)
      for (int64_t c = 0; c < dim; c += PAIR) {
        turned(q + place(n), sequence, n / group, c, a, b);
        store(query + n * dim + c, a * scale), store(query + n * dim + c + LANES, b * scale);
      }
    const uint8_t* allowed = mask ? mask + sequence * mask_stride : nullptr;
    int64_t count = 0;  // positions that any token sees
    for (int64_t j = 0; j < length; j++) {
      uint8_t any = !allowed;
      for (int64_t t = 0; allowed && t < tokens; t++) any |= allowed[t * length + j];
      seen[count] = (int32_t)j, count += any != 0;
    }

    for (int64_t j = 0; j < count; j++) {
      int64_t n = 0;
      for (; n + SIDE <= queries; n += SIDE) dots<SIDE>(key + seen[j] * dim, query + n * dim, score + n * length + j);
      for (; n < queries; n++) dots<1>(key + seen[j] * dim, query + n * dim, score + n * length + j);
    }
    const bool differ = allowed && tokens > 1;  // a single token sees all that are seen
    for (int64_t n = 0; n < queries; n++)
      share[n] = weigh(score + n * length, seen, count, differ ? allowed + n / group * length : nullptr);
    float* sum = query;  // the queries have done their work
    memset(sum, 0, queries * dim * sizeof(float));
    for (int64_t j = 0; j < count; j += STRETCH) {
      const int64_t some = min(STRETCH, count - j);
      int64_t n = 0;
      for (; n + SIDE <= queries; n += SIDE) mix<SIDE>(value, seen + j, some, score + n * length + j, sum + n * dim);
      for (; n < queries; n++) mix<1>(value, seen + j, some, score + n * length + j, sum + n * dim);
    }
    for (int64_t n = 0; n < queries; n++)
      for (int64_t c = 0; c < dim; c += PAIR)
        D::put(out + place(n) + c, load<vf>(sum + n * dim + c) * share[n], load<vf>(sum + n * dim + c + LANES) * share[n]);
  }
};

template <class D>
static int attend(const void* q, void* keys, void* values, const void* mask, const void* k, const void* v,
                  const int64_t* position, const void* cosine, const void* sine, void* out, int64_t batch, int64_t heads,
                  int64_t group, int64_t tokens, int64_t length, int64_t dim, int64_t mask_stride, int64_t turn_stride,
                  double scale, int64_t threads) {
  typedef typename D::T T;
  for (int64_t t = 0; k && t < tokens; t++)
    if ((uint64_t)position[t] >= (uint64_t)length) return 1;
  int64_t items = batch * heads, queries = tokens * group;
  static_assert(sizeof(float) == sizeof(int32_t), "the scratch holds both");
  float* scratch = (float*)malloc(items * (queries * (dim + length + 1) + length) * sizeof(float) + 1);
  if (!scratch) return 2;
  Attention<D> job = {0, items, (const T*)q, (T*)keys, (T*)values, (const uint8_t*)mask, (const T*)k, (const T*)v, position,
                      (const T*)cosine, (const T*)sine, (T*)out, scratch, heads, group, tokens, length, dim, mask_stride,
                      turn_stride, (float)scale};
  parallel(job, (int)(items * length * dim * (int64_t)sizeof(T) < SERIAL ? 1 : threads));
  free(scratch);
  return 0;
}
