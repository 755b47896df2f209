// Grouped-query attention (Ainslie et al. 2023) over an appended cache, with running softmax (Milakov and Gimelshein
// 2018; Dao et al. 2022) over tiles of keys. The cache is (batch, KV heads, slots, elements of a row).
#pragma once
#include <type_traits>

#include "attention_decode.h"
#include "attention_prefill.h"
#include "cache.h"
#include "program.h"
#include "simd.h"

namespace llmc {

template <int Heads, int KvHeads, int D, int Rotated, bool Interleaved, template <int> class Type = FloatRows,
          template <class, int> class Many = Tile>
struct Attention {
  using Rows = Type<D>;
  static constexpr int group = Heads / KvHeads;
  static constexpr int vectors = D / kLanes;
  static constexpr int queries_of_tile = group >= 16 ? 4 : group >= 8 ? 32 : 64;  // tokens; each has `group` rows
  static constexpr int rows_of_tile = queries_of_tile * group;
  static constexpr int keys_of_split = 128;
  static constexpr bool integers = Rows::scaled && D % 64 == 0;  // products of few queries use integers
  static constexpr int partial = D + kLanes;  // floats of a partial result: output, maximum, sum
  using Keys = Many<Rows, D>;
  /// Working memory of one thread: for many queries, or for the scores of few queries.
  struct alignas(64) Room {
    Keys keys;
    alignas(64) float out[rows_of_tile * D];
    alignas(64) typename Keys::Number queries[rows_of_tile * Keys::numbers];
    typename Keys::State states[rows_of_tile];
  };
  static constexpr size_t scores_of_few = sizeof(float) * group * keys_of_split;
  static constexpr size_t scratch = sizeof(Room) > scores_of_few ? sizeof(Room) : scores_of_few;
  static_assert(D % kLanes == 0 && Heads % KvHeads == 0, "whole vectors and whole groups");

  /// Whether the step splits the keys instead of tiling the queries. The two ways sum in different orders, so a token
  /// has the same bits in steps of up to kSameTokens tokens as alone.
  static bool few(const Run& run) { return group <= 16 * 4 && run.sequence <= kSameTokens; }
  static int64_t splits(const Run& run) { return (run.total + keys_of_split - 1) / keys_of_split; }
  static size_t shared(const Run& run) {
    return few(run) ? sizeof(float) * run.batch * run.sequence * Heads * splits(run) * partial : 0;
  }

  /// The number of tokens of row b after this step, and before this piece of it.
  static int64_t after(const Run& run, const Op& op, int64_t b) {
    return run.tensor<const int32_t>(op.lengths)[b] + static_cast<int64_t>(1);
  }
  static int64_t before(const Run& run, const Op& op, int64_t b) {
    const int64_t step = run.earlier + run.sequence + run.later;
    return (step == run.total ? 0 : after(run, op, b) - step) + run.earlier;
  }
  static uint8_t* slot(const Run& run, int32_t tensor, int64_t b, int64_t head, int64_t position) {
    const int64_t slots = run.shapes[tensor].dims[2];
    return run.tensor<uint8_t>(tensor) + ((b * KvHeads + head) * slots + position) * Rows::bytes;
  }

  static int64_t shift(const Run& run, const Op& op) {
    return op.shift < 0 ? 0 : *run.tensor<const int64_t>(op.shift);
  }

  static const char* check(const Run& run, const Op& op) {
    if (run.total < run.sequence) return "total_sequence_length is below the number of tokens of this step";
    for (int64_t b = 0; b < run.batch; b++) {
      const int64_t past = before(run, op, b), total = after(run, op, b);
      if (past < 0 || total < 0) return "seqlens_k is below the number of tokens of this step";
      if (total > run.total || past + run.sequence > run.shapes[op.cache[2]].dims[2])
        return "the KV cache has fewer slots than seqlens_k asks for";
      if (past > run.shapes[op.cache[0]].dims[2]) return "seqlens_k counts more tokens than the past has slots";
      if (Rotated > 0 && past + run.sequence + shift(run, op) > op.limit) return "a position is beyond the tables of the rotary embedding";
    }
    for (int i = 0; i < 4; i++) {
      const Shape& shape = run.shapes[op.cache[i]];
      if (shape.rank != 4 || shape.dims[0] != run.batch || shape.dims[1] != KvHeads ||
          shape.dims[3] != Rows::elements)
        return "a KV cache has another shape than the model was compiled for";
    }
    return nullptr;
  }

