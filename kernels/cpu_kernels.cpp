// The CPU kernels' entry points: exact top-k selection by magnitude, the gather GEMV that reads only the selected weight
// rows, and both as one call with what stands before and behind them; the dense product with a weight that lies as
// nn.Linear has it; a weight of 8 or 4 bits as floats; attention of new tokens over a static cache. Each has its header,
// cpu_*.h.
//
// Plain C entry points, no torch headers and no symbol of the C++ runtime: compiles in about a second with g++ or
// clang++ and loads beside any libstdc++. Threads are torch's own OpenMP pool: the caller hands over the address of
// GOMP_parallel (on Linux libgomp, libomp and libiomp5 all export it), so no second runtime enters the process.
#include "cpu_attention.h"
#include "cpu_dense.h"
#include "cpu_dequantize.h"
#include "cpu_dtypes.h"
#include "cpu_entries.h"
#include "cpu_formats.h"
#include "cpu_gemv.h"
#include "cpu_linear.h"
#include "cpu_select.h"
#include "cpu_threads.h"

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
  auto f = dtype == FP32 ? dense_linear<Float> : dtype == FP16 ? dense_linear<Half> : dense_linear<BFloat>;
  return f(x, weight, adapter, out, rows, columns, {bias, residual, gain, channels, k, threshold, eps, gate}, threads);
}

// The same over weights of 8 bits, int8 [channels, columns] with scales [channels, columns / share], or 4, two to a byte,
// with scale and offset side by side, [channels, columns / share, 2]; the adapter apart, int8 [adapted, columns] with scales
// [adapted, columns / adapter_share]. Both shares, and what lies on either side of a gate, are multiples of FEWEST.
// With an adapter residual is [rows, stream]: adapted - picked rows of the adapter, no fewer and at most twice as
// many, multiply it, again as far as they go, and the last ones x's channels chosen [picked]. Returns 1 if one of those is out of range.
extern "C" int larosa_quantized(const void* x, const void* weight, const void* scales, const void* adapter,
                                const void* adapter_scales, const void* bias, const void* residual, const void* gain,
                                const int64_t* chosen, void* out, int64_t rows, int64_t channels, int64_t adapted,
                                int64_t stream, int64_t picked, int64_t columns, int64_t bits, int64_t share,
                                int64_t adapter_share, int64_t k, double threshold, double eps, int64_t gate, int64_t dtype,
                                int64_t threads) {
  auto f = dtype == FP32 ? quantized<Float> : dtype == FP16 ? quantized<Half> : quantized<BFloat>;
  return f(x, weight, scales, adapter, adapter_scales, {adapted, stream, chosen, picked}, out, rows, columns, bits, share,
           adapter_share, {bias, residual, gain, channels, k, threshold, eps, gate}, threads);
}

// x [rows, channels], weight [columns, channels] -> out [rows, columns]. Returns 0, or 2 if there is no memory for x in
// floats.
extern "C" int larosa_dense(const void* x, const void* weight, void* out, int64_t rows, int64_t channels, int64_t columns,
                            int64_t dtype, int64_t threads) {
  auto f = dtype == FP32 ? dense<Float> : dtype == FP16 ? dense<Half> : dense<BFloat>;
  return f(x, weight, out, rows, channels, columns, threads);
}

// weight and scales as larosa_quantized takes them, share a multiple of FEWEST -> out [rows, columns] in the scales' dtype.
extern "C" void larosa_dequantized(const void* weight, const void* scales, void* out, int64_t rows, int64_t columns,
                                   int64_t bits, int64_t share, int64_t dtype, int64_t threads) {
  auto four = dtype == FP32 ? dequantize<Float, 4> : dtype == FP16 ? dequantize<Half, 4> : dequantize<BFloat, 4>;
  auto eight = dtype == FP32 ? dequantize<Float, 8> : dtype == FP16 ? dequantize<Half, 8> : dequantize<BFloat, 8>;
  (bits == 4 ? four : eight)(weight, scales, out, rows, columns, share, threads);
}

// q [batch, tokens, heads * group, dim], keys and values [batch, heads, length, dim], mask of bytes [tokens, length] every
// mask_stride or null; k and v [batch, tokens, heads, dim], written at position [tokens] first, or null; cosine and sine
// [tokens, dim] every turn_stride or null -> out like q. dim is a multiple of 2 * PAIR. Returns 0, or 1 if a position is out
// of range, or 2 if there is no memory; nothing is written then.
extern "C" int larosa_attention(const void* q, void* keys, void* values, const void* mask, const void* k, const void* v,
                                const int64_t* position, const void* cosine, const void* sine, void* out, int64_t batch,
                                int64_t heads, int64_t group, int64_t tokens, int64_t length, int64_t dim,
                                int64_t mask_stride, int64_t turn_stride, double scale, int64_t dtype, int64_t threads) {
  auto f = dtype == FP32 ? attend<Float> : dtype == FP16 ? attend<Half> : attend<BFloat>;
  return f(q, keys, values, mask, k, v, position, cosine, sine, out, batch, heads, group, tokens, length, dim, mask_stride,
           turn_stride, scale, threads);
}

// The entry points that a caller in C++ takes.
extern "C" const Entries* larosa_entries() {
  static const Entries entries = {larosa_linear, larosa_quantized, larosa_attention, larosa_dequantized, FEWEST};
  return &entries;
}
