// Attention of several new tokens of a sequence over a static cache, in one launch: rotary embedding, the cache's new rows,
// and the softmax over the positions that the mask allows to each token. See larosa_fx.kernels.ops for what it computes, and
// decode_attention.cu for one token.
//
// A cluster of SPLIT blocks owns a key/value head and the queries of all tokens in all query heads that share it, so that
// the cache is read once; where these queries are more than its warps have registers for, CHUNKS clusters share them. Warps
// take turns along the positions, 16 at a time, and keep a running maximum each (online softmax). The warps of a block put
// their parts together through shared memory, the blocks through distributed shared memory. The order of all additions is
// fixed: equal inputs give equal bits.
//
// So many queries would keep CUDA cores busy longer than the cache keeps the memory, so tensor cores multiply. They take
// 16-bit factors: a query, and a weight behind the softmax, is the sum of two, which hold twice the digits.
//
// The new rows are read from k and v alone: another block may not have written them to the cache yet.
//
// Compiled at run time with these constants beside those of attention.cuh: TOKENS (2 to 16), GROUP (query heads to a
// key/value head), CHUNKS, and TILES (16 queries each, of a chunk).

// q, k and v lie as a product of several linears leaves them: a token's heads side by side, tokens q_stride (k_stride,
// v_stride) elements apart, those of the next sequence behind them. y: [sequences, TOKENS, heads, DIM].

#include "attention.cuh"

constexpr int QUERIES = GROUP * TOKENS;  // query n: token n % TOKENS in head n / TOKENS of the group
constexpr int ROWS = 16 * TILES;         // queries of a chunk, the last chunk's filled up with zeros
constexpr int SPAN = 16;                 // positions a warp takes at a time
constexpr int PAIRS = DIM / 64;          // of halves of a row, 64 channels
constexpr bool EARLY = DIM < 256;        // values are read beside keys, where there are registers for both

// x * cos + rotate_half(x) * sin, eight channels from i of one head.
__device__ __forceinline__ void rope(const u16* x, const u16* cosine, const u16* sine, int i, float (&to)[8]) {
  unpack(*reinterpret_cast<const uint4*>(x + i), to);
  if (!ROPE) return;
  float other[8], c[8], s[8];
  unpack(*reinterpret_cast<const uint4*>(x + (i < DIM / 2 ? i + DIM / 2 : i - DIM / 2)), other);
  unpack(*reinterpret_cast<const uint4*>(cosine + i), c), unpack(*reinterpret_cast<const uint4*>(sine + i), s);
#pragma unroll
  for (int e = 0; e < 8; e++) to[e] = to[e] * c[e] + (i < DIM / 2 ? -other[e] : other[e]) * s[e];
}

// Two floats as a word of 16-bit ones, and what rounding took from them.
__device__ __forceinline__ u32 pack(float a, float b, u32& rest) {
  const u32 low = narrow(a), high = narrow(b);
  rest = narrow(a - widen(low)) | (u32)narrow(b - widen(high)) << 16;
  return low | high << 16;
}

