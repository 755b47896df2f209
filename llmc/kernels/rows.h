// Operations on one row: norms, element-wise functions, copies. Widths of norms are multiples of 16.
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

/// Copy `Count` parts of `Width` features that are `From` features apart to places that are `To` apart.
template <int Count, int Width, int From, int To>
void copy_parts_row(const Run& run, const Op& op, int64_t row) {
  const float* from = run.at(op.a, row);
  float* to = run.at(op.out, row);
  for (int i = 0; i < Count; i++) std::memcpy(to + i * To, from + i * From, sizeof(float) * Width);
}

/// Write each of `Outer` parts of `Inner` features `Copies` times.
template <int Outer, int Copies, int Inner>
void spread_row(const Run& run, const Op& op, int64_t row) {
  const float* from = run.at(op.a, row);
  float* to = run.at(op.out, row);
  for (int o = 0; o < Outer; o++)
    for (int c = 0; c < Copies; c++)
      for (int i = 0; i < Inner; i++) to[(o * Copies + c) * Inner + i] = from[o * Inner + i];
}

/// Reduce each of `Groups` parts of W features to its sum or mean.
template <int Groups, int W, bool Mean>
void reduce_row(const Run& run, const Op& op, int64_t row) {
  const float* from = run.at(op.a, row);
  float* to = run.at(op.out, row);
  for (int g = 0; g < Groups; g++, from += W) {
    F total = F{};
    int i = 0;
    for (; i + kLanes <= W; i += kLanes) total += load(from + i);
    if (i < W) total += load_first(from + i, W - i);
    to[g] = sum(total) * (Mean ? 1.0f / W : 1.0f);
  }
}

inline const char* check_positions(const Run& run, const Op& op) {
  const int64_t* positions = run.tensor<const int64_t>(op.lengths);
  for (int64_t i = 0; i < run.rows(op.space); i++)
    if (positions[i] < 0 || positions[i] >= op.limit) return "a position is beyond the tables of the rotary embedding";
  return nullptr;
}

/// Rotate the first `Rotated` features of each head (Su et al. 2021).
template <int Heads, int D, int Rotated, bool Interleaved>
void rotary_row(const Run& run, const Op& op, int64_t row) {
  constexpr int half = Rotated / 2;
  const int64_t position = run.tensor<const int64_t>(op.lengths)[row];
  const float* cos = run.tensor<const float>(op.cos) + position * half;
  const float* sin = run.tensor<const float>(op.sin) + position * half;
  const float* from = run.at(op.a, row);
  float* to = run.at(op.out, row);
  for (int h = 0; h < Heads; h++, from += D, to += D) {
    for (int i = 0; i < half; i++) {
      const int low = Interleaved ? 2 * i : i, high = Interleaved ? 2 * i + 1 : i + half;
      const float x = from[low], y = from[high];
      to[low] = x * cos[i] - y * sin[i];
      to[high] = y * cos[i] + x * sin[i];
    }
    for (int i = Rotated; i < D; i++) to[i] = from[i];
  }
}

/// The number of row `row`'s first feature in a tensor (batch, W, sequence) of the whole step, and the distance to the
/// next.
template <int W>
inline float* turned(const Run& run, const Op& op, int64_t row, int64_t& step) {
  step = run.earlier + run.sequence + run.later;
  return run.tensor<float>(op.weight) + row / run.sequence * W * step + run.earlier + row % run.sequence;
}

/// Copy a row of a tensor (batch, W, sequence) into the workspace, or the other way round.
template <int W>
void turn_in_row(const Run& run, const Op& op, int64_t row) {
  int64_t step;
  const float* from = turned<W>(run, op, row, step);
  float* to = run.at(op.out, row);
  for (int i = 0; i < W; i++) to[i] = from[i * step];
}
template <int W>
void turn_out_row(const Run& run, const Op& op, int64_t row) {
  int64_t step;
  float* to = turned<W>(run, op, row, step);
  const float* from = run.at(op.a, row);
  for (int i = 0; i < W; i++) to[i * step] = from[i];
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
