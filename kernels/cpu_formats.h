// How a weight's rows lie in memory, and how a few of them are added to a tile of sums.
//
// A format has BITS (of a weight), ORDERED (its sums lie as D::get leaves a vector's elements; others settle), and
//   add<R>(acc, width, v, index, c, ahead): acc[0..width) += v[r] times columns [c, c + width) of row index[r], r < R, one r
//     after the other in every column, so how rows are grouped leaves the bits alone. ahead: the rows of the next group,
//     prefetched meanwhile: the hardware does not see where the next row will start, which costs short rows a third of the
//     bandwidth.
// Where it is not ORDERED, acc has pitch(width) floats, all zero at first, of whatever meaning add and settle agree upon:
//   settle(acc, width, c, sum): adds them to sums in D's order.
#pragma once

#include "cpu_dtypes.h"

constexpr int GROUP = 8;  // rows fused a pass: accumulators are loaded and stored once for all of them
constexpr int64_t FEWEST = 32;  // columns that share a scale, at least; all widths, tiles and slabs are multiples
constexpr int64_t ACC = 4096;  // accumulators of one item, on its stack: half of a 32 KB L1

template <class D>
struct Dense {
  typedef typename D::T T;
  static constexpr int BITS = 8 * sizeof(T);
  static constexpr bool ORDERED = true;
  const T* w;
  int64_t stride;

  template <int R>
  INLINE void add(const Dense& f, float* acc, int64_t width, const float* v, const int32_t* index, int64_t begin,
                  const int32_t* ahead) {
    constexpr int LINE = 64 / sizeof(T), STEP = LINE > PAIR ? LINE : PAIR, PAIRS = STEP / PAIR;
    const T *row[R], *next[R];
    for (int r = 0; r < R; r++) row[r] = f.w + begin + index[r] * f.stride, next[r] = f.w + begin + ahead[r] * f.stride;
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
};

// A few rows of 8 or 4 bits, as the loops over their columns see them: nothing of the activations' dtype is left. Row r
// begins at ``row[r]``; its value times the scale of the i-th group of columns that the tile meets is coefficient[r][i], and
// that group ends at column ends(i) of the tile.
template <int R>
struct Rows {
  const uint8_t* row[R];
  float coefficient[R][ACC / FEWEST];
  int64_t groups, first_end, share;
  int64_t ends(int64_t i, int64_t width) const { return min(width, first_end + i * share); }
};

// 8 bits, signed. Sums lie in order.
template <int R>
__attribute__((noinline)) static void add_bytes(const Rows<R>& rows, float* acc, int64_t width) {
  constexpr int VECTORS = FEWEST / LANES;
  int64_t c = 0;
  for (int64_t i = 0; i < rows.groups; i++)
    for (const int64_t end = rows.ends(i, width); c < end; c += FEWEST) {
      vf sum[VECTORS];
      for (int s = 0; s < VECTORS; s++) sum[s] = load<vf>(acc + c + s * LANES);
      for (int r = 0; r < R; r++)
        for (int s = 0; s < VECTORS; s++)
          sum[s] += __builtin_convertvector(widen_bytes(rows.row[r] + c + s * LANES), vf) * rows.coefficient[r][i];
      for (int s = 0; s < VECTORS; s++) store(acc + c + s * LANES, sum[s]);
    }
}

// 4 bits, unsigned, two to a byte, the lower column in the lower half. L words of 32 bits hold 8 L columns, word i those
// from 8 i on. The eight places of all L words at once are masked where they stand, so place p counts 16^p there: that
// leaves every digit, and Int4::settle takes it back when it puts columns in order.
template <int L, int R>
__attribute__((noinline)) static void add_nibbles(const Rows<R>& rows, float* acc, int64_t width) {
  typedef typename Lanes<L>::f lf;
  typedef typename Lanes<L>::i li;
  typedef typename Lanes<L>::u lu;
  int64_t c = 0;
  for (int64_t i = 0; i < rows.groups; i++)
    for (const int64_t end = rows.ends(i, width); c < end; c += 8 * L) {
      lf sum[8];
      for (int p = 0; p < 8; p++) sum[p] = load<lf>(acc + c + p * L);
      for (int r = 0; r < R; r++) {
        const lu word = load<lu>(rows.row[r] + c / 2);
        const float v = rows.coefficient[r][i];
        for (int p = 0; p < 7; p++) sum[p] += __builtin_convertvector((li)(word & 15u << 4 * p), lf) * v;
        sum[7] += __builtin_convertvector((li)(word >> 28), lf) * v;
      }
      for (int p = 0; p < 8; p++) store(acc + c + p * L, sum[p]);
    }
}

// What 8 and 4 bits share. ``share`` neighbouring columns of a row have one scale; it multiplies the row's value first.
template <class D, int BITS_>
struct Scaled {
  typedef typename D::T T;
  static constexpr int BITS = BITS_, EACH = BITS == 4 ? 2 : 1;  // numbers a scale: its offset stands beside it
  static constexpr bool ORDERED = false;
  const uint8_t* q;
  const T* s;
  int64_t columns, share;

