// The entry points of cpu_kernels.cpp that the dispatcher calls, and what they take. Each is described there.
#pragma once

#include <stdint.h>

struct Entries {
  int (*linear)(const void* x, const void* weight, const void* bias, const void* residual, const void* gain, void* out,
                int64_t rows, int64_t channels, int64_t adapter, int64_t columns, int64_t k, double threshold, double eps,
                int64_t gate, int64_t dtype, int64_t threads);
  int (*quantized)(const void* x, const void* weight, const void* scales, const void* adapter, const void* adapter_scales,
                   const void* bias, const void* residual, const void* gain, const int64_t* chosen, void* out, int64_t rows,
                   int64_t channels, int64_t adapted, int64_t stream, int64_t picked, int64_t columns, int64_t bits,
                   int64_t share, int64_t adapter_share, int64_t k, double threshold, double eps, int64_t gate,
                   int64_t dtype, int64_t threads);
  int (*attention)(const void* q, void* keys, void* values, const void* mask, const void* k, const void* v,
                   const int64_t* position, const void* cosine, const void* sine, void* out, int64_t batch, int64_t heads,
                   int64_t group, int64_t tokens, int64_t length, int64_t dim, int64_t mask_stride, int64_t turn_stride,
                   double scale, int64_t dtype, int64_t threads);
  void (*dequantized)(const void* weight, const void* scales, void* out, int64_t rows, int64_t columns, int64_t bits,
                      int64_t share, int64_t dtype, int64_t threads);
  int64_t fewest;  // columns that share a scale, at least
};
