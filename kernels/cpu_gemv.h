// The product of lists of channels with the rows of a weight that they name.
#pragma once

#include <stdlib.h>

#include "cpu_formats.h"
#include "cpu_gates.h"
#include "cpu_rows.h"
#include "cpu_threads.h"

constexpr int64_t NARROW = 1024;   // bytes: the rows of a narrower slab are mostly waiting for their first line
constexpr int64_t BLOCK = 512;     // channels that several rows work through together
constexpr int64_t MANY = 16;       // rows that may share what they read
constexpr int64_t COMMON[2] = {7, 4};  // products, those by zero among them, over products of their own at which they do
constexpr int64_t ROWS = 64;

// F: the weight's format. A residual adapter that is no part of the weight has 8 bits: of each list, entries from ``own``
// on are its rows.
template <class D, class F>
struct Gemv {
  typedef typename D::T T;
  static constexpr int64_t SLICE = F::ORDERED ? 64 : 128;  // slabs and tiles are whole slices, and those whole cache lines
  const float* v;         // [rows, stride], widened
  const int32_t* index;   // [rows, stride]
  F weight;               // [channels, columns]
  Int8<D> adapter;        // [.., columns]
  T* out;                 // [rows, outs]: gate(half of the columns) * the other half, or all of them
  int64_t rows, columns, stride;
  int64_t gate = NONE;
  const T* bias = nullptr;      // [columns]
  const T* residual = nullptr;  // [rows, outs]
  int64_t length[ROWS], own[ROWS];  // of every row's list
  int64_t next, items, halves, outs, slab, slabs, splits;
  float* partial;         // [splits, rows, columns] if splits > 1
  int* arrived;           // [slabs] if splits > 1
  Union* unions;          // [splits], or null