// sums += a * b, 16 x 16 times 16 x 8, as mma.m16n8k16 lays them out. Thread 4 i + j holds of a rows i and i + 8, of b
// column i, both where the inner index is 2 j, 2 j + 1, 2 j + 8 and 2 j + 9; of the sums rows i and i + 8 in columns 2 j and
// 2 j + 1.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where eight channels of a query lie, and four of its sums: threads that read or write at once meet no bank twice.
__device__ __forceinline__ int query_place(int row, int part) { return row * DIM + 8 * (part ^ (row & 1) << 2); }
__device__ __forceinline__ int sum_place(int row, int part) {
  return row * DIM + 4 * (part ^ (part >> 2 & 2) ^ (row & 1));
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
decode_attention_tokens(const u16* __restrict__ q, u16* keys, u16* values, const u8* __restrict__ mask,
                        const u16* __restrict__ k, const u16* __restrict__ v, const long long* __restrict__ position,
                        const u16* __restrict__ cosine, const u16* __restrict__ sine, u16* __restrict__ y, int length,
                        int mask_stride, float scale, int q_stride, int k_stride, int v_stride) {
  extern __shared__ __align__(16) u8 memory[];
  u16(*query)[ROWS * DIM] = reinterpret_cast<u16(*)[ROWS * DIM]>(memory);  // what 16 bits hold of them, and the rest
  u16(*fresh)[TOKENS][DIM] = reinterpret_cast<u16(*)[TOKENS][DIM]>(query + 2);  // the cache's new rows: keys, values
  float(*mixed)[ROWS * DIM] = reinterpret_cast<float(*)[ROWS * DIM]>(memory);   // behind the loop, of each warp
  __shared__ float high[WARPS][ROWS], mass[WARPS][ROWS], block_high[ROWS], block_mass[ROWS];
  __shared__ int slots[TOKENS];  // where the tokens' rows go; -1: nowhere
  const int t = threadIdx.x, lane = t & 31, warp = t / 32, i = lane / 4, j = lane % 4;
  const int heads = gridDim.y / CHUNKS, head = blockIdx.y / CHUNKS, chunk = blockIdx.y % CHUNKS, sequence = blockIdx.z;
  const int first_query = chunk * ROWS, rows = min(ROWS, QUERIES - first_query);

  wait_for_producer();
  mask += (long long)sequence * mask_stride;
  const long long turned = ROPE == 2 ? sequence * TOKENS : 0;
  if (t < TOKENS) {
    const long long at = WRITE ? position[t] : -1;
    slots[t] = (u64)at < (u64)length ? (int)at : -1;  // nothing is written outside the cache
  }
  __syncthreads();
  // The token whose row goes to a position: of several the last.
  const auto written = [&](int at) {
    int token = -1;
    for (int n = 0; n < TOKENS; n++)
      if (slots[n] == at) token = n;
    return token;
  };

  for (int n = t; n < ROWS * DIM / 8; n += THREADS) {
    const int row = n / (DIM / 8), part = n % (DIM / 8), own = first_query + row, token = own % TOKENS;
    u32 word[4] = {}, rest[4] = {};
    if (row < rows) {
      const u16* x = q + (long long)(sequence * TOKENS + token) * q_stride + (head * GROUP + own / TOKENS) * DIM;
      float to[8];
      rope(x, cosine + (turned + token) * DIM, sine + (turned + token) * DIM, 8 * part, to);
#pragma unroll
      for (int e = 0; e < 4; e++)
        word[e] = pack(to[2 * e] * scale * LOG2E, to[2 * e + 1] * scale * LOG2E, rest[e]);
    }
    *reinterpret_cast<uint4*>(query[0] + query_place(row, part)) = make_uint4(word[0], word[1], word[2], word[3]);
    *reinterpret_cast<uint4*>(query[1] + query_place(row, part)) = make_uint4(rest[0], rest[1], rest[2], rest[3]);
  }
  const long long base = (long long)(sequence * heads + head) * length * DIM;
  if (WRITE)
    for (int n = t; n < TOKENS * DIM / 8; n += THREADS) {
      const int token = n / (DIM / 8), part = n % (DIM / 8);
      const long long from = sequence * TOKENS + token;
      float to[8];
      u32 word[4], rest;
      rope(k + from * k_stride + head * DIM, cosine + (turned + token) * DIM, sine + (turned + token) * DIM, 8 * part, to);
#pragma unroll
      for (int e = 0; e < 4; e++) word[e] = pack(to[2 * e], to[2 * e + 1], rest);
      const uint4 key = make_uint4(word[0], word[1], word[2], word[3]);
      const uint4 value = *reinterpret_cast<const uint4*>(v + from * v_stride + head * DIM + 8 * part);
      *reinterpret_cast<uint4*>(fresh[0][token] + 8 * part) = key;
      *reinterpret_cast<uint4*>(fresh[1][token] + 8 * part) = value;
      if (blockIdx.x == 0 && chunk == 0 && slots[token] >= 0 && written(slots[token]) == token) {
        const long long row = base + (long long)slots[token] * DIM + 8 * part;
        *reinterpret_cast<uint4*>(keys + row) = key, *reinterpret_cast<uint4*>(values + row) = value;
      }
    }
  __syncthreads();

  // Which tokens see a position, a bit each, as far as this lane looks: at every second token.
  const auto look = [&](int at) {
    u32 bits = 0;
    if (at < length)
#pragma unroll
      for (int n = 0; n < TOKENS; n += 2) {
        const int token = n + lane / SPAN;
        if (token < TOKENS && (!MASK || mask[(long long)token * length + at])) bits |= 1u << token;
      }
    return bits;
  };
  const int slot = lane < TOKENS ? slots[lane] : -1;
  float top[TILES][2], sum[TILES][2], mix[TILES][PAIRS][8][4];
  int token[TILES][2];  // of rows i and i + 8 of a tile
#pragma unroll
  for (int m = 0; m < TILES; m++) {
#pragma unroll
    for (int r = 0; r < 2; r++)
      top[m][r] = NONE, sum[m][r] = 0.f, token[m][r] = (first_query + 16 * m + 8 * r + i) % TOKENS;
#pragma unroll
    for (int n = 0; n < PAIRS * 32; n++) mix[m][n / 32][n / 4 % 8][n % 4] = 0.f;
  }
  constexpr int STRIDE = SPLIT * WARPS * SPAN;
  int first = (warp * SPLIT + blockIdx.x) * SPAN;
  u32 ahead = look(first + lane % SPAN);
  for (; first < length; first += STRIDE) {
    const u32 bits = ahead | __shfl_xor_sync(~0u, ahead, SPAN);
    ahead = look(first + STRIDE + lane % SPAN);
    if (!__any_sync(~0u, bits)) continue;
    const bool any_fresh = __any_sync(~0u, slot >= first && slot < first + SPAN);

    // Which of its 16 positions and which channels a multiplication takes for its inner index is free, as long as both
    // factors agree: so each thread reads 16 bytes at a time. Of keys it reads positions i and i + 8, of every 32 channels
    // the eight from 8 j; of values positions 2 j, 2 j + 1, 2 j + 8 and 2 j + 9, of every 64 channels the eight from 8 i.
    uint4 key[2][2 * PAIRS], value[4][PAIRS];
    int key_token[2] = {-1, -1}, value_token[4] = {-1, -1, -1, -1};
    u32 seen[4];
    if (any_fresh) {
#pragma unroll
      for (int r = 0; r < 2; r++) key_token[r] = written(first + 8 * r + i);
#pragma unroll
      for (int r = 0; r < 4; r++) value_token[r] = written(first + 2 * j + r % 2 + r / 2 * 8);
    }
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool cached = __shfl_sync(~0u, bits, 8 * r + i) && key_token[r] < 0;
      const u16* row = keys + base + (long long)(first + 8 * r + i) * DIM;
#pragma unroll
      for (int n = 0; n < 2 * PAIRS; n++)
        key[r][n] = cached ? __ldcg(reinterpret_cast<const uint4*>(row) + 4 * n + j) : zero;
    }
    if (any_fresh)
#pragma unroll
      for (int r = 0; r < 2; r++)
        if (key_token[r] >= 0)
#pragma unroll
          for (int n = 0; n < 2 * PAIRS; n++)
            key[r][n] = reinterpret_cast<const uint4*>(fresh[0][key_token[r]])[4 * n + j];
#pragma unroll
    for (int r = 0; r < 4; r++) seen[r] = __shfl_sync(~0u, bits, 2 * j + r % 2 + r / 2 * 8);
    const auto read_values = [&] {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const bool cached = seen[r] && value_token[r] < 0;
        const u16* row = values + base + (long long)(first + 2 * j + r % 2 + r / 2 * 8) * DIM;
#pragma unroll
        for (int n = 0; n < PAIRS; n++)
          value[r][n] = cached ? __ldcg(reinterpret_cast<const uint4*>(row) + 8 * n + i) : zero;
      }
      if (any_fresh)
#pragma unroll
        for (int r = 0; r < 4; r++)
          if (value_token[r] >= 0)
#pragma unroll
            for (int n = 0; n < PAIRS; n++)
              value[r][n] = reinterpret_cast<const uint4*>(fresh[1][value_token[r]])[8 * n + i];
    };
    if (EARLY) read_values();

    u32 weight[TILES][4], little[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      float score[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2 * PAIRS; n++)
#pragma unroll
        for (int part = 0; part < 2; part++) {
          const uint4 a = *reinterpret_cast<const uint4*>(query[part] + query_place(16 * m + i, 4 * n + j));
          const uint4 b = *reinterpret_cast<const uint4*>(query[part] + query_place(16 * m + 8 + i, 4 * n + j));
          const u32 left[4] = {a.x, b.x, a.y, b.y}, right[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
          for (int r = 0; r < 2; r++)
            multiply(score[r], left, key[r][n].x, key[r][n].y), multiply(score[r], right, key[r][n].z, key[r][n].w);
        }
      float faded[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float w[4], highest = top[m][r];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          w[c] = seen[c] >> token[m][r] & 1 ? score[c / 2][2 * r + c % 2] : NONE;
          highest = fmaxf(highest, w[c]);
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        const float origin = origin_of(highest);
        faded[r] = exp2f(top[m][r] - origin);
        top[m][r] = highest, sum[m][r] *= faded[r];
#pragma unroll
        for (int c = 0; c < 4; c++) w[c] = exp2f(w[c] - origin), sum[m][r] += w[c];
        weight[m][r] = pack(w[0], w[1], little[m][r]), weight[m][r + 2] = pack(w[2], w[3], little[m][r + 2]);
      }
      if (__any_sync(~0u, faded[0] != 1.f || faded[1] != 1.f))
#pragma unroll
        for (int n = 0; n < PAIRS * 32; n++) mix[m][n / 32][n / 4 % 8][n % 4] *= faded[n / 2 % 2];
    }
    if (!EARLY) read_values();
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
      const u32 word[4][4] = {{value[0][n].x, value[0][n].y, value[0][n].z, value[0][n].w},
                              {value[1][n].x, value[1][n].y, value[1][n].z, value[1][n].w},
                              {value[2][n].x, value[2][n].y, value[2][n].z, value[2][n].w},
                              {value[3][n].x, value[3][n].y, value[3][n].z, value[3][n].w}};
#pragma unroll
      for (int e = 0; e < 8; e++) {  // channel 8 i + e of the 64: two positions to a word
        const u32 b0 = __byte_perm(word[0][e / 2], word[1][e / 2], e % 2 ? 0x7632 : 0x5410);
        const u32 b1 = __byte_perm(word[2][e / 2], word[3][e / 2], e % 2 ? 0x7632 : 0x5410);
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply(mix[m][n][e], weight[m], b0, b1), multiply(mix[m][n][e], little[m], b0, b1);
      }
    }
  }

  // The threads of a row, then the warps, then the blocks.
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[m][r] += __shfl_xor_sync(~0u, sum[m][r], 1);
      sum[m][r] += __shfl_xor_sync(~0u, sum[m][r], 2);
      if (j == 0) high[warp][16 * m + 8 * r + i] = top[m][r], mass[warp][16 * m + 8 * r + i] = sum[m][r];
    }
  __syncthreads();  // nobody reads queries and new rows any more: their memory is the sums' now
  if (t < ROWS) {
    float highest = NONE, total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, high[w][t]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += exp2f(high[w][t] - origin_of(highest)) * mass[w][t];
    block_high[t] = highest, block_mass[t] = total;
  }
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 16 * m + 8 * r + i;
      if (row >= rows) continue;
      float highest = NONE;
