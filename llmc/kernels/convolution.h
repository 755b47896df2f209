// A causal convolution of a few taps over each channel by itself (LeCun et al. 1989; in language models: Gu and Dao
// 2023), whose state is the inputs of the last tokens. Activations are rows of channels; the state is (batch, channels,
// taps - 1), the weight (channels, taps).
#pragma once
#include "state.h"

namespace llmc {

template <int Channels, int Taps, bool Silu>
struct Convolution {
  static constexpr int block = 256;  // channels of a chunk
  static constexpr int before = Taps - 1;
  static constexpr int blocks = (Channels + block - 1) / block;

  /// Working memory of one thread, for the channels of a chunk.
  struct alignas(64) Room {
    float weights[Taps][block];
    float bias[block];
    float window[before > 0 ? before : 1][block];  // inputs before this piece, the oldest first
  };
  static constexpr size_t scratch = sizeof(Room);

  static const char* check(const Run& run, const Op& op) { return check_state<Channels, before, 1>(run, op); }

  static uint32_t chunks(const Run& run, const Op&) { return static_cast<uint32_t>(run.batch * blocks); }

  static void chunk(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t b = index / blocks;
    const int first = static_cast<int>(index % blocks) * block;
    const int count = Channels - first < block ? Channels - first : block;
    const int64_t* mask = mask_of(run, op, b);
    Room& room = *reinterpret_cast<Room*>(scratch.bytes);
    prepare(run, op, room, b, first, count);
    const float* recent[Taps];  // inputs of the last tokens that count, the oldest first
    for (int j = 0; j < before; j++) recent[j] = room.window[j];
    for (int64_t token = 0; token < run.sequence; token++) {
      const int64_t row = b * run.sequence + token;
      float* out = run.at(op.out, row) + first;
      if (mask[token] == 0) {
        std::memset(out, 0, sizeof(float) * count);
        continue;
      }
      recent[before] = run.at(op.a, row) + first;
      convolve(room, recent, count, out);
      for (int j = 0; j < before; j++) recent[j] = recent[j + 1];
    }
    float* after = state_after(run, op) + (b * Channels + first) * before;
    for (int i = 0; i < count; i++)
      for (int j = 0; j < before; j++) after[i * before + j] = recent[j][i];
  }

 private:
  /// Bring the chunk's weights and state into the order of rows.
  static void prepare(const Run& run, const Op& op, Room& room, int64_t b, int first, int count) {
    const float* weights = run.tensor<const float>(op.weight) + first * Taps;
    const float* past = state_before(run, op) + (b * Channels + first) * before;
    std::memset(&room, 0, sizeof room);
    for (int j = 0; j < Taps; j++)
      for (int i = 0; i < count; i++) room.weights[j][i] = weights[i * Taps + j];
    if (op.bias >= 0) std::memcpy(room.bias, run.tensor<const float>(op.bias) + first, sizeof(float) * count);
    for (int j = 0; j < before; j++)
      for (int i = 0; i < count; i++) room.window[j][i] = past[i * before + j];
  }

  static void convolve(const Room& room, const float* const* recent, int count, float* out) {
    const auto outputs = [&](int i, auto&& read) {
      F y = load(room.bias + i);
      for (int j = 0; j < Taps; j++) y += load(room.weights[j] + i) * read(recent[j] + i);
      return Silu ? scaled_silu(y, 1.0f) : y;
    };
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, outputs(i, [](const float* p) { return load(p); }));
    if (i == count) return;
    const int left = count - i;
    store_first(out + i, outputs(i, [&](const float* p) { return load_first(p, left); }), left);
  }
};

}  // namespace llmc
