// Functions of a vector's elements: e^x, and what sparse_linear can put between the halves of its product.
#pragma once

#include <math.h>

#include "cpu_vectors.h"

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