  // Lines of each row to come that are fetched ahead; the hardware goes on by itself. All of them would push each other
  // out of the first cache, where rows of a power of two begin in the same place, at a third of the speed.
  static constexpr int AHEAD = 4;

  static int64_t pitch(int64_t width) { return width + width / FEWEST; }

  const uint8_t* at(int64_t row, int64_t c) const { return q + (row * columns + c) * BITS / 8; }

  const T* scales(int64_t row, int64_t c) const { return s + (row * (columns / share) + c / share) * EACH; }

  // offset[i], where there is one, collects what the rows add to each column of group i alike.
  template <int R>
  __attribute__((noinline)) void take(Rows<R>& rows, int64_t width, const float* v, const int32_t* index, int64_t begin,
                                      const int32_t* ahead, float* offset) const {
    rows.share = share, rows.first_end = share - begin % share, rows.groups = (begin + width - 1) / share - begin / share + 1;
    for (int r = 0; r < R; r++) {
      rows.row[r] = at(index[r], begin);
      const T *from = scales(index[r], begin), *next = scales(ahead[r], begin);
      for (int64_t i = 0; i < rows.groups; i++) {
        rows.coefficient[r][i] = v[r] * D::get1(from[i * EACH]);
        if (EACH == 2) offset[i] += v[r] * D::get1(from[i * EACH + 1]);
      }
      for (int64_t i = 0; i < rows.groups * EACH; i += 64 / sizeof(T)) __builtin_prefetch(next + i);
      for (int l = 0; l < AHEAD; l++) __builtin_prefetch(at(ahead[r], begin) + 64 * l);
    }
  }
};

// w = s q, q signed.
template <class D>
struct Int8 : Scaled<D, 8> {
  template <int R>
  INLINE void add(const Int8& f, float* acc, int64_t width, const float* v, const int32_t* index, int64_t begin,
                  const int32_t* ahead) {
    Rows<R> rows;
    f.take(rows, width, v, index, begin, ahead, nullptr);
    add_bytes<R>(rows, acc, width);
  }

  void settle(const float* acc, int64_t width, int64_t, float* sum) const {
    for (int64_t c = 0; c < width; c += PAIR)
      for (int i = 0; i < PAIR; i++) sum[c + D::place(i)] += acc[c + i];
  }
};

// w = s u + m, u = 0..15; s and m side by side. What m adds stands behind the columns' sums.
template <class D, int L>
struct Int4 : Scaled<D, 4> {
  static constexpr int UNIT = 8 * L;

  template <int R>
  INLINE void add(const Int4& f, float* acc, int64_t width, const float* v, const int32_t* index, int64_t begin,
                  const int32_t* ahead) {
    Rows<R> rows;
    f.take(rows, width, v, index, begin, ahead, acc + width);
    add_nibbles<L, R>(rows, acc, width);
  }

  void settle(const float* acc, int64_t width, int64_t begin, float* sum) const {
    static const float unit[8] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
    for (int64_t c = 0; c < width; c += UNIT) {
      const float m = acc[width + (begin + c) / this->share - begin / this->share];
      for (int i = 0; i < L; i++)
        for (int p = 0; p < 8; p++) {
          const int64_t at = c + 8 * i;
          sum[at / PAIR * PAIR + D::place(at % PAIR + p)] += acc[c + p * L + i] * unit[p] + m;
        }
    }
  }
};
