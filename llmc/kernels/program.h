// A compiled region: a list of operations over rows of activations, and the data of one execution.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llmc {

struct Run;
struct Op;

/// A matrix of float32 rows. `base` is the number of workspace columns before it; a negative base, ~index, is a tensor
/// of the operator: inputs first, then outputs. `stride` and `offset` are in floats.
struct Ref {
  int32_t base = 0;
  int32_t stride = 0;
  int32_t offset = 0;
};

/// The rows that an operation has: one per token, or one per chosen token.
enum class Space : int32_t { kTokens, kLast };

/// The memory of one thread.
struct Scratch {
  uint8_t* bytes;
  size_t size;
};

/// One operation. Row operations run for each row; chunk operations divide their work themselves.
struct Op {
  const char* (*check)(const Run&, const Op&);  // error in the inputs, before anything runs
  void (*row)(const Run&, const Op&, int64_t row);
  uint32_t (*chunks)(const Run&, const Op&);
  void (*chunk)(const Run&, const Op&, uint32_t index, Scratch&);
  void (*ahead)(const Run&, const Op&, uint32_t index);  // prefetches the start of a chunk; or null
  Space space;
  Ref out, a, b, c, d, e;
  int32_t weight, bias, n, k;
  float x, y;
  int32_t cache[4];  // inputs past key and value, outputs present key and value; or the past and present of a state
  /// `lengths`: tokens of each row - 1, token ids, chosen tokens, or the mask. `window`: the number of keys that a
  /// query sees; 0 for all, negative for chunks of that many.
  int32_t lengths, cos, sin, window;
  int32_t shift = -1;  // input with the rotary tables' row of position 0, int64 scalar; -1 for row 0
  int32_t sinks = -1;  // input with the score of each head's attention sink; -1 for none
  int64_t limit;       // entries of the embedding, or positions of the rotary tables
};

/// Largest number of dimensions of a tensor of the operator.
constexpr int kMostDims = 6;

/// The shape of a tensor of the operator; dimensions beyond `rank` are 1.
struct Shape {
  int64_t dims[kMostDims];
  size_t rank;
};

/// Output dimensions that a step determines; kSlots are the cache's slots, kChosen the chosen tokens of a sequence;
/// kPerToken - n are n parts of every token of every sequence.
constexpr int64_t kBatch = ~0, kSequence = ~1, kSlots = ~2, kChosen = ~3, kPerToken = ~3;

/// An output: its type (ONNX TensorProto), and its shape of numbers and the dimensions above. Input `past` is the past
/// of the cache whose slots kSlots means.
struct Output {
  int32_t type;
  int32_t rank;
  int64_t dims[kMostDims];
  int32_t past;
};

/// The leading dimensions that count a tensor's elements of `bytes` each: the first is sequences, or the first two are
/// sequences and their tokens, or the first is all tokens, of which each has `bytes`.
enum class Over : int32_t { kNothing, kSequences, kTokens, kFlattened };
struct Extent {
  Over over;
  int32_t bytes;
};

struct Region {
  const char* name;
  const int32_t* input_types;
  const Extent* extents;  // of inputs, then outputs
  int32_t inputs;
  const Output* outputs;
  int32_t output_count;
  const Op* ops;  // a row operation has `row`, a chunk operation `chunks` and `chunk`
  int32_t op_count;
  int32_t computed;  // inputs that are not weights; they come first
  int32_t rows_from;             // input whose dimensions are batch, sequence, … or batch, features, sequence
  int32_t sequence_at;           // the dimension of that input that is the sequence
  int32_t total;                 // input with the longest total length, int32 scalar; -1 without attention
  int32_t chosen;                // input whose second dimension is the chosen tokens per sequence; -1 for one
  int32_t choice;                // input with the indices of the chosen tokens, int64; -1 if none are chosen here
  int32_t width;                 // floats of the workspace for each row
  size_t scratch;                // bytes of each thread's memory
  size_t (*shared)(const Run&);  // bytes shared by the threads
};

/// The regions of a model as one variant computes them: operators of the domain `name`.
struct Domain {
  const char* name;
  const Region* regions;
};

struct Run {
  const Region* region;
  void* const* tensors;     // inputs, then outputs
  const Shape* shapes;
  float* workspace;
  uint8_t* shared;
  int64_t batch, sequence, total, chosen;
  int64_t earlier = 0, later = 0;  // tokens of each sequence in other pieces of the step

  int64_t rows(Space space) const { return batch * (space == Space::kTokens ? sequence : chosen); }
  template <class T>
  T* tensor(int32_t index) const {
    return static_cast<T*>(tensors[index]);
  }
  float* at(const Ref& ref, int64_t row) const {
    float* base = ref.base < 0 ? tensor<float>(~ref.base) : workspace + ref.base * (batch * sequence);
    return base + row * ref.stride + ref.offset;
  }
};

/// Up to this many rows run in the tail of the previous phase; more rows get their own phase.
constexpr int64_t kFewRows = 2;
/// Number of tokens of a sequence in one step up to which their results do not depend on that number.
constexpr int64_t kSameTokens = 8;
/// From this number of rows on, a product unpacks its weights once for all rows.
constexpr int64_t kManyRows = 64;

}  // namespace llmc
