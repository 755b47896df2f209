// Linear attention (Katharopoulos et al. 2020) with a decay (Sun et al. 2023; Dao and Gu 2024; by key channel: Yang et
// al. 2024a) and the delta rule (Schlag et al. 2021; Yang et al. 2024b). The state of a head is S (keys, values):
//   S = exp(decay) S;  u = Delta ? beta (v - k^T S) : v;  S += k u^T;  out = scale q^T S
// Its columns do not depend on each other, so a chunk takes some of them through all tokens of the piece, and they stay
// in the first cache. A token takes one pass over the state: the pass that brings the last token into the state also
// multiplies it by this token's key and query, since q^T S is q^T exp(decay) S before the token plus (q^T k) u^T.
#pragma once
#include "state.h"

namespace llmc {

/// KeyHeads: number of heads of queries and keys, each for Heads / KeyHeads neighbouring heads of the state.
/// K, V: widths of keys and values. ByChannel: whether each key channel has its own decay.
template <int Heads, int KeyHeads, int K, int V, bool Delta, bool ByChannel>
struct LinearAttention {
  static_assert(Heads % KeyHeads == 0, "whole groups of heads");
  static constexpr int vectors = kVectorRegisters >= 32 ? 4 : 2;  // of the state's columns
  static constexpr int block = vectors * kLanes;
  static constexpr int blocks = (V + block - 1) / block;
  static constexpr int padded = (K + kLanes - 1) / kLanes * kLanes;

  /// A token of one head. Scaled by `decay`: what is multiplied by the state before the token.
  struct alignas(64) Token {
    float decay[padded], key[padded], scaled_key[padded], scaled_query[padded];
    float match;  // of query and key
    float beta;
  };
  static constexpr size_t scratch = 2 * sizeof(Token);

  static const char* check(const Run& run, const Op& op) { return check_state<Heads, K, V>(run, op); }

  static uint32_t chunks(const Run& run, const Op&) { return static_cast<uint32_t>(run.batch * Heads * blocks); }

  /// Prefetch the first rows of a chunk's state.
  static void ahead(const Run& run, const Op& op, uint32_t index) {
    const float* state = state_before(run, op) + static_cast<int64_t>(index) / blocks * K * V;
    constexpr int lines = K * V / kLanes < 256 ? K * V / kLanes : 256;
    for (int i = 0; i < lines; i++) __builtin_prefetch(state + i * kLanes);
  }

  static void chunk(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t b = index / blocks / Heads;
    const int head = static_cast<int>(index / blocks % Heads), column = static_cast<int>(index % blocks) * block;
    const int64_t at = (b * Heads + head) * K * V + column;
    const int64_t* mask = mask_of(run, op, b);
    const float* from = state_before(run, op) + at;
    float* const to = state_after(run, op) + at;
    Token* tokens = reinterpret_cast<Token*>(scratch.bytes);
    const int width = V - column < block ? V - column : block;
    const auto work = [&](auto columns) {
      F update[vectors];
      int next = 0;        // of the two tokens, the one to fill
      bool held = false;  // whether the other is not in the state yet
      for (int64_t i = 0; i < run.sequence; i++) {
        const int64_t row = b * run.sequence + i;
        float* out = run.at(op.out, row) + head * V + column;
        if (mask[i] == 0) {
          columns.each([&](int v) { columns.put(out, v, F{}); });
          continue;
        }
        Token& token = tokens[next];
        read(run, op, row, head, token);
        F by_key[vectors] = {}, by_query[vectors] = {};
        if (held) {
          pass<true, true>(columns, tokens[1 - next], token, from, to, update, by_key, by_query);
          from = to;
        } else {
          pass<false, true>(columns, token, token, from, to, update, by_key, by_query);
        }
        const float* value = run.at(op.c, row) + head * V + column;
        columns.each([&](int v) {
          const F x = columns.get(value, v);
          update[v] = Delta ? all(token.beta) * (x - by_key[v]) : x;
          columns.put(out, v, by_query[v] + all(token.match) * update[v]);
        });
        held = true;
        next = 1 - next;
      }
      F unused[vectors];
      if (held) {
        pass<true, false>(columns, tokens[1 - next], tokens[1 - next], from, to, update, unused, unused);
      } else if (from != to) {
        for (int k = 0; k < K; k++) std::memcpy(to + k * V, from + k * V, sizeof(float) * width);
      }
    };
    if (width == block) {
      work(Whole{});
    } else {
      work(Part{width});
    }
  }

 private:
  /// The columns of a chunk: as many as fit, or fewer at the end of a row.
  struct Whole {
    template <class Use>
    void each(Use&& use) const {
      for (int v = 0; v < vectors; v++) use(v);
    }
    F get(const float* p, int v) const { return load(p + v * kLanes); }
    void put(float* p, int v, F x) const { store(p + v * kLanes, x); }
  };
  struct Part {
    int width;
    template <class Use>
    void each(Use&& use) const {
      for (int v = 0; v < vectors; v++)
        if (v * kLanes < width) use(v);
    }
    int left(int v) const { return width - v * kLanes; }
    F get(const float* p, int v) const {
      return left(v) >= kLanes ? load(p + v * kLanes) : load_first(p + v * kLanes, left(v));
    }
    void put(float* p, int v, F x) const {
      if (left(v) >= kLanes) {
        store(p + v * kLanes, x);
      } else {
        store_first(p + v * kLanes, x, left(v));
      }
    }
  };

