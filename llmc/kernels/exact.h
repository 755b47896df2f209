// Products with the same packed weights as those of matmul.h, with activations in float32 as they come. The gate runs
// a program with them: what it computes differs from the original by the rounding of float32 in its products alone.
#pragma once
#include "matmul.h"

namespace llmc {

/// M: the `Matmul` that it stands for.
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

  /// 16 outputs of up to `rows_of_tile` rows.
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
  /// The weights of a group: for each input those of its 16 outputs.
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

}  // namespace llmc
