// Vectors of 16 lanes for the instruction set that the compiler's flags select, and functions of them. Each instruction
// set has a header, all with the same names; simd_portable.h defines what they compute. Only these headers use
// intrinsics.
#pragma once
#include "vector.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_portable.h"
namespace llmc {
using namespace portable;
}
#endif

namespace llmc {

/// e**x with a relative error below 2e-7; 0 below -87.3 (AVX-512: below the smallest float), no infinity above 88.
inline F exp(F x) {
  const F y = min(max(x, all(-104.0f)), all(88.0f));
  const F whole = to_float(nearest(y * all(1.44269504089f)));
  F r = y - whole * all(0.693359375f);
  r = r - whole * all(-2.12194440e-4f);
  F p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  return times_power(p, whole, x);
}

/// log(1 + y) for 0 <= y <= 1, with a relative error below 2e-7: 2 atanh(y / (2 + y)) as a series.
inline F log1p(F y) {
  const F s = y / (all(2.0f) + y), square = s * s;
  F p = all(1.0f / 17);
  for (int n = 15; n > 0; n -= 2) p = p * square + all(1.0f / static_cast<float>(n));
  return all(2.0f) * s * p;
}

inline F softplus(F x) { return max(x, F{}) + log1p(exp(-abs(x))); }

inline F square_root(F x) {
  for (int i = 0; i < kLanes; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

inline F sigmoid(F x) { return reciprocal(all(1.0f) + exp(-x)); }
inline F tanh(F x) { return all(1.0f) - all(2.0f) / (exp(x + x) + all(1.0f)); }

/// The error function, accurate to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26).
inline F erf(F x) {
  F z = abs(x);
  F t = all(1.0f) / (all(1.0f) + all(0.3275911f) * z);
  F p = all(1.061405429f);
  p = p * t - all(1.453152027f);
  p = p * t + all(1.421413741f);
  p = p * t - all(0.284496736f);
  p = p * t + all(0.254829592f);
  F y = all(1.0f) - p * t * exp(-z * z);
  return x < F{} ? -y : y;
}

/// x * sigmoid(alpha x), which is SiLU for alpha 1; and the two forms of GELU (Hendrycks and Gimpel 2016).
inline F scaled_silu(F x, float alpha) { return x * sigmoid(x * all(alpha)); }
inline F gelu(F x) { return all(0.5f) * x * (all(1.0f) + erf(x * all(0.70710678f))); }
inline F gelu_tanh(F x) {
  return all(0.5f) * x * (all(1.0f) + tanh(all(0.79788456f) * (x + all(0.044715f) * x * x * x)));
}

}  // namespace llmc
