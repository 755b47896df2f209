// Attention of few queries, for a decoding step: scores of keys and weighted sums of values, computed directly from the
// rows of a KV cache. `Heads` queries that share a KV head are processed together. If the cache is int8 and D is a
// multiple of 64, both are integer products: a query is rounded to 8 bits like activations, and a weight to 15 bits of
// the largest weight in the split.
#pragma once
#include "cache.h"
#include "simd.h"

namespace llmc {

/// Bytes between the cache row that is read and the row that is prefetched.
constexpr int64_t kRowsAhead = 8 << 10;

/// Prefetch `bytes` bytes that are `kRowsAhead` ahead.
inline void ask_ahead(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + kRowsAhead + i);
}

/// `Heads` queries and their products with one key, in lanes whose sums are the scores.
template <class Rows, int D, int Heads, bool Integer>
struct Queries {
  typedef F V;
  F rows[Heads][D / kLanes];

  explicit Queries(const float* query) {
    for (int h = 0; h < Heads; h++)
      for (int v = 0; v < D / kLanes; v++) rows[h][v] = load(query + h * D + v * kLanes);
  }
  void multiply(const uint8_t* key, V* part) const {
    for (int v = 0; v < D / kLanes; v++) {
      const F k = Rows::get(key, v * kLanes);
      for (int h = 0; h < Heads; h++) part[h] = v ? part[h] + k * rows[h][v] : k * rows[h][v];
    }
  }
  F score(int, F whole) const { return whole; }
};

template <class Rows, int D, int Heads>
struct Queries<Rows, D, Heads, true> {
  typedef I V;
  I codes[Heads][D / 64];
  I start[Heads];  // corrects for keys being multiplied above their value
  F scales[Heads];

  explicit Queries(const float* query) {
    for (int h = 0; h < Heads; h++) {
      uint8_t row[Rows::bytes];
      Rows::put(row, query + h * D);
      scales[h] = all(Rows::scale(row));
      start[h] = I{};
      for (int r = 0; r < D / 64; r++) {
        codes[h][r] = load_ints(row + r * 64);
        if constexpr (kStoredAbove > 0)
          start[h] -= dot<8>(I{}, all(static_cast<int32_t>(kStoredAbove * 0x01010101u)), codes[h][r]);
      }
    }
  }
  void multiply(const uint8_t* key, V* part) const {
    for (int r = 0; r < D / 64; r++) {
      const I k = load_ints(key + r * 64) ^ all(static_cast<int32_t>(kStoredAbove * 0x01010101u));
      for (int h = 0; h < Heads; h++) part[h] = dot_stored<8>(r ? part[h] : start[h], k, codes[h][r]);
    }
  }
  F score(int h, I whole) const { return to_float(whole) * scales[h]; }
};

/// Scores of `length` keys, at least one, for `Heads` queries, 16 keys at a time; `stride` floats between queries.
template <class Rows, int D, int Heads, bool Integer>
inline void score_keys(const float* query, const uint8_t* keys, int64_t length, float* scores, int64_t stride) {
  const Queries<Rows, D, Heads, Integer> queries(query);
  const auto plus = [](auto a, auto b) { return a + b; };
  for (int64_t t = 0; t < length; t += kLanes) {
    ask_ahead(keys + t * Rows::bytes, kLanes * Rows::bytes);
    typename Queries<Rows, D, Heads, Integer>::V part[kLanes / 2][Heads], other[Heads];
    for (int i = 0; i < kLanes / 2; i++) {
      const int64_t key = t + 2 * i;
      queries.multiply(keys + (key < length ? key : length - 1) * Rows::bytes, part[i]);
      queries.multiply(keys + (key + 1 < length ? key + 1 : length - 1) * Rows::bytes, other);
      for (int h = 0; h < Heads; h++) part[i][h] = fold<1>(part[i][h], other[h], plus);
    }
    F scale = all(1.0f);
    if constexpr (Rows::scaled) scale = load_scales<Rows>(keys, t, length);
    for (int h = 0; h < Heads; h++) {
      for (int i = 0; i < kLanes / 2; i += 2) part[i][h] = fold<2>(part[i][h], part[i + 1][h], plus);
      const auto low = fold<4>(part[0][h], part[2][h], plus), high = fold<4>(part[4][h], part[6][h], plus);
      const auto whole = fold<8>(low, high, plus);
      store(scores + h * stride + t, queries.score(h, whole) * scale);
    }
  }
}

