// Vectors of 16 lanes: their types, and the operations that the compiler provides for every instruction set. Operations
// without a portable form, or with a slow one, are in the headers that simd.h selects from.
#pragma once
#include <cstdint>
#include <cstring>

namespace llmc {

constexpr int kLanes = 16;

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef float FAny __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IAny __attribute__((vector_size(64), aligned(1), may_alias));
typedef int8_t B16Any __attribute__((vector_size(16), aligned(1), may_alias));

inline F load(const float* p) { return *reinterpret_cast<const FAny*>(p); }
inline void store(float* p, F v) { *reinterpret_cast<FAny*>(p) = v; }
/// Load the first `count` lanes, the others are zeros; store the first `count` lanes and nothing behind them.
inline F load_first(const float* p, int count) {
  float lanes[kLanes] = {};
  for (int i = 0; i < count; i++) lanes[i] = p[i];
  return load(lanes);
}
inline void store_first(float* p, F v, int count) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; i++) p[i] = lanes[i];
}
inline I load_ints(const void* p) { return *static_cast<const IAny*>(p); }
inline void store_ints(void* p, I v) { *static_cast<IAny*>(p) = v; }
/// Store the low byte of each lane.
inline void store_bytes(void* p, I v) { *static_cast<B16Any*>(p) = __builtin_convertvector(v, B16); }
inline F all(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline I all(int32_t x) { return I{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline F to_float(I v) { return __builtin_convertvector(v, F); }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F a) { return (F)((I)a & all(0x7fffffff)); }

inline F rotate8(F v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
inline F rotate4(F v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3); }
inline F rotate2(F v) { return __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1); }
inline F rotate1(F v) { return __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0); }

inline float sum(F v) {
  v += rotate8(v);
  v += rotate4(v);
  v += rotate2(v);
  v += rotate1(v);
  return v[0];
}

inline float largest(F v) {
  v = max(v, rotate8(v));
  v = max(v, rotate4(v));
  v = max(v, rotate2(v));
  v = max(v, rotate1(v));
  return v[0];
}

/// Join lanes of two vectors in pairs at distance `Step`: lanes without this bit in their index come from a.
template <int Step, class V, class Join>
inline V fold(V a, V b, Join&& join) {
  if constexpr (Step == 1)
    return join(__builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
  else if constexpr (Step == 2)
    return join(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  else if constexpr (Step == 4)
    return join(__builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  else
    return join(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
}

/// Reduce 16 vectors to one, whose lane i joins all lanes of the i-th vector.
template <class V, class Join>
inline V fold(V* v, Join&& join) {
  for (int i = 0; i < 8; i++) v[i] = fold<1>(v[2 * i], v[2 * i + 1], join);
  for (int i = 0; i < 4; i++) v[i] = fold<2>(v[2 * i], v[2 * i + 1], join);
  for (int i = 0; i < 2; i++) v[i] = fold<4>(v[2 * i], v[2 * i + 1], join);
  return fold<8>(v[0], v[1], join);
}

}  // namespace llmc