  // Item = one slab of outputs x one range of every row's list.
  void item(int64_t i) {
    int64_t s = i % slabs, split = i / slabs, c0 = s * slab, c1 = min(outs, c0 + slab);
    int64_t tile = ACC / (rows * halves) / SLICE * SLICE;
    alignas(VB) float sums[ACC];
    for (int64_t c = c0; c < c1; c += tile) {
      int64_t width = min(tile, c1 - c);
      memset(sums, 0, rows * halves * tile * sizeof(float));
      if constexpr (F::ORDERED) {
        if (unions)
          for (int64_t h = 0; h < halves; h++)
            unions[split].template add<D>(sums + h * rows * tile, tile, width, rows, weight.w + c + h * outs, weight.stride);
      }
      if (!unions) add<F, false>(weight, sums, tile, width, split, c);
      if (!F::ORDERED) add<Int8<D>, true>(adapter, sums, tile, width, split, c);
      for (int64_t m = 0; m < rows; m++) {
        float* sum = sums + m * tile;
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

  // Adds this split's rows of a matrix, [c, c + width) of each half, to sums, [halves, rows, tile]. LAST: those entries of a
  // list that are not the weight's own.
  template <class W, bool LAST>
  void add(const W& w, float* sums, int64_t tile, int64_t width, int64_t split, int64_t c) {
    int64_t from[ROWS], to[ROWS], some = 0;
    for (int64_t m = 0; m < rows; m++) {
      from[m] = start(m, split), to[m] = start(m, split + 1);
      if (LAST)
        from[m] = max(from[m], own[m]);
      else
        to[m] = min(to[m], own[m]);
      some |= from[m] < to[m];
    }
    if (!some) return;
    for (int64_t h = 0; h < halves; h++) {
      float* to_sums = sums + h * rows * tile;
      int64_t at = c + h * outs;
      if constexpr (W::ORDERED) {
        several(w, to_sums, tile, width, from, to, at);
      } else {
        alignas(VB) float acc[ACC + ACC / FEWEST];
        int64_t pitch = W::pitch(tile);
        memset(acc, 0, rows * pitch * sizeof(float));
        several(w, acc, pitch, width, from, to, at);
        for (int64_t m = 0; m < rows; m++) w.settle(acc + m * pitch, width, at, to_sums + m * tile);
      }
    }
  }

  // Where a split of a row's list begins.
  int64_t start(int64_t m, int64_t split) { return length[m] * split / splits; }

  // Several rows: their lists advance together, a block of channels at a time, so that what one row has fetched is
  // still in the cache when the next one wants it. Lists that do not ascend are only slower.
  template <class W>
  void several(const W& w, float* acc, int64_t pitch, int64_t width, const int64_t* from, const int64_t* to, int64_t c) {
    if (rows == 1) return run(w, acc, width, 0, from[0], to[0], c);
    int64_t at[ROWS];
    for (int64_t m = 0; m < rows; m++) at[m] = from[m];
    bool more = true;
    for (int64_t limit = BLOCK; more; limit += BLOCK) {
      more = false;
      for (int64_t m = 0; m < rows; m++) {
        const int32_t* list = index + m * stride;
        int64_t j = at[m];
        while (j < to[m] && list[j] < limit) j++;
        run(w, acc + m * pitch, width, m, at[m], j, c);
        at[m] = j;
        more |= j < to[m];
      }
    }
  }

  // Where several rows want much in common, all of them are given all that any of them wants, with a value of zero for what
  // it has not listed: so a weight's row is fetched and widened once. A zero times a finite weight leaves a sum as it is,
  // so what a row's neighbours list shows in no bit of its result. Sets ``unions``, one a split, where that pays.
  void unite(int64_t listed) {
    unions = nullptr;
    if (!F::ORDERED || rows < 2 || rows > MANY) return;
    int64_t channels = 0;
    for (int64_t i = 0; i < rows * stride; i++) channels = max(channels, i % stride < length[i / stride] ? index[i] + 1 : 0);
    const int64_t most = min(listed, splits * channels);
    char* memory = (char*)malloc(splits * sizeof(Union) + (channels + most * (1 + rows)) * sizeof(float));
    if (!memory) return;  // it works without
    Union* each = (Union*)memory;
    int32_t *scratch = (int32_t*)(each + splits), *lists = scratch + channels;
    float* values = (float*)(lists + most);
    memset(scratch, -1, channels * sizeof(int32_t));
    int64_t count = 0;
    for (int64_t split = 0; split < splits; split++) {
      int64_t from[ROWS], to[ROWS];
      for (int64_t m = 0; m < rows; m++) from[m] = start(m, split), to[m] = start(m, split + 1);
      each[split] = {lists + count, values + count * rows, 0};
      if (!each[split].unite(index, v, stride, rows, from, to, scratch, channels)) return free(memory);
      count += each[split].count;
    }
    if (count * rows * COMMON[1] > listed * COMMON[0]) return free(memory);
    unions = each;
  }

  template <class W>
  __attribute__((noinline)) void run(const W& w, float* acc, int64_t width, int64_t m, int64_t j, int64_t end, int64_t c) {
    const float* x = v + m * stride;
    const int32_t* list = index + m * stride;
    for (; j + GROUP <= end; j += GROUP)
      W::template add<GROUP>(w, acc, width, x + j, list + j, c, j + 2 * GROUP <= end ? list + j + GROUP : list + j);
    for (; j + 4 <= end; j += 4) W::template add<4>(w, acc, width, x + j, list + j, c, list + j);
    for (; j < end; j++) W::template add<1>(w, acc, width, x + j, list + j, c, list + j);
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
    int64_t listed = 0;
    for (int64_t m = 0; m < rows; m++) listed += length[m];
    // How a row's list is split, and so its bits, depends on no other row: on what lists may hold, not on what they do.
    if (stride * columns * F::BITS / 8 < SERIAL) threads = 1;
    halves = gate ? 2 : 1, outs = columns / halves;
    // Whole rows stream better than narrow slabs, so a few threads share a slab and split the list. Only a few, unless
    // the rows are short: adding up the splits is work, too.
    splits = threads % 4 == 0 ? 4 : threads % 3 == 0 ? 3 : threads % 2 == 0 ? 2 : 1;
    slabs = max(1, min(threads / splits, outs * F::BITS / 8 / NARROW));
    slab = max(SLICE, ((outs + slabs - 1) / slabs + SLICE - 1) / SLICE * SLICE);
    slabs = (outs + slab - 1) / slab;
    splits = max(1, min(threads / slabs, stride / 32));
    items = slabs * splits;

    int64_t sums = splits > 1 ? splits * rows * columns : 0;
    partial = (float*)malloc(sums * sizeof(float) + slabs * sizeof(int));
    if (!partial) return false;
    arrived = (int*)(partial + sums);
    memset(arrived, 0, slabs * sizeof(int));
    unite(listed);
    parallel(*this, (int)threads);
    free(unions);
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
  Gemv<D, Dense<D>> job = {wide, index, {(const T*)weight, columns}, {}, (T*)out, rows, columns, k};
  for (int64_t m = 0; m < rows; m++) job.length[m] = job.own[m] = k;
  bool done = job.multiply(threads);
  free(wide);
  return done ? 0 : 2;
}