  /// Copy the past into the present if they are two buffers; the step's first piece does so.
  static uint32_t carry_chunks(const Run& run, const Op& op) {
    const auto same = [&](int i) { return run.tensor<uint8_t>(op.cache[i]) == run.tensor<uint8_t>(op.cache[2 + i]); };
    return run.earlier > 0 || (same(0) && same(1)) ? 0 : static_cast<uint32_t>(run.batch * KvHeads);
  }
  static void carry(const Run& run, const Op& op, uint32_t index, Scratch&) {
    const int64_t b = index / KvHeads, head = index % KvHeads, tokens = before(run, op, b);
    for (int i = 0; i < 2; i++) {
      if (run.tensor<uint8_t>(op.cache[i]) == run.tensor<uint8_t>(op.cache[2 + i]) || tokens == 0) continue;
      std::memcpy(slot(run, op.cache[2 + i], b, head, 0), slot(run, op.cache[i], b, head, 0), tokens * Rows::bytes);
    }
  }

  /// Rotate (Su et al. 2021) and scale the query.
  static void turn(const Run& run, const Op& op, int64_t row) {
    const int64_t position = before(run, op, row / run.sequence) + row % run.sequence;
    float* query = run.at(op.out, row);
    const float* source = run.at(op.a, row);
    for (int h = 0; h < Heads; h++) {
      rotate(run, op, source + h * D, query + h * D, position);
      for (int i = 0; i < D; i += kLanes) store(query + h * D + i, load(query + h * D + i) * all(op.x));
    }
  }

  /// Turn query and key, and append key and value to the cache.
  static void append(const Run& run, const Op& op, int64_t row) {
    const int64_t b = row / run.sequence, position = before(run, op, b) + row % run.sequence;
    turn(run, op, row);
    for (int h = 0; h < KvHeads; h++) {
      float key[D];
      rotate(run, op, run.at(op.b, row) + h * D, key, position);
      Rows::put(slot(run, op.cache[2], b, h, position), key);
      Rows::put(slot(run, op.cache[3], b, h, position), run.at(op.c, row) + h * D);
    }
  }

  static void rotate(const Run& run, const Op& op, const float* from, float* to, int64_t position) {
    constexpr int half = Rotated / 2;
    const int64_t row = Rotated ? position + shift(run, op) : 0;
    const float* cos = Rotated ? run.tensor<const float>(op.cos) + row * half : nullptr;
    const float* sin = Rotated ? run.tensor<const float>(op.sin) + row * half : nullptr;
    for (int i = 0; i < half; i++) {
      const int low = Interleaved ? 2 * i : i, high = Interleaved ? 2 * i + 1 : i + half;
      const float x = from[low], y = from[high];
      to[low] = x * cos[i] - y * sin[i];
      to[high] = y * cos[i] + x * sin[i];
    }
    for (int i = Rotated; i < D; i++) to[i] = from[i];
  }

  static uint32_t chunks(const Run& run, const Op&) {
    if (few(run)) return static_cast<uint32_t>(run.batch * KvHeads * splits(run));
    return static_cast<uint32_t>(run.batch * KvHeads * ((run.sequence + queries_of_tile - 1) / queries_of_tile));
  }

  static void chunk(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    if (few(run)) {
      split(run, op, index, scratch);
    } else {
      tile(run, op, index, scratch);
    }
  }

  /// The keys that the query at `position` of row b sees: from start to before stop.
  struct Range {
    int64_t start, stop;
  };
  static Range seen(const Run& run, const Op& op, int64_t b, int64_t position) {
    const int64_t total = after(run, op, b);
    const int64_t stop = position + 1 < total ? position + 1 : total;  // padding sees the keys that exist
    if (op.window < 0 && stop > 0) return {(stop - 1) / -op.window * -op.window, stop};
    return {op.window > 0 && stop > op.window ? stop - op.window : 0, stop};
  }