#pragma unroll
      for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, high[w][row]);
      const float faded = exp2f(top[m][r] - origin_of(highest));
#pragma unroll
      for (int n = 0; n < PAIRS; n++)
#pragma unroll
        for (int part = 0; part < 4; part++) {  // channels 16 j + 4 part of the 64, and the next three
          const int c = 2 * r + part / 2, e = part % 2 * 4;
          *reinterpret_cast<float4*>(mixed[warp] + sum_place(row, 16 * n + 4 * j + part)) =
              make_float4(mix[m][n][e][c] * faded, mix[m][n][e + 1][c] * faded, mix[m][n][e + 2][c] * faded,
                          mix[m][n][e + 3][c] * faded);
        }
    }
  __syncthreads();
  for (int n = t; n < rows * DIM / 4; n += THREADS) {
    float4* own = reinterpret_cast<float4*>(mixed[0]) + n;
    float4 total = *own;
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
      const float4 more = reinterpret_cast<const float4*>(mixed[w])[n];
      total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    *own = total;
  }
  cluster_barrier();
  for (int n = blockIdx.x * THREADS + t; n < rows * DIM; n += SPLIT * THREADS) {
    const int row = n / DIM, c = n % DIM, own = first_query + row;
    float high_of[SPLIT], highest = NONE, total = 0.f, value = 0.f;
#pragma unroll
    for (int r = 0; r < SPLIT; r++) highest = fmaxf(highest, high_of[r] = of_block(&block_high[row], r));
#pragma unroll
    for (int r = 0; r < SPLIT; r++) {
      const float faded = exp2f(high_of[r] - origin_of(highest));
      total += faded * of_block(&block_mass[row], r);
      value += faded * of_block(&mixed[0][sum_place(row, c / 4) + c % 4], r);
    }
    const float mean = total > 0.f ? value / total : total;
    const bool inside = !WRITE || slots[own % TOKENS] >= 0;  // where it lies outside, the result is NaN, for all to see
    const long long to = ((long long)(sequence * TOKENS + own % TOKENS) * heads + head) * GROUP + own / TOKENS;
    y[to * DIM + c] = narrow(inside ? mean : __int_as_float(0x7fffffff));
  }
  cluster_barrier();  // no block ends while another still reads its shared memory
}
