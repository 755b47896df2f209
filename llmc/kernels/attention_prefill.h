// Attention of many queries, for a prompt: tiles of keys and values as 16-bit codes, and blocks of queries that go
// through a tile together, with scores, softmax and sums of values in registers. The numbers of levels are chosen such
// that sums of products of pairs of codes fit in 32 bits without overflow.
#pragma once
#include "cache.h"
#include "simd.h"

namespace llmc {

constexpr int kKeysOfTile = 64;

/// Largest total bits of two signed factors, without signs, such that the sum of `Count` products fits in 32 bits.
constexpr int bits_of_sum(int count) {
  int bits = 31;
  for (int n = 1; n < count; n *= 2) bits--;
  return bits;
}

/// Pack 32 numbers into 16 bits each, two neighbours per lane.
inline I pair_up(I low, I high) {
  typedef int16_t Half __attribute__((vector_size(32)));
  const Half a = __builtin_convertvector(low, Half), b = __builtin_convertvector(high, Half);
  return (I)__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                    22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

/// One step of a 16 by 16 transposition: exchange squares of `Step` across the diagonal.
template <int Step>
inline void swap_squares(I* rows) {
#define LLMC_LANES(OF) \
  OF(0), OF(1), OF(2), OF(3), OF(4), OF(5), OF(6), OF(7), OF(8), OF(9), OF(10), OF(11), OF(12), OF(13), OF(14), OF(15)
#define LLMC_LOW(L) ((L)&Step ? 16 + (L)-Step : (L))
#define LLMC_HIGH(L) ((L)&Step ? 16 + (L) : (L) + Step)
  for (int i = 0; i < kLanes; i++) {
    if (i & Step) continue;
    const I a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shufflevector(a, b, LLMC_LANES(LLMC_LOW));
    rows[i + Step] = __builtin_shufflevector(a, b, LLMC_LANES(LLMC_HIGH));
  }
#undef LLMC_HIGH
#undef LLMC_LOW
#undef LLMC_LANES
}

/// Mask the scores of a tile's keys before `start` and from `stop` on.
template <class Range>
inline void hide_unseen(const Range& range, F* scores) {
  if (range.start <= 0 && range.stop >= kKeysOfTile) return;
  const F lane = F{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int c = 0; c < kKeysOfTile / kLanes; c++) {
    const F at = lane + all(static_cast<float>(c * kLanes));
    scores[c] = at < all(static_cast<float>(range.start)) ? all(-3e38f) : scores[c];
    scores[c] = at < all(static_cast<float>(range.stop)) ? scores[c] : all(-3e38f);
  }
}

/// A tile of one KV head, and blocks of queries over it.
template <class Cache, int D>
struct Tile {
  using Number = int32_t;  // element of an encoded query
  static constexpr int columns = kKeysOfTile / kLanes;
  static constexpr int vectors = D / kLanes;
  static constexpr int pairs = (D + 31) / 32 * 16;  // of neighbouring numbers of a row, the last padded with zeros
  static constexpr int numbers = pairs;             // elements of an encoded query
  static constexpr int query_bits = bits_of_sum(D) / 2, key_bits = bits_of_sum(D) - query_bits;
  static constexpr int value_bits = bits_of_sum(kKeysOfTile) / 2, weight_bits = bits_of_sum(kKeysOfTile) - value_bits;
  static_assert(query_bits >= 8 && key_bits < 16 && weight_bits == 13, "codes have 16 bits");
  static constexpr float levels(int bits) { return static_cast<float>((1 << bits) - 1); }
  static constexpr float log_of_levels = weight_bits * 0.69314718f - 1e-4f;  // rounds to the last level
  static constexpr float unit = log_of_levels;  // logarithm of what a weight of 1 adds to a total
  /// Powers of two between the largest value of a tile and values whose codes have fewer bits.
  static constexpr int32_t kOctaves = 20;
  /// Values below 2 to this exponent use its codes: their units would leave the range of floats.
  static constexpr int32_t kLeastExponent = -60;
  /// Number of queries that are in registers together.
  static constexpr int rows_of_block = kVectorRegisters >= 32 ? 6 : 1;

  int32_t keys[pairs * kKeysOfTile];            // (pairs, keys)
  int32_t values[kKeysOfTile / 2 * D];          // (pairs of keys, D)
  alignas(64) float key_scales[kKeysOfTile];    // value of one code unit of a key; zeros beyond the end
  alignas(64) float value_logs[kKeysOfTile];    // natural logarithm of the value of one code unit of a value
  alignas(64) float value_counts[kKeysOfTile];  // the reciprocal of that unit
  int length;

  /// A row of the cache with its largest magnitude.
  struct Row {
    F x[vectors];
    float peak;
    explicit Row(const uint8_t* row) {
      F top = F{};
      const F scale = all(Cache::scale(row));
      for (int v = 0; v < vectors; v++) {
        x[v] = Cache::get(row, v * kLanes);
        if constexpr (Cache::scaled) x[v] *= scale;
        top = max(top, abs(x[v]));
      }
      peak = largest(top);
    }
  };
  static float inverse(float peak, int bits) { return peak > 1e-30f ? levels(bits) / peak : 0.0f; }

  /// Load the next `count` keys and values of the cache, at most one tile.
  void take(const uint8_t* key_rows, const uint8_t* value_rows, int count) {
    length = count;
    std::memset(key_scales, 0, sizeof key_scales);
    for (int t = 0; t < kKeysOfTile; t += kLanes) {
      I turned[pairs / 16][kLanes] = {};
      for (int i = 0; i < kLanes && t + i < count; i++) {
        const Row row(key_rows + (t + i) * Cache::bytes);
        const F to = all(inverse(row.peak, key_bits));
        for (int p = 0; p < pairs / 16; p++) {
          const I high = 2 * p + 1 < vectors ? nearest(row.x[2 * p + 1] * to) : I{};
          turned[p][i] = pair_up(nearest(row.x[2 * p] * to), high);
        }
        key_scales[t + i] = row.peak > 1e-30f ? row.peak / levels(key_bits) : 0.0f;
      }
      for (int p = 0; p < pairs / 16; p++) {
        swap_squares<1>(turned[p]);
        swap_squares<2>(turned[p]);
        swap_squares<4>(turned[p]);
        swap_squares<8>(turned[p]);
        for (int i = 0; i < kLanes; i++) store_ints(keys + (p * 16 + i) * kKeysOfTile + t, turned[p][i]);
      }
    }
    int32_t exponents[kKeysOfTile], least = kLeastExponent;
    for (int t = 0; t < kKeysOfTile; t++) {
      exponents[t] = t < count ? exponent_of(Row(value_rows + t * Cache::bytes).peak) : kLeastExponent;
      least = least > exponents[t] - kOctaves ? least : exponents[t] - kOctaves;
    }
    for (int t = 0; t < kKeysOfTile; t++) {
      const int32_t counts = (exponents[t] < least ? least : exponents[t]) - value_bits;
      value_logs[t] = static_cast<float>(counts) * 0.69314718f;
      value_counts[t] = power_of_two(-counts);
    }
    for (int t = 0; t < kKeysOfTile; t += 2) {
      I codes[2][vectors] = {};
      for (int i = 0; i < 2 && t + i < count; i++) {
        const Row row(value_rows + (t + i) * Cache::bytes);
        for (int v = 0; v < vectors; v++) codes[i][v] = nearest(row.x[v] * all(value_counts[t + i]));
      }
      for (int v = 0; v < vectors; v++)
        store_ints(values + t / 2 * D + v * kLanes, (codes[0][v] & all(0xffff)) | (codes[1][v] << 16));
    }
  }

  /// The exponent of the smallest power of two above x.
  static int32_t exponent_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits >> 23) - 126;
  }
  static float power_of_two(int32_t exponent) {
    const int32_t bits = (exponent + 127) << 23;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  /// Encode a query as codes, `pairs` 32-bit words; return the value of one code unit.
  static float encode(const float* query, int32_t* codes) {
    F top = F{};
    for (int v = 0; v < vectors; v++) top = max(top, abs(load(query + v * kLanes)));
    const float peak = largest(top);
    const F to = all(inverse(peak, query_bits));
    for (int p = 0; p < pairs / 16; p++) {
      const I low = nearest(load(query + 2 * p * kLanes) * to);
      const I high = 2 * p + 1 < vectors ? nearest(load(query + (2 * p + 1) * kLanes) * to) : I{};
      store_ints(codes + p * 16, pair_up(low, high));
    }
    return peak > 1e-30f ? peak / levels(query_bits) : 0.0f;
  }

  /// The state of a query between tiles: the value of one code unit, the largest logarithm of a part of the result so
  /// far, and sums of weights relative to it, in lanes.
  struct alignas(64) State {
    F total;
    float scale, peak;
  };

  /// Process `Rows` queries over this tile. `seen` returns the keys of a query, counted in this tile: from `start` to
  /// before `stop`; `bend` transforms scores. Sums are added to `out`, (Rows, D).
  ///
  /// A weight's code is the code of the exponential times the unit of its value, relative to the largest in the tile:
  /// the rounding error is small compared with the largest part of the result, whether by weight or by value.
  template <int Rows, class Seen, class Bend>
  void pass(const int32_t* codes, State* states, float* out, const Seen& seen, const Bend& bend) const {
    alignas(64) int32_t weights[Rows][kKeysOfTile / 2];
    F scores[Rows][columns];
    score<Rows>(codes, states, seen, bend, scores);
    F here = all(-3e38f), before = here;  // the rows' largest scores, in this tile and before it
    for (int r = 0; r < Rows; r++) {
      F top = scores[r][0];
      for (int c = 1; c < columns; c++) top = max(top, scores[r][c]);
      here[r] = largest(top);
      before[r] = states[r].peak;
    }
    const F peaks = max(here, before);
    const F shrink = exp(before - peaks), grow = exp(here - peaks);
    for (int r = 0; r < Rows; r++) {
      F added = F{};
      I code[columns];
      const F top = all(max(here, all(-2e38f))[r] - log_of_levels);  // if no key is seen, all weights are 0
      for (int c = 0; c < columns; c++) {
        const F weight = exp(scores[r][c] - top);
        added += weight * load(value_counts + c * kLanes);
        code[c] = nearest(weight);
      }
      for (int c = 0; c < columns; c += 2) store_ints(weights[r] + c / 2 * kLanes, pair_up(code[c], code[c + 1]));
      states[r].total = states[r].total * all(shrink[r]) + added * all(grow[r]);
      states[r].peak = peaks[r];
    }
    constexpr int together = vectors % 4 == 0 ? 4 : vectors % 2 == 0 ? 2 : 1;
    for (int v0 = 0; v0 < vectors; v0 += together) {
      I sums[Rows][together];
      for (int r = 0; r < Rows; r++)
        for (int v = 0; v < together; v++) sums[r][v] = I{};
      for (int t = 0; t < (length + 1) / 2; t++) {
        I x[together];
        for (int v = 0; v < together; v++) x[v] = load_ints(values + t * D + (v0 + v) * kLanes);
        for (int r = 0; r < Rows; r++) {
          const I w = all(weights[r][t]);
          for (int v = 0; v < together; v++) sums[r][v] = dot_pairs(sums[r][v], x[v], w);
        }
      }
      for (int r = 0; r < Rows; r++) {
        for (int v = 0; v < together; v++) {
          float* to = out + r * D + (v0 + v) * kLanes;
          store(to, load(to) * all(shrink[r]) + to_float(sums[r][v]) * all(grow[r]));
        }
      }
    }
  }

 private:
  template <int Rows, class Seen, class Bend>
  void score(const int32_t* codes, const State* states, const Seen& seen, const Bend& bend,
             F (&scores)[Rows][columns]) const {
    I sums[Rows][columns];
    for (int r = 0; r < Rows; r++)
      for (int c = 0; c < columns; c++) sums[r][c] = I{};
    for (int p = 0; p < pairs; p++) {
      I k[columns];
      for (int c = 0; c < columns; c++) k[c] = load_ints(keys + p * kKeysOfTile + c * kLanes);
      for (int r = 0; r < Rows; r++) {
        const I q = all(codes[r * pairs + p]);
        for (int c = 0; c < columns; c++) sums[r][c] = dot_pairs(sums[r][c], k[c], q);
      }
    }
    for (int r = 0; r < Rows; r++) {
      for (int c = 0; c < columns; c++)
        scores[r][c] = bend(to_float(sums[r][c]) * (all(states[r].scale) * load(key_scales + c * kLanes))) +
                       load(value_logs + c * kLanes);
      hide_unseen(seen(r), scores[r]);
    }
  }
};

}  // namespace llmc
