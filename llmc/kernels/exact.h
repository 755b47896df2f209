// The products and tiles of the gate's programs, which replace those of matmul.h and attention_prefill.h: they read the
// same packed weights, but keep activations, scores and attention weights in float32. Over a float32 cache, their
// results differ from the original only by the rounding of float32.
#pragma once
#include "attention_prefill.h"
#include "matmul.h"

namespace llmc {

/// M: the `Matmul` that this class replaces.
template <class M>
struct Exact {
  static constexpr int64_t rows_of_tile = 64;
  static constexpr int rows_of_block = 8;
  static constexpr size_t scratch = sizeof(F) * M::blocks * M::B;

  static int64_t tiles(const Run& run, const Op& op) {
    return (run.rows(op.space) + rows_of_tile - 1) / rows_of_tile;
  }
  static uint32_t chunks(const Run& run, const Op& op) {
    return static_cast<uint32_t>(M::groups(op) * tiles(run, op));
  }

  /// Compute 16 outputs of up to `rows_of_tile` rows.
  static void chunk(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t g = index % M::groups(op), start = index / M::groups(op) * rows_of_tile;
    const int64_t rows = run.rows(op.space), stop = start + rows_of_tile < rows ? start + rows_of_tile : rows;
    F* weights = reinterpret_cast<F*>(scratch.bytes);
    unpack(run.tensor<const uint8_t>(op.weight) + g * M::group_bytes, weights);
    int64_t row = start;
    for (; row + rows_of_block <= stop; row += rows_of_block) multiply<rows_of_block>(run, op, weights, g, row);
    for (; row < stop; row++) multiply<1>(run, op, weights, g, row);
  }

 private:
  /// Unpack the weights of a group: for each input, the weights of its 16 outputs.
  static void unpack(const uint8_t* group, F* weights) {
    for (int b = 0; b < M::blocks; b++) {
      const uint8_t* codes = group + b * M::block_bytes;
      const F scale = M::scales(group, b), minimum = M::Minimum ? M::minima(group, b) : F{};
      const I zero = M::Codes     ? load_nibbles(group + M::zeros_at + b * (kLanes / 2))
                     : M::Minimum ? I{}
                                  : all(1 << (M::Bits - 1));
      for (int i = 0; i < M::B; i++) {
        const int r = i / 4;
        I code;
        if constexpr (M::Bits == 4) {
          code = (load_ints(codes + r / 2 * 64) >> (i % 4 * 8 + r % 2 * 4)) & all(15);
        } else {
          code = (load_ints(codes + r * 64) >> (i % 4 * 8)) & all(255);
        }
        weights[b * M::B + i] = to_float(code - zero) * scale + minimum;
      }
    }
  }

  template <int Rows>
  static void multiply(const Run& run, const Op& op, const F* weights, int64_t g, int64_t row) {
    const float* a[Rows];
    F total[Rows];
    for (int r = 0; r < Rows; r++) {
      a[r] = run.at(op.a, row + r);
      total[r] = F{};
    }
    for (int k = 0; k < M::K; k++)
      for (int r = 0; r < Rows; r++) total[r] += weights[k] * all(a[r][k]);
    for (int r = 0; r < Rows; r++) M::put(run, op, g, row + r, total[r]);
  }
};

/// A tile of keys and values, and the queries that go through it, like `Tile`.
template <class Cache, int D>
struct ExactTile {
  static_assert(Cache::floats, "rows of the cache are float32");
  using Number = float;  // element of an encoded query
  static constexpr int numbers = D;
  static constexpr int columns = kKeysOfTile / kLanes, vectors = D / kLanes;
  static constexpr int rows_of_block = kVectorRegisters >= 32 ? 4 : 1;
  static constexpr float unit = 0;  // logarithm of what a weight of 1 adds to a total

  /// The state of a query: the largest score so far, and lanes whose sum is the sum of the weights relative to it.
  struct alignas(64) State {
    F total;
    float scale, peak;
  };

  alignas(64) float keys[D * kKeysOfTile];    // (D, keys), zeros beyond the end
  alignas(64) float values[kKeysOfTile * D];  // (keys, D)
  int length;

  static float encode(const float* query, float* to) {
    std::memcpy(to, query, sizeof(float) * D);
    return 1.0f;
  }

  void take(const uint8_t* key_rows, const uint8_t* value_rows, int count) {
    length = count;
    std::memset(keys, 0, sizeof keys);
    for (int t = 0; t < count; t++) {
      const uint8_t *key = key_rows + t * Cache::bytes, *value = value_rows + t * Cache::bytes;
      for (int v = 0; v < vectors; v++) {
        const F x = Cache::get(key, v * kLanes);
        for (int i = 0; i < kLanes; i++) keys[(v * kLanes + i) * kKeysOfTile + t] = x[i];
        store(values + t * D + v * kLanes, Cache::get(value, v * kLanes));
      }
    }
  }

  template <int Rows, class Seen, class Bend>
  void pass(const float* queries, State* states, float* out, const Seen& seen, const Bend& bend) const {
    F scores[Rows][columns];
    for (int r = 0; r < Rows; r++)
      for (int c = 0; c < columns; c++) scores[r][c] = F{};
    for (int d = 0; d < D; d++) {
      F k[columns];
      for (int c = 0; c < columns; c++) k[c] = load(keys + d * kKeysOfTile + c * kLanes);
      for (int r = 0; r < Rows; r++) {
        const F q = all(queries[r * D + d]);
        for (int c = 0; c < columns; c++) scores[r][c] += k[c] * q;
      }
    }
    alignas(64) float weights[Rows][kKeysOfTile];
    F shrink[Rows];
    for (int r = 0; r < Rows; r++) {
      F top = all(states[r].peak);
      for (int c = 0; c < columns; c++) scores[r][c] = bend(scores[r][c]);
      hide_unseen(seen(r), scores[r]);
      for (int c = 0; c < columns; c++) top = max(top, scores[r][c]);
      const float peak = largest(top);
      const F shift = all(peak > -2e38f ? peak : -2e38f);  // if no key is seen, all weights are 0
      shrink[r] = exp(all(states[r].peak) - shift);
      states[r].total *= shrink[r];
      for (int c = 0; c < columns; c++) {
        const F weight = exp(scores[r][c] - shift);
        store(weights[r] + c * kLanes, weight);
        states[r].total += weight;
      }
      states[r].peak = peak;
    }
    constexpr int together = vectors % 4 == 0 ? 4 : vectors % 2 == 0 ? 2 : 1;
    for (int v0 = 0; v0 < vectors; v0 += together) {
      F sums[Rows][together];
      for (int r = 0; r < Rows; r++)
        for (int v = 0; v < together; v++) sums[r][v] = F{};
      for (int t = 0; t < length; t++) {
        F x[together];
        for (int v = 0; v < together; v++) x[v] = load(values + t * D + (v0 + v) * kLanes);
        for (int r = 0; r < Rows; r++) {
          const F w = all(weights[r][t]);
          for (int v = 0; v < together; v++) sums[r][v] += x[v] * w;
        }
      }
      for (int r = 0; r < Rows; r++) {
        for (int v = 0; v < together; v++) {
          float* to = out + r * D + (v0 + v) * kLanes;
          store(to, load(to) * shrink[r] + sums[r][v]);
        }
      }
    }
  }
};

}  // namespace llmc
