// Rows of a KV cache: the key or value of one head at one position, D numbers in the type of the cache. A row takes
// `bytes` bytes, or `elements` elements in the last dimension of the cache's tensor; a number is a code times `scale`.
#pragma once
#include "program.h"
#include "simd.h"

namespace llmc {

/// Stores float32 unchanged.
template <int D>
struct FloatRows {
  static constexpr int elements = D;
  static constexpr int64_t bytes = 4 * D;
  static constexpr bool floats = true, scaled = false;

  static void put(uint8_t* row, const float* x) { std::memcpy(row, x, bytes); }
  static F get(const uint8_t* row, int i) { return load(reinterpret_cast<const float*>(row) + i); }
  static float scale(const uint8_t*) { return 1.0f; }
};

/// Stores float16; numbers beyond its range become its largest number.
template <int D>
struct HalfRows {
  static constexpr int elements = D;
  static constexpr int64_t bytes = 2 * D;
  static constexpr bool floats = false, scaled = false;

  static void put(uint8_t* row, const float* x) {
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    for (int i = 0; i < D; i += kLanes) store_half(to + i, min(all(65504.0f), max(all(-65504.0f), load(x + i))));
  }
  static F get(const uint8_t* row, int i) { return load_half(reinterpret_cast<const uint16_t*>(row) + i); }
  static float scale(const uint8_t*) { return 1.0f; }
};

/// Stores int8: D codes, nearest(x * 127 / max|x|), then max|x| / 127 as a float32.
template <int D>
struct ByteRows {
  static constexpr int elements = D + 4;
  static constexpr int64_t bytes = D + 4;
  static constexpr bool floats = false, scaled = true;

  static void put(uint8_t* row, const float* x) {
    F top = F{};
    for (int i = 0; i < D; i += kLanes) top = max(top, abs(load(x + i)));
    const float peak = largest(top);
    const F inverse = all(peak > 1e-30f ? 127.0f / peak : 0.0f);
    for (int i = 0; i < D; i += kLanes)
      *reinterpret_cast<B16Any*>(row + i) = __builtin_convertvector(nearest(load(x + i) * inverse), B16);
    const float scale = peak > 1e-30f ? peak / 127.0f : 0.0f;
    std::memcpy(row + D, &scale, sizeof scale);
  }
  static F get(const uint8_t* row, int i) { return load_bytes(row + i); }
  static float scale(const uint8_t* row) {
    float scale;
    std::memcpy(&scale, row + D, sizeof scale);
    return scale;
  }
};

/// Load the scales of rows t to t + 15, zeros from `length` on.
template <class Rows>
inline F load_scales(const uint8_t* rows, int64_t t, int64_t length) {
  float scales[kLanes];
  for (int i = 0; i < kLanes; i++) scales[i] = t + i < length ? Rows::scale(rows + (t + i) * Rows::bytes) : 0.0f;
  return load(scales);
}

}  // namespace llmc
