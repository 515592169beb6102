// Exact top-k selection by magnitude, the gather GEMV that reads only the selected weight rows, and both as one call with
// what stands before and behind them; the dense product with a weight that lies as nn.Linear has it; attention of one
// token over a static cache.
//
// Plain C entry points, no torch headers and no symbol of the C++ runtime: compiles in about a second with g++ or
// clang++ and loads beside any libstdc++. Threads are torch's own OpenMP pool: the caller hands over the address of
// GOMP_parallel (on Linux libgomp, libomp and libiomp5 all export it), so no second runtime enters the process.
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// ------------------------------------------------------------------------------------------------------------ vectors
#if defined(__AVX512F__)
constexpr int VB = 64;
#elif defined(__AVX__)
constexpr int VB = 32;
#else
constexpr int VB = 16;
#endif
constexpr int LANES = VB / 4;
typedef float vf __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef uint16_t vs __attribute__((vector_size(VB)));

// memcpy instead of a pointer cast: rows of an odd N start anywhere. It compiles to one unaligned move.
template <class V>
INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

// The sum of a vector's elements, by halves: one after the other they would wait for each other.
INLINE float total(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int width = LANES / 2; width; width /= 2)
    for (int l = 0; l < width; l++) v[l] += v[l + width];
  return v[0];
#endif
}

INLINE float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// ------------------------------------------------------------------------------------------------------------- dtypes
// Key: the integer whose order is the order of magnitudes (sign bit cleared). get and put move PAIR elements between
// memory and two vectors of floats, in whatever order is cheapest: accumulators stay in that order until put. Bits: the
// type that selection works on, where only the bits count.
constexpr int PAIR = 2 * LANES;

struct Float {
  typedef Float Bits;
  typedef float T;
  typedef uint32_t Key;
  typedef vu VKey;
  static constexpr Key MASK = 0x7fffffff;
  INLINE void get(const T* p, vf& a, vf& b) { a = load<vf>(p), b = load<vf>(p + LANES); }
  INLINE void put(T* p, vf a, vf b) { store(p, a), store(p + LANES, b); }
  INLINE float get1(T x) { return x; }
  INLINE T put1(float x) { return x; }
#if defined(__AVX512F__)
  INLINE __m512i widen(const T* p) { return load<__m512i>(p); }
  INLINE void narrow(T* p, __m512i x) { store(p, x); }
#endif
};