/// Sums of `length` values by the weights of `Heads` queries; `stride` floats between queries.
template <class Rows, int D, int Heads>
inline void sum_values(const uint8_t* values, int64_t length, const float* weights, int64_t stride,
                       float* const* results) {
  F out[Heads][D / kLanes];
  for (int h = 0; h < Heads; h++)
    for (int v = 0; v < D / kLanes; v++) out[h][v] = F{};
  for (int64_t t = 0; t < length; t++, values += Rows::bytes) {
    ask_ahead(values, Rows::bytes);
    F weight[Heads];
    for (int h = 0; h < Heads; h++) weight[h] = all(weights[h * stride + t] * Rows::scale(values));
    for (int v = 0; v < D / kLanes; v++) {
      const F value = Rows::get(values, v * kLanes);
      for (int h = 0; h < Heads; h++) out[h][v] += weight[h] * value;
    }
  }
  for (int h = 0; h < Heads; h++)
    for (int v = 0; v < D / kLanes; v++) store(results[h] + v * kLanes, out[h][v]);
}

/// The same in integers. `Most`: largest number of values, a multiple of 16, such that no sum overflows.
template <class Rows, int D, int Heads, int Most>
inline void sum_codes(const uint8_t* values, int64_t length, const float* weights, int64_t stride,
                      float* const* results) {
  static_assert(D % 64 == 0 && Most % kLanes == 0 && Most <= 0x7fffffff / (32767 * 127), "sums fit in 32 bits");
  typedef int16_t Shorts __attribute__((vector_size(64)));
  typedef int16_t HalfAny __attribute__((vector_size(32), aligned(2), may_alias));
  typedef int16_t Half __attribute__((vector_size(32)));
  typedef int8_t BytesAny __attribute__((vector_size(32), aligned(1), may_alias));
  int16_t codes[Heads][Most];
  F unit[Heads];
  for (int h = 0; h < Heads; h++) {
    F scaled[Most / kLanes], top = F{};
    for (int64_t t = 0; t < length; t += kLanes) {
      scaled[t / kLanes] = load(weights + h * stride + t) * load_scales<Rows>(values, t, length);
      top = max(top, scaled[t / kLanes]);
    }
    const float peak = largest(top);
    const F inverse = all(peak > 1e-30f ? 32767.0f / peak : 0.0f);
    unit[h] = all(peak / 32767.0f);
    for (int64_t t = 0; t < length; t += kLanes)
      *reinterpret_cast<HalfAny*>(codes[h] + t) = __builtin_convertvector(nearest(scaled[t / kLanes] * inverse), Half);
  }
  for (int d = 0; d < D; d += 64) {
    I out[Heads][4];
    for (int h = 0; h < Heads; h++)
      for (int v = 0; v < 4; v++) out[h][v] = I{};
    for (int64_t t = 0; t < length; t += 2) {
      const uint8_t* first = values + t * Rows::bytes + d;
      ask_ahead(first, 2 * Rows::bytes);
      const uint8_t* second = t + 1 < length ? first + Rows::bytes : first;  // its weight is 0
      I weight[Heads];
      for (int h = 0; h < Heads; h++) {
        int32_t pair;
        std::memcpy(&pair, codes[h] + t, 4);
        weight[h] = all(pair);
      }
      for (int v = 0; v < 4; v += 2) {
        const Shorts a = __builtin_convertvector(*reinterpret_cast<const BytesAny*>(first + v * kLanes), Shorts);
        const Shorts b = __builtin_convertvector(*reinterpret_cast<const BytesAny*>(second + v * kLanes), Shorts);
        const I low = (I)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48,
                                                 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
        const I high = (I)__builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20,
                                                  52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
        for (int h = 0; h < Heads; h++) {
          out[h][v] = dot_pairs(out[h][v], low, weight[h]);
          out[h][v + 1] = dot_pairs(out[h][v + 1], high, weight[h]);
        }
      }
    }
    for (int h = 0; h < Heads; h++) {
      for (int v = 0; v < 4; v += 2) {
        const F low = to_float(out[h][v]) * unit[h], high = to_float(out[h][v + 1]) * unit[h];
        float* to = results[h] + d + v * kLanes;
        store(to, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
        store(to + kLanes,
              __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
      }
    }
  }
}

}  // namespace llmc
