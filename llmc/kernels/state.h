// What the states of a sequence share: tokens that count, and the tensors before and after a step. A state has one fixed
// shape, (batch, …), whatever the number of tokens.
#pragma once
#include "program.h"
#include "simd.h"

namespace llmc {

/// The attention mask of row b from the first token of this piece on; it is (batch, total), and its last columns belong
/// to the step.
inline const int64_t* mask_of(const Run& run, const Op& op, int64_t b) {
  const int64_t total = run.shapes[op.lengths].dims[1], step = run.earlier + run.sequence + run.later;
  return run.tensor<const int64_t>(op.lengths) + b * total + total - step + run.earlier;
}

/// The state from which this piece starts: the past for the first piece of a step, else what the piece before wrote.
inline const float* state_before(const Run& run, const Op& op) {
  return run.tensor<const float>(op.cache[run.earlier > 0 ? 1 : 0]);
}
inline float* state_after(const Run& run, const Op& op) { return run.tensor<float>(op.cache[1]); }

/// Check the mask and both tensors of a state (batch, A, B, C); C is 1 for a state with three dimensions.
template <int A, int B, int C>
const char* check_state(const Run& run, const Op& op) {
  const int64_t* mask = run.shapes[op.lengths].dims;
  if (run.shapes[op.lengths].rank != 2 || mask[0] != run.batch || mask[1] < run.sequence)
    return "attention_mask has another shape than (batch, total)";
  for (int i = 0; i < 2; i++) {
    const int64_t* dims = run.shapes[op.cache[i]].dims;
    if (dims[0] != run.batch || dims[1] != A || dims[2] != B || dims[3] != C)
      return "a state has another shape than the model was compiled for";
  }
  return nullptr;
}

}  // namespace llmc