  static F bend(const Op& op, F score) { return op.y > 0 ? all(op.y) * tanh(score * all(1.0f / op.y)) : score; }

  static float* partial_of(const Run& run, int64_t row, int64_t head, int64_t split) {
    return reinterpret_cast<float*>(run.shared) + ((row * Heads + head) * splits(run) + split) * partial;
  }

  /// Process one split of the keys for the few queries of one KV head.
  static void split(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t count = splits(run), part = index % count, head = index / count % KvHeads,
                  b = index / count / KvHeads;
    float* scores = reinterpret_cast<float*>(scratch.bytes);  // group x keys_of_split
    const uint8_t* keys = slot(run, op.cache[2], b, head, 0);
    const uint8_t* values = slot(run, op.cache[3], b, head, 0);
    for (int64_t token = 0; token < run.sequence; token++) {
      const int64_t row = b * run.sequence + token;
      const Range range = seen(run, op, b, before(run, op, b) + token);
      const int64_t from = part * keys_of_split;
      const int64_t start = range.start > from ? range.start : from;
      const int64_t stop = range.stop < from + keys_of_split ? range.stop : from + keys_of_split;
      const float* query = run.at(op.a, row) + head * group * D;
      float* results[group];
      for (int h = 0; h < group; h++) {
        results[h] = partial_of(run, row, head * group + h, part);
        results[h][D] = -3e38f;
        results[h][D + 1] = 0;
      }
      if (start >= stop) continue;
      const int64_t length = stop - start;
      score(op, query, keys + start * Rows::bytes, length, scores);
      for (int h = 0; h < group; h++) {
        float* s = scores + h * keys_of_split;
        F top = all(-3e38f);
        for (int64_t i = 0; i < length; i += kLanes) top = max(top, load(s + i));
        const float peak = largest(top);
        F total = F{};
        for (int64_t i = 0; i < length; i += kLanes) {
          const F p = exp(load(s + i) - all(peak));
          store(s + i, p);
          total += p;
        }
        results[h][D] = peak;
        results[h][D + 1] = sum(total);
      }
      weigh(values + start * Rows::bytes, length, scores, results);
    }
  }

  /// Number of heads whose queries are in registers together.
  static constexpr int heads_of_block = group % 3 == 0 ? 3 : group % 2 == 0 ? 2 : 1;

