// The three dtypes, each a struct of how its elements are ranked, widened to float and rounded back.
#pragma once

#include "cpu_vectors.h"

// Key: the integer whose order is the order of magnitudes (sign bit cleared). get and put move PAIR elements between
// memory and two vectors of floats, in whatever order is cheapest: accumulators stay in that order until put; place is
// where element i of PAIR then is. Bits: the type that selection works on, where only the bits count.
constexpr int PAIR = 2 * LANES;

struct Float {
  typedef Float Bits;
  typedef float T;
  typedef uint32_t Key;
  typedef vu VKey;
  static constexpr Key MASK = 0x7fffffff;
  INLINE void get(const T* p, vf& a, vf& b) { a = load<vf>(p), b = load<vf>(p + LANES); }
  INLINE void put(T* p, vf a, vf b) { store(p, a), store(p + LANES, b); }
  INLINE constexpr int place(int i) { return i; }
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
  INLINE constexpr int place(int i) { return i % 2 * LANES + i / 2; }
  INLINE float get1(T x) { return bits_float((uint32_t)x << 16); }
  INLINE T put1(float x) {
    uint32_t u = float_bits(x);
    return (T)((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  // The upper half is x to the nearest even; a NaN stays one.
  INLINE vu round(vf x) {
    vu u = (vu)x;
    return x == x ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000;
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
  INLINE constexpr int place(int i) { return i; }
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
