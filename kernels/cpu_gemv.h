// The product of lists of channels with the rows of a weight that they name.
#pragma once

#include <stdlib.h>

#include "cpu_dtypes.h"
#include "cpu_gates.h"
#include "cpu_threads.h"

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