struct BFloat {
  typedef BFloat Bits;
  typedef uint16_t T;
  typedef uint16_t Key;
  typedef vs VKey;
  static constexpr Key MASK = 0x7fff;
  // a gets the even elements and b the odd ones: a shift and a mask, where widening in order costs twice as much.
  INLINE void get(const T* p, vf& a, vf& b) {
    vu x = load<vu>(p);
    a = (vf)(x << 16), b = (vf)(x & 0xffff0000);
  }
  INLINE void put(T* p, vf a, vf b) { store(p, (round(a) >> 16) | (round(b) & 0xffff0000)); }
  INLINE float get1(T x) { return bits_float((uint32_t)x << 16); }
  INLINE T put1(float x) {
    uint32_t u = float_bits(x);
    return (T)((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  // The upper half is x to the nearest even; a NaN stays one.
  INLINE vu round(vf x) {
    vu u = (vu)x, nan = (vu)((u & 0x7fffffff) > 0x7f800000);
    return ((u + 0x7fff + (u >> 16 & 1)) & ~nan) | ((u | 0x400000) & nan);
  }
#if defined(__AVX512F__)
  INLINE __m512i widen(const T* p) { return _mm512_cvtepu16_epi32(load<__m256i>(p)); }
  INLINE void narrow(T* p, __m512i x) { store(p, _mm512_cvtepi32_epi16(x)); }
#endif
};

struct Half {
  typedef BFloat Bits;
  typedef uint16_t T;
  typedef uint16_t Key;
  typedef vs VKey;
  static constexpr Key MASK = 0x7fff;
#if defined(__F16C__)
  INLINE float get1(T x) { return _cvtsh_ss(x); }
  INLINE T put1(float x) { return (T)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#if defined(__AVX512F__)
  INLINE vf wide(const T* p) { return (vf)_mm512_cvtph_ps(load<__m256i>(p)); }
  INLINE void narrow(T* p, vf x) { store(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)); }
#else
  INLINE vf wide(const T* p) { return (vf)_mm256_cvtph_ps(load<__m128i>(p)); }
  INLINE void narrow(T* p, vf x) { store(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
#endif
#elif defined(__aarch64__)
  typedef __fp16 h1;
  typedef h1 hv __attribute__((vector_size(VB / 2)));
  INLINE float get1(T x) {
    h1 h;
    memcpy(&h, &x, 2);
    return h;
  }
  INLINE T put1(float x) {
    h1 h = x;
    T t;
    memcpy(&t, &h, 2);
    return t;
  }
  INLINE vf wide(const T* p) { return __builtin_convertvector(load<hv>(p), vf); }
  INLINE void narrow(T* p, vf x) { store(p, __builtin_convertvector(x, hv)); }
#else
  INLINE float get1(T x) {
    uint32_t m = (uint32_t)(x & 0x7fff) << 13, s = (uint32_t)(x & 0x8000) << 16;
    // Scaling by 2^112 moves the exponent's bias and normalises denormals; Inf and NaN keep an all-ones exponent.
    uint32_t u = m >= 0x0f800000 ? m | 0x7f800000 : float_bits(bits_float(m) * 0x1p112f);
    return bits_float(u | s);
  }
  INLINE T put1(float x) {
    uint32_t u = float_bits(x), s = u >> 16 & 0x8000, m = u & 0x7fffffff;
    if (m > 0x7f800000) return (T)(s | 0x7e00);
    if (m >= 0x477ff000) return (T)(s | 0x7c00);
    if (m < 0x38800000) return (T)(s | (float_bits(bits_float(m) + 0.5f) - 0x3f000000));  // the adder rounds denormals
    return (T)(s | ((m - 0x38000000 + 0xfff + (m >> 13 & 1)) >> 13));
  }
  INLINE vf wide(const T* p) {
    vf r;
    for (int i = 0; i < LANES; i++) r[i] = get1(p[i]);
    return r;
  }
  INLINE void narrow(T* p, vf x) {
    for (int i = 0; i < LANES; i++) p[i] = put1(x[i]);
  }
#endif
  INLINE void get(const T* p, vf& a, vf& b) { a = wide(p), b = wide(p + LANES); }
  INLINE void put(T* p, vf a, vf b) { narrow(p, a), narrow(p + LANES, b); }
};

// ------------------------------------------------------------------------------------------------------------ threads
typedef void (*gomp_parallel_t)(void (*)(void*), void*, unsigned, unsigned);
static gomp_parallel_t gomp_parallel = nullptr;

// An OpenMP pool does not survive fork: its threads are gone and the next region would wait for them for ever.
static void in_child() { gomp_parallel = nullptr; }

// Every thread takes items from one counter until none is left. So fewer threads than asked for are harmless, and which
// thread computes an item changes nothing in the result.
template <class Job>
static void worker(void* p) {
  Job& job = *(Job*)p;
  for (int64_t i; (i = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED)) < job.items;) job.item(i);
}
template <class Job>
static void parallel(Job& job, int threads) {
  job.next = 0;
  if (threads > job.items) threads = (int)job.items;
  if (threads > 1 && gomp_parallel)
    gomp_parallel(worker<Job>, &job, (unsigned)threads, 0);
  else
    worker<Job>(&job);
}

INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------------------- selection
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

// --------------------------------------------------------------------------------------------------------------- gates
enum Gate { NONE, SILU, GELU, GELU_TANH, RELU };

INLINE vf select(vi where, vf a, vf b) { return (vf)(((vi)a & where) | ((vi)b & ~where)); }

// e^x to 2 ulp; 0, Inf and NaN where they belong.
INLINE vf exponential(vf x) {
  x = select((vi)(x > 104), vf{} + 104, x), x = select((vi)(x < -104), vf{} - 104, x);
  const vf round = vf{} + 0x1.8p23f;  // its last bit is worth 1: adding it rounds, and leaves the integer in the low bits
  vf shifted = x * 1.44269504f + round, n = shifted - round;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = ((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
          1.6666665459e-1f) * r + 5.0000001201e-1f;
  vi power = (vi)shifted - (vi)round, half = power >> 1;  // in two steps, since 2^150 is no float
  return (p * r * r + r + 1) * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
}

INLINE vf activate(vf x, int64_t gate) {
  switch (gate) {
    case SILU:
      return x / (1 + exponential(-x));
    case GELU_TANH:  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
      return x / (1 + exponential(x * (-1.59576912f - 0.0713548163f * x * x)));
    case GELU: {
      vf y;
      for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.707106781f));
      return y;
    }
    default:
      return select((vi)(x <= 0), vf{}, x);  // a NaN stays
  }
}

// --------------------------------------------------------------------------------------------------------------- GEMV
// acc[0..width) += sum over r in [0, R) of v[r] * w[index[r] * stride + (0..width)), one r after the other in every
// column, so how rows are grouped leaves the bits alone. ahead: the rows of the next group, prefetched meanwhile: the
// hardware does not see where the next row will start, which costs short rows a third of the bandwidth.
template <class D, int R>
INLINE void add_rows(float* acc, int64_t width, const float* v, const int32_t* index, const typename D::T* w,
                     int64_t stride, const int32_t* ahead) {
  typedef typename D::T T;
  constexpr int LINE = 64 / sizeof(T), STEP = LINE > PAIR ? LINE : PAIR, PAIRS = STEP / PAIR;
  const T *row[R], *next[R];
  for (int r = 0; r < R; r++) row[r] = w + index[r] * stride, next[r] = w + ahead[r] * stride;
  int64_t c = 0;
  for (; c + STEP <= width; c += STEP) {
    vf sum[2 * PAIRS];
    for (int s = 0; s < 2 * PAIRS; s++) sum[s] = load<vf>(acc + c + s * LANES);
    for (int r = 0; r < R; r++) {
      for (int s = 0; s < PAIRS; s++) {
        vf a, b;
        D::get(row[r] + c + s * PAIR, a, b);
        sum[2 * s] += a * v[r], sum[2 * s + 1] += b * v[r];
      }
      for (int l = 0; l < STEP; l += LINE) __builtin_prefetch(next[r] + c + l);
    }
    for (int s = 0; s < 2 * PAIRS; s++) store(acc + c + s * LANES, sum[s]);
  }
  for (; c + PAIR <= width; c += PAIR) {
    vf p = load<vf>(acc + c), q = load<vf>(acc + c + LANES);
    for (int r = 0; r < R; r++) {
      vf a, b;
      D::get(row[r] + c, a, b);
      p += a * v[r], q += b * v[r];
    }
    store(acc + c, p), store(acc + c + LANES, q);
  }
  for (; c < width; c++)
    for (int r = 0; r < R; r++) acc[c] += D::get1(row[r][c]) * v[r];
}

constexpr int GROUP = 8;           // rows fused a pass: accumulators are loaded and stored once for all of them
constexpr int64_t ACC = 4096;      // accumulators of one item, on its stack: half of a 32 KB L1
constexpr int64_t SLICE = 64;      // slabs and tiles are whole slices: a multiple of PAIR and of a cache line
constexpr int64_t NARROW = 1024;   // bytes: the rows of a narrower slab are mostly waiting for their first line
constexpr int64_t BLOCK = 512;     // channels that several rows work through together
constexpr int64_t ROWS = ACC / SLICE;
constexpr int64_t SERIAL = 65536;  // bytes: with less to read, waking a thread costs more than it saves

template <class D>
struct Gemv {
  typedef typename D::T T;
  const float* v;         // [rows, stride], widened
  const int32_t* index;   // [rows, stride]
  const T* w;             // [channels, columns]
  T* out;                 // [rows, outs]: gate(half of the columns) * the other half, or all of them
  int64_t rows, columns, stride;
  int64_t gate = NONE;
  const T* bias = nullptr;      // [columns]
  const T* residual = nullptr;  // [rows, outs]
  int64_t length[ROWS];         // of every row's list
  int64_t next, items, halves, outs, slab, slabs, splits;
  float* partial;         // [splits, rows, columns] if splits > 1
  int* arrived;           // [slabs] if splits > 1

  // Item = one slab of outputs x one range of every row's list.
  void item(int64_t i) {
    int64_t s = i % slabs, split = i / slabs, c0 = s * slab, c1 = min(outs, c0 + slab);
    int64_t tile = ACC / (rows * halves) / SLICE * SLICE;
    alignas(VB) float acc[ACC];
    for (int64_t c = c0; c < c1; c += tile) {
      int64_t width = min(tile, c1 - c);
      memset(acc, 0, rows * halves * tile * sizeof(float));
      for (int64_t h = 0; h < halves; h++)
        if (rows == 1)
          run(acc + h * tile, width, 0, start(0, split), start(0, split + 1), c + h * outs);
        else
          blocked(acc + h * rows * tile, tile, width, split, c + h * outs);
      for (int64_t m = 0; m < rows; m++) {
        float* sum = acc + m * tile;
        if (splits == 1)
          finish(m, c, sum, sum + rows * tile, width);
        else
          for (int64_t h = 0; h < halves; h++)
            memcpy(partial + (split * rows + m) * columns + h * outs + c, sum + h * rows * tile, width * sizeof(float));
      }
    }
    // The last to arrive adds up the splits, always in the same order.
    if (splits > 1 && __atomic_add_fetch(arrived + s, 1, __ATOMIC_ACQ_REL) == splits)
      for (int64_t m = 0; m < rows; m++) {
        float* sum = partial + m * columns;
        for (int64_t p = 1; p < splits; p++) {
          const float* other = partial + (p * rows + m) * columns;
          for (int64_t h = 0; h < columns; h += outs)
            for (int64_t c = h + c0; c < h + c1; c++) sum[c] += other[c];
        }
        finish(m, c0, sum + c0, sum + outs + c0, c1 - c0);
      }
  }

  // Where a split of a row's list begins.
  int64_t start(int64_t m, int64_t split) { return length[m] * split / splits; }

  // Several rows: their lists advance together, a block of channels at a time, so that what one row has fetched is
  // still in the cache when the next one wants it. Lists that do not ascend are only slower.
  void blocked(float* acc, int64_t tile, int64_t width, int64_t split, int64_t c) {
    int64_t at[ROWS], end[ROWS];
    for (int64_t m = 0; m < rows; m++) at[m] = start(m, split), end[m] = start(m, split + 1);
    bool more = true;
    for (int64_t limit = BLOCK; more; limit += BLOCK) {
      more = false;
      for (int64_t m = 0; m < rows; m++) {
        const int32_t* list = index + m * stride;
        int64_t j = at[m];
        while (j < end[m] && list[j] < limit) j++;
        run(acc + m * tile, width, m, at[m], j, c);
        at[m] = j;
        more |= j < end[m];
      }
    }
  }

  void run(float* acc, int64_t width, int64_t m, int64_t j, int64_t end, int64_t c) {
    const float* x = v + m * stride;
    const int32_t* list = index + m * stride;
    const T* base = w + c;
    for (; j + 2 * GROUP <= end; j += GROUP)
      add_rows<D, GROUP>(acc, width, x + j, list + j, base, columns, list + j + GROUP);
    for (; j + GROUP <= end; j += GROUP)
      add_rows<D, GROUP>(acc, width, x + j, list + j, base, columns, list + j);
    for (; j + 4 <= end; j += 4) add_rows<D, 4>(acc, width, x + j, list + j, base, columns, list + j);
    for (; j < end; j++) add_rows<D, 1>(acc, width, x + j, list + j, base, columns, list + j);
  }

  // out[m][c..) from the sums of its columns, a, and behind a gate those of the other half, b.
  void finish(int64_t m, int64_t c, const float* a, const float* b, int64_t width) {
    T* y = out + m * outs + c;
    const T *add = bias ? bias + c : nullptr, *last = residual ? residual + m * outs + c : nullptr;
    int64_t i = 0;
    for (; i + PAIR <= width; i += PAIR) {
      vf p = load<vf>(a + i), q = load<vf>(a + i + LANES), s, t;
      if (add) D::get(add + i, s, t), p += s, q += t;
      if (gate) {
        vf u = load<vf>(b + i), v = load<vf>(b + i + LANES);
        if (add) D::get(add + outs + i, s, t), u += s, v += t;
        p = activate(p, gate) * u, q = activate(q, gate) * v;
      }
      if (last) D::get(last + i, s, t), p += s, q += t;
      D::put(y + i, p, q);
    }
    for (; i < width; i++) {
      float p = a[i] + (add ? D::get1(add[i]) : 0);
      if (gate) p = activate(vf{} + p, gate)[0] * (b[i] + (add ? D::get1(add[outs + i]) : 0));
      y[i] = D::put1(p + (last ? D::get1(last[i]) : 0));
    }
  }

  // Deals out the work and does it. Returns whether there was memory for the partial sums.
  bool multiply(int64_t threads) {
    int64_t listed = 0, longest = 0;
    for (int64_t m = 0; m < rows; m++) listed += length[m], longest = max(longest, length[m]);
    if (listed * columns * (int64_t)sizeof(T) < SERIAL) threads = 1;
    halves = gate ? 2 : 1, outs = columns / halves;
    // Whole rows stream better than narrow slabs, so a few threads share a slab and split the list. Only a few, unless
    // the rows are short: adding up the splits is work, too.
    splits = threads % 4 == 0 ? 4 : threads % 3 == 0 ? 3 : threads % 2 == 0 ? 2 : 1;
    slabs = max(1, min(threads / splits, outs * (int64_t)sizeof(T) / NARROW));
    slab = max(SLICE, ((outs + slabs - 1) / slabs + SLICE - 1) / SLICE * SLICE);
    slabs = (outs + slab - 1) / slab;
    splits = max(1, min(threads / slabs, longest / 32));
    items = slabs * splits;

    int64_t sums = splits > 1 ? splits * rows * columns : 0;
    partial = (float*)malloc(sums * sizeof(float) + slabs * sizeof(int));
    if (!partial) return false;
    arrived = (int*)(partial + sums);
    memset(arrived, 0, slabs * sizeof(int));
    parallel(*this, (int)threads);
    free(partial);
    return true;
  }
};

template <class D>
static int gemv(const void* values, const int32_t* index, const void* weight, void* out, int64_t rows, int64_t channels,
                int64_t columns, int64_t k, int64_t threads) {
  typedef typename D::T T;
  uint32_t top = 0;  // a negative index is a huge one
  for (int64_t j = 0; j < rows * k; j++) top = (uint32_t)index[j] > top ? (uint32_t)index[j] : top;
  if (rows * k > 0 && top >= channels) return 1;
  if (rows * columns == 0) return 0;

  float* wide = (float*)malloc(rows * k * sizeof(float) + 1);
  if (!wide) return 2;
  for (int64_t j = 0; j < rows * k; j++) wide[j] = D::get1(((const T*)values)[j]);
  Gemv<D> job = {wide, index, (const T*)weight, (T*)out, rows, columns, k};
  for (int64_t m = 0; m < rows; m++) job.length[m] = k;
  bool done = job.multiply(threads);
  free(wide);
  return done ? 0 : 2;
}

// -------------------------------------------------------------------------------------------------------------- linear
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

// ------------------------------------------------------------------------------------------------------- dense product
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

// ----------------------------------------------------------------------------------------------------------- attention
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

// ---------------------------------------------------------------------------------------------------------------- API
enum { BF16, FP16, FP32 };

extern "C" void larosa_init(void* gomp) {
  gomp_parallel = (gomp_parallel_t)gomp;
  pthread_atfork(nullptr, nullptr, in_child);
}

// x [rows, channels] -> values, indices [rows, k]; 1 <= k <= channels.
extern "C" void larosa_select(const void* x, void* values, int32_t* indices, int64_t rows, int64_t channels, int64_t k,
                              int64_t dtype, int64_t threads) {
  if (rows * channels < 32768) threads = 1;  // a few microseconds: not worth waking a thread
  if (dtype == FP32) {
    Select<Float> job = {0, rows, (const float*)x, (float*)values, indices, channels, k};
    parallel(job, (int)threads);
  } else {  // only the bits count: bf16 and fp16 are alike
    Select<BFloat> job = {0, rows, (const uint16_t*)x, (uint16_t*)values, indices, channels, k};
    parallel(job, (int)threads);
  }
}

// values, indices [rows, k], weight [channels, columns] -> out [rows, columns]; rows <= ROWS.
// Returns 0, or 1 if an index is out of range, or 2 if there is no memory for the scratch.
extern "C" int larosa_gemv(const void* values, const int32_t* indices, const void* weight, void* out, int64_t rows,
                           int64_t channels, int64_t columns, int64_t k, int64_t dtype, int64_t threads) {
  auto f = dtype == FP32 ? gemv<Float> : dtype == FP16 ? gemv<Half> : gemv<BFloat>;
  return f(values, indices, weight, out, rows, channels, columns, k, threads);
}

// x [rows, channels], weight [channels + adapter, columns], bias [columns] or null, residual [rows, adapter], or if there
// is no adapter like out, or null, gain [channels] or null -> out [rows, columns], behind a gate [rows, columns / 2].
// threshold < 0: the k largest channels, or else k == channels; eps < 0: no norm; gate: see Gate; no adapter behind a gate.
// rows <= ROWS / 2. Returns 0, or 2 if there is no memory for the scratch.
extern "C" int larosa_linear(const void* x, const void* weight, const void* bias, const void* residual, const void* gain,
                             void* out, int64_t rows, int64_t channels, int64_t adapter, int64_t columns, int64_t k,
                             double threshold, double eps, int64_t gate, int64_t dtype, int64_t threads) {
  auto f = dtype == FP32 ? linear<Float> : dtype == FP16 ? linear<Half> : linear<BFloat>;
  return f(x, weight, bias, residual, gain, out, rows, channels, adapter, columns, k, threshold, eps, gate, threads);
}

// x [channels], weight [columns, channels] -> out [columns]. Returns 0, or 2 if there is no memory for x in floats.
extern "C" int larosa_dense(const void* x, const void* weight, void* out, int64_t channels, int64_t columns, int64_t dtype,
                            int64_t threads) {
  auto f = dtype == FP32 ? dense<Float> : dtype == FP16 ? dense<Half> : dense<BFloat>;
  return f(x, weight, out, channels, columns, threads);
}

// q [batch, heads * group, dim], keys and values [batch, heads, length, dim], mask of bytes [length] every mask_stride or
// null; k and v [batch, heads, dim], written at *position first, or null; cosine and sine [dim] or null -> out like q.
// dim is a multiple of 2 * PAIR. Returns 0, or 1 if the position is out of range, or 2 if there is no memory.
extern "C" int larosa_attention(const void* q, void* keys, void* values, const void* mask, const void* k, const void* v,
                                const int64_t* position, const void* cosine, const void* sine, void* out, int64_t batch,
                                int64_t heads, int64_t group, int64_t length, int64_t dim, int64_t mask_stride,
                                double scale, int64_t dtype, int64_t threads) {
  auto f = dtype == FP32 ? attend<Float> : dtype == FP16 ? attend<Half> : attend<BFloat>;
  return f(q, keys, values, mask, k, v, position, cosine, sine, out, batch, heads, group, length, dim, mask_stride,
           scale, threads);
}