  /// Compute the scores of `length` keys for each query of the group; lanes beyond the end are -3e38.
  static void score(const Op& op, const float* query, const uint8_t* keys, int64_t length, float* scores) {
    for (int h = 0; h < group; h += heads_of_block)
      score_keys<Rows, D, heads_of_block, integers>(query + h * D, keys, length, scores + h * keys_of_split,
                                                    keys_of_split);
    const F lane = F{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t last = (length - 1) / kLanes * kLanes;
    for (int h = 0; h < group; h++) {
      float* s = scores + h * keys_of_split;
      if (op.y > 0)
        for (int64_t t = 0; t < length; t += kLanes) store(s + t, bend(op, load(s + t)));
      store(s + last, lane < all(static_cast<float>(length - last)) ? load(s + last) : all(-3e38f));
    }
  }

  static void weigh(const uint8_t* values, int64_t length, const float* scores, float* const* results) {
    for (int h = 0; h < group; h += heads_of_block) {
      const float* weights = scores + h * keys_of_split;
      if constexpr (integers)
        sum_codes<Rows, D, heads_of_block, keys_of_split>(values, length, weights, keys_of_split, results + h);
      else
        sum_values<Rows, D, heads_of_block>(values, length, weights, keys_of_split, results + h);
    }
  }

  /// The factor that turns a sum of values by weights relative to exp(peak) into the result of `head`. `total` is the
  /// sum of these weights times exp(unit); an attention sink is one more weight, without a value.
  static float normalizer(const Run& run, const Op& op, int64_t head, float peak, float total, float unit) {
    if (op.sinks < 0) return total > 0 ? 1.0f / total : 0.0f;
    const float sink = run.tensor<const float>(op.sinks)[head], top = sink > peak ? sink : peak;
    const F weights = exp(F{peak - top, sink - top + unit});
    const float whole = total * weights[0] + weights[1];
    return whole > 0 ? weights[0] / whole : 0.0f;
  }

  /// Combine the partial results of one row in their order.
  static void combine(const Run& run, const Op& op, int64_t row) {
    if (!few(run)) return;
    float* out = run.at(op.out, row);
    for (int h = 0; h < Heads; h++) {
      float peak = -3e38f;
      for (int64_t s = 0; s < splits(run); s++) {
        const float* part = partial_of(run, row, h, s);
        if (part[D + 1] > 0 && part[D] > peak) peak = part[D];
      }
      F acc[vectors];
      for (int v = 0; v < vectors; v++) acc[v] = F{};
      float total = 0;
      for (int64_t s = 0; s < splits(run); s++) {
        const float* part = partial_of(run, row, h, s);
        if (!(part[D + 1] > 0)) continue;
        const float weight = exp(all(part[D] - peak))[0];
        total += weight * part[D + 1];
        for (int v = 0; v < vectors; v++) acc[v] += all(weight) * load(part + v * kLanes);
      }
      const F inverse = all(normalizer(run, op, h, peak, total, 0));
      for (int v = 0; v < vectors; v++) store(out + h * D + v * kLanes, acc[v] * inverse);
    }
  }

  /// Process a tile of queries, with all heads of one KV head, over all the keys that they see.
  static void tile(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t tiles = (run.sequence + queries_of_tile - 1) / queries_of_tile;
    // The last queries see the most keys: start with them, so that the threads finish together.
    const int64_t first = (tiles - 1 - index % tiles) * queries_of_tile, head = index / tiles % KvHeads,
                  b = index / tiles / KvHeads;
    const int64_t tokens = run.sequence - first < queries_of_tile ? run.sequence - first : queries_of_tile;
    const int rows = static_cast<int>(tokens * group);
    const int64_t position = before(run, op, b) + first;
    Room& room = *reinterpret_cast<Room*>(scratch.bytes);
    const auto numbers_of = [&](const Ref& ref, int r) {  // of a query or of its result
      return run.at(ref, b * run.sequence + first + r / group) + (head * group + r % group) * D;
    };
    for (int r = 0; r < rows; r++) {
      const float scale = Keys::encode(numbers_of(op.a, r), room.queries + r * Keys::numbers);
      room.states[r] = {F{}, scale, -3e38f};
      for (int i = 0; i < D; i += kLanes) store(room.out + r * D + i, F{});
    }
    const int64_t start = seen(run, op, b, position).start / kKeysOfTile * kKeysOfTile;
    const int64_t stop = seen(run, op, b, position + tokens - 1).stop;
    for (int64_t t = start; t < stop; t += kKeysOfTile) {
      const int length = static_cast<int>(stop - t < kKeysOfTile ? stop - t : kKeysOfTile);
      room.keys.take(slot(run, op.cache[2], b, head, t), slot(run, op.cache[3], b, head, t), length);
      int r = 0;
      const auto in_tile = [&](int i) {
        const Range range = seen(run, op, b, position + (r + i) / group);
        return Range{range.start - t, range.stop - t};
      };
      const auto bent = [&](F score) { return bend(op, score); };
      const auto pass = [&](auto count) {
        constexpr int together = decltype(count)::value;
        for (; r + together <= rows; r += together)
          room.keys.template pass<together>(room.queries + r * Keys::numbers, room.states + r, room.out + r * D, in_tile,
                                            bent);
      };
      pass(std::integral_constant<int, Keys::rows_of_block>());
      pass(std::integral_constant<int, 1>());
    }
    for (int r = 0; r < rows; r++) {
      float* to = numbers_of(op.out, r);
      const typename Keys::State& state = room.states[r];
      const F inverse = all(normalizer(run, op, head * group + r % group, state.peak, sum(state.total), Keys::unit));
      for (int v = 0; v < vectors; v++) store(to + v * kLanes, load(room.out + r * D + v * kLanes) * inverse);
    }
  }
};

}  // namespace llmc
