// Exact Top-K of a row by magnitude, and what reaches a threshold.
#pragma once

#include "cpu_dtypes.h"

// How many of x[0..n) have a key >= t.
template <class D>
static int64_t count(const typename D::T* x, int64_t n, typename D::Key t) {
  typedef typename D::VKey V;
  typedef typename D::Key Key;
  constexpr int L = VB / sizeof(Key);
  int64_t i = 0, total = 0;
  while (i + 2 * L <= n) {
    int64_t end = min(n - 2 * L + 1, i + 2 * L * 65535);  // 16-bit lanes hold no more
    V a = V{}, b = V{};
    for (; i < end; i += 2 * L) {
      a -= (V)((load<V>(x + i) & D::MASK) >= t);
      b -= (V)((load<V>(x + i + L) & D::MASK) >= t);
    }
    Key lanes[2 * L];
    store(lanes, a);
    store(lanes + L, b);
    uint32_t sum = 0;
    for (int l = 0; l < 2 * L; l++) sum += lanes[l];
    total += sum;
  }
  for (; i < n; i++) {
    Key key;
    memcpy(&key, x + i, sizeof key);
    total += (key & D::MASK) >= t;
  }
  return total;
}

// The k-th largest key t, i.e. the largest t with count(t) >= k. *taken = count(t).
template <class D>
static typename D::Key threshold(const typename D::T* x, int64_t n, int64_t k, int64_t* taken) {
  constexpr int64_t OCTAVE = (D::MASK + 1LL) >> 7;  // no wider than this, keys are spread evenly enough to interpolate
  int64_t lo = 0, hi = (int64_t)D::MASK + 1, at_lo = n, at_hi = 0;
  // Every other step halves, so the worst input costs twice the key's bits; 13 to 16 passes over x are usual. A pass
  // runs at cache speed, a whole vector a cycle, where a histogram counts one element at a time.
  for (bool halve = true; hi - lo > 1 && at_lo != k; halve = !halve) {
    int64_t mid = lo + (hi - lo) / 2;
    if (!halve && hi - lo <= OCTAVE)
      mid = min(hi - 1, max(lo + 1, lo + (int64_t)((double)(hi - lo) * (at_lo - k) / (at_lo - at_hi))));
    int64_t c = count<D>(x, n, (typename D::Key)mid);
    if (c >= k)
      lo = mid, at_lo = c;
    else
      hi = mid, at_hi = c;
  }
  *taken = at_lo;
  return (typename D::Key)lo;
}

// Appends the channels of [begin, end) whose key is >= t, up to k in all; returns how many are in the list then.
template <class D>
static int64_t compact(const typename D::T* x, int64_t begin, int64_t end, typename D::Key t, typename D::T* values,
                       int32_t* indices, int64_t n, int64_t k) {
  int64_t i = begin;
#if defined(__AVX512F__)
  // Halves the time of the whole selection; the compiler does not find it.
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= end && n + 16 <= k; i += 16) {
    __m512i bits = D::widen(x + i);
    __mmask16 m = _mm512_cmpge_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(D::MASK)), _mm512_set1_epi32(t));
    store(indices + n, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(step, _mm512_set1_epi32((int)i))));
    D::narrow(values + n, _mm512_maskz_compress_epi32(m, bits));
    n += __builtin_popcount(m);
  }
#endif
  for (; i < end && n < k; i++) {  // no branch on the data: nobody can predict it
    typename D::Key key;
    memcpy(&key, x + i, sizeof key);
    values[n] = x[i], indices[n] = (int32_t)i;
    n += (key & D::MASK) >= t;
  }
  return n;
}

template <class D>
static void select_row(const typename D::T* x, int64_t channels, int64_t k, typename D::T* values, int32_t* indices) {
  typedef typename D::Key Key;
  int64_t taken, cut = channels;
  const Key t = threshold<D>(x, channels, k, &taken), over = (Key)(t + 1);
  if (taken > k) {
    // More ties than places: those of the lowest channels get in. Halve [begin, cut) round the last of them.
    int64_t places = k - count<D>(x, channels, over);
    for (int64_t begin = 0; cut - begin > 1;) {
      int64_t half = (cut - begin) / 2, ties = count<D>(x + begin, half, t) - count<D>(x + begin, half, over);
      if (ties >= places)
        cut = begin + half;
      else
        places -= ties, begin += half;
    }
  }
  int64_t n = compact<D>(x, 0, cut, t, values, indices, 0, k);
  compact<D>(x, cut, channels, over, values, indices, n, k);
}

// The lowest key whose magnitude times scale is not below t. A NaN never is, and MASK is one's.
template <class D>
static typename D::Key reaching(float t, float scale) {
  typename D::Key lo = 0, hi = D::MASK;
  while (lo < hi) {
    typename D::Key mid = lo + (hi - lo) / 2;
    typename D::T x;
    memcpy(&x, &mid, sizeof x);
    if (D::get1(x) * scale < t)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

template <class D>
struct Select {
  int64_t next, items;
  const typename D::T* x;
  typename D::T* values;
  int32_t* indices;
  int64_t channels, k;
  void item(int64_t row) { select_row<D>(x + row * channels, channels, k, values + row * k, indices + row * k); }
};
