// Operations on one row: norms, element-wise functions, copies. Widths are multiples of 16.
#pragma once
#include "program.h"
#include "simd.h"

namespace llmc {

/// out = norm(a + b), c = a + b. RMS norm (Zhang and Sennrich 2019), or layer norm (Ba et al. 2016) if `Centred`.
/// Skip: whether there is a b. Repeats: number of adjacent norms of W features that share one scale.
template <int W, int Repeats, bool Centred, bool Skip>
void norm_row(const Run& run, const Op& op, int64_t row) {
  const float* scale = run.tensor<const float>(op.weight);
  const float* bias = op.bias < 0 ? nullptr : run.tensor<const float>(op.bias);
  for (int r = 0; r < Repeats; r++) {
    const float* a = run.at(op.a, row) + r * W;
    float* out = run.at(op.out, row) + r * W;
    if constexpr (Skip) {
      const float* b = run.at(op.b, row) + r * W;
      float* total = run.at(op.c, row) + r * W;
      for (int i = 0; i < W; i += kLanes) store(total + i, load(a + i) + load(b + i));
      a = total;
    }
    F first = F{};
    if constexpr (Centred) {
      for (int i = 0; i < W; i += kLanes) first += load(a + i);
      first = all(sum(first) / W);
    }
    F second = F{};
    for (int i = 0; i < W; i += kLanes) {
      const F x = load(a + i) - first;
      second += x * x;
    }
    const F inverse = all(1.0f / __builtin_sqrtf(sum(second) / W + op.x));
    for (int i = 0; i < W; i += kLanes) {
      F x = (load(a + i) - first) * inverse * load(scale + i);
      if (bias != nullptr) x += load(bias + i);
      store(out + i, x);
    }
  }
}

/// Copy a tensor from outside the region into the workspace, or the other way round.
template <int W>
void copy_row(const Run& run, const Op& op, int64_t row) {
  std::memcpy(run.at(op.out, row), run.at(op.a, row), sizeof(float) * W);
}

inline const char* check_choice(const Run& run, const Op& op) {
  const int64_t* chosen = run.tensor<const int64_t>(op.lengths);
  for (int64_t i = 0; i < run.rows(op.space); i++)
    if (chosen[i] < 0 || chosen[i] >= run.sequence) return "a chosen token is none of this step";
  return nullptr;
}

/// Copy the rows of each sequence's chosen tokens.
template <int W>
void chosen_row(const Run& run, const Op& op, int64_t row) {
  const int64_t token = run.tensor<const int64_t>(op.lengths)[row];
  const int64_t sequence = row / run.chosen;
  std::memcpy(run.at(op.out, row), run.at(op.a, sequence * run.sequence + token - run.earlier), sizeof(float) * W);
}

}  // namespace llmc
