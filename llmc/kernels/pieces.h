// Split a step into pieces that run one after the other in the same workspace, so that a long prompt needs no more
// workspace than a short one. A piece is as many whole sequences as fit, or some tokens of one sequence. Every token
// gets the same bits as in a single piece: tiles of queries also begin at multiples of kPieceTokens, and no piece is so
// short that attention treats it as a decoding step.
#pragma once
#include "program.h"

namespace llmc {

/// Tokens of a piece, a multiple of attention's tiles. More tokens unpack weights less often; fewer tokens take less
/// memory per step.
constexpr int64_t kPieceTokens = 512;

/// Sequences from `row` on, and the tokens of each from `start` on.
struct Piece {
  int64_t row, rows, start, tokens;
};

/// The largest number of rows of a piece.
inline int64_t rows_of_pieces(const Run& run) {
  const int64_t all = run.rows(Space::kTokens), most = kPieceTokens + kSameTokens;
  if (run.chosen > 1 && run.sequence > most) return run.sequence;
  return all < most ? all : most;
}

/// Call `use` with each piece until it returns a value; chosen tokens of one sequence stay together.
template <class Use>
auto each_piece(const Run& run, Use&& use) -> decltype(use(Piece{})) {
  const int64_t most = rows_of_pieces(run);
  const int64_t together = most / run.sequence > 1 ? most / run.sequence : 1;
  for (int64_t row = 0; row < run.batch; row += together) {
    const int64_t rows = run.batch - row < together ? run.batch - row : together;
    for (int64_t start = 0, tokens; start < run.sequence; start += tokens) {
      tokens = run.sequence - start > most ? kPieceTokens : run.sequence - start;
      if (auto stop = use(Piece{row, rows, start, tokens})) return stop;
    }
  }
  return nullptr;
}

/// The number of bytes of tensor `index` before the part that a piece sees.
inline int64_t bytes_before(const Run& run, int32_t index, const Piece& piece) {
  const int64_t* dims = run.shapes[index].dims;
  const Extent extent = run.region->extents[index];
  int64_t token = 1;
  for (int d = 2; d < kMostDims; d++) token *= dims[d];
  switch (extent.over) {
    case Over::kTokens:
      return extent.bytes * token * (piece.row * dims[1] + piece.start);
    case Over::kSequences:
      return extent.bytes * token * piece.row * dims[1];
    case Over::kFlattened:
      return extent.bytes * (piece.row * run.sequence + piece.start);
    default:
      return 0;
  }
}

/// Return `run` restricted to one piece; `tensors` has room for as many pointers as the run has tensors.
inline Run cut(const Run& run, const Piece& piece, void** tensors) {
  const Region& region = *run.region;
  for (int32_t i = 0; i < region.inputs + region.output_count; i++)
    tensors[i] = run.tensor<uint8_t>(i) + bytes_before(run, i, piece);
  Run part = run;
  part.tensors = tensors;
  part.batch = piece.rows;
  part.sequence = piece.tokens;
  part.earlier = piece.start;
  part.later = run.sequence - piece.start - piece.tokens;
  if (piece.tokens < run.sequence) {  // the one chosen token is in this piece or in another
    const int64_t last = piece.start + piece.tokens - 1;
    const int64_t token = region.choice < 0 ? run.sequence - 1 : *part.tensor<const int64_t>(region.choice);
    part.chosen = token >= piece.start && token <= last;
  }
  return part;
}

}  // namespace llmc