  /// Read a token's key, query and decay. Numbers beyond K are zeros.
  static void read(const Run& run, const Op& op, int64_t row, int head, Token& token) {
    const float* query = run.at(op.a, row) + head / (Heads / KeyHeads) * K;
    const float* key = run.at(op.b, row) + head / (Heads / KeyHeads) * K;
    const float* decay = run.at(op.d, row) + head * (ByChannel ? K : 1);
    const F shared = ByChannel ? F{} : exp(all(decay[0]));
    F match = F{};
    for (int i = 0; i < K; i += kLanes) {
      const auto numbers = [&](const float* p) { return K - i >= kLanes ? load(p + i) : load_first(p + i, K - i); };
      const F k = numbers(key), q = numbers(query) * all(op.x);
      const F shrink = ByChannel ? exp(numbers(decay)) : shared;
      match += q * k;
      store(token.decay + i, shrink);
      store(token.key + i, k);
      store(token.scaled_key + i, k * shrink);
      store(token.scaled_query + i, q * shrink);
    }
    token.match = sum(match);
    token.beta = Delta ? run.at(op.e, row)[head] : 1.0f;
  }

  /// Go through the state once. Write: bring token `last` with `update` into it. Read: multiply it by token `now`.
  template <bool Write, bool Read, class Columns>
  static void pass(const Columns& columns, const Token& last, const Token& now, const float* from, float* to,
                   const F* update, F* by_key, F* by_query) {
    F u[vectors], keys[vectors], queries[vectors];
    columns.each([&](int v) {
      u[v] = Write ? update[v] : F{};
      keys[v] = queries[v] = F{};
    });
    for (int k = 0; k < K; k++, from += V, to += V) {
      columns.each([&](int v) {
        F s = columns.get(from, v);
        if constexpr (Write) {
          s = all(last.decay[k]) * s + all(last.key[k]) * u[v];
          columns.put(to, v, s);
        }
        if constexpr (Read) {
          if constexpr (Delta) keys[v] += all(now.scaled_key[k]) * s;
          queries[v] += all(now.scaled_query[k]) * s;
        }
      });
    }
    if constexpr (Read) {
      columns.each([&](int v) {
        by_key[v] = keys[v];
        by_query[v] = queries[v];
      });
    }
  }
};

/// The same for values of width 1 (Gu and Dao 2023): the lanes are key channels, and a chunk takes 16 heads.
template <int Heads, int KeyHeads, int K, bool Delta, bool ByChannel>
struct NarrowAttention {
  static_assert(Heads % KeyHeads == 0, "whole groups of heads");
  static constexpr int blocks = (Heads + kLanes - 1) / kLanes;
  static constexpr int vectors = (K + kLanes - 1) / kLanes;

  struct alignas(64) Room {
    F states[kLanes][vectors];
  };
  static constexpr size_t scratch = sizeof(Room);

  static const char* check(const Run& run, const Op& op) { return check_state<Heads, K, 1>(run, op); }

  static uint32_t chunks(const Run& run, const Op&) { return static_cast<uint32_t>(run.batch * blocks); }

  static void chunk(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t b = index / blocks;
    const int first = static_cast<int>(index % blocks) * kLanes;
    const int count = Heads - first < kLanes ? Heads - first : kLanes;
    const int64_t* mask = mask_of(run, op, b);
    Room& room = *reinterpret_cast<Room*>(scratch.bytes);
    const int64_t at = (b * Heads + first) * K;
    for (int h = 0; h < count; h++)
      for (int v = 0; v < vectors; v++) room.states[h][v] = numbers(state_before(run, op) + at + h * K, v);
    for (int64_t i = 0; i < run.sequence; i++) {
      const int64_t row = b * run.sequence + i;
      F products[kLanes] = {};
      for (int h = 0; h < count && mask[i] != 0; h++) products[h] = step(run, op, row, first + h, room.states[h]);
      store_first(run.at(op.out, row) + first, fold(products, [](F p, F q) { return p + q; }) * all(op.x), count);
    }
    float* to = state_after(run, op) + at;
    for (int h = 0; h < count; h++)
      for (int v = 0; v < vectors; v++)
        store_first(to + h * K + v * kLanes, room.states[h][v], K - v * kLanes < kLanes ? K - v * kLanes : kLanes);
  }

 private:
  static F numbers(const float* p, int v) {
    return K - v * kLanes >= kLanes ? load(p + v * kLanes) : load_first(p + v * kLanes, K - v * kLanes);
  }

  /// Bring a token into the state of a head; lanes whose sum is the output.
  static F step(const Run& run, const Op& op, int64_t row, int head, F* state) {
    const float* query = run.at(op.a, row) + head / (Heads / KeyHeads) * K;
    const float* key = run.at(op.b, row) + head / (Heads / KeyHeads) * K;
    const float* decay = run.at(op.d, row) + head * (ByChannel ? K : 1);
    F match = F{};
    for (int v = 0; v < vectors; v++) {
      state[v] *= exp(ByChannel ? numbers(decay, v) : all(decay[0]));
      if constexpr (Delta) match += numbers(key, v) * state[v];
    }
    float update = run.at(op.c, row)[head];
    if constexpr (Delta) update = run.at(op.e, row)[head] * (update - sum(match));
    F product = F{};
    for (int v = 0; v < vectors; v++) {
      state[v] += numbers(key, v) * all(update);
      product += numbers(query, v) * state[v];
    }
    return product;
  }
};

}  // namespace llmc
