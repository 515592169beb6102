// Vectors of whatever width the compiler was told of, by the extension that g++ and clang++ share.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

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

// The same of L elements, where columns are fewer; g++ takes no size that depends on a template's parameter.
template <int L>
struct Lanes;
#define LANES_OF(L)                                  \
  template <>                                        \
  struct Lanes<L> {                                  \
    typedef float f __attribute__((vector_size(4 * L)));    \
    typedef int32_t i __attribute__((vector_size(4 * L)));  \
    typedef uint32_t u __attribute__((vector_size(4 * L))); \
  }
LANES_OF(4);
LANES_OF(8);
LANES_OF(16);
#undef LANES_OF

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

// LANES signed bytes as integers. The compilers' own conversion goes byte by byte where they do not see the instruction.
INLINE vi widen_bytes(const void* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef int8_t bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(load<bytes>(p), vi);
#endif
}

// LANES words of 16 bits as integers, not signed.
INLINE vu widen_words(const void* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(load<__m256i>(p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(load<__m128i>(p));
#else
  typedef uint16_t words __attribute__((vector_size(VB / 2)));
  return __builtin_convertvector(load<words>(p), vu);
#endif
}

// v, rounded: compilers do not fuse the product that it is with a sum that follows.
INLINE vf rounded(vf v) {
#if defined(__SSE__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
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

INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
