// Products with weights of 4 or 8 bits per block, and activations quantized to 8 or 16 bits per block.
//
// Weights are packed in groups of 16 outputs. A group holds the following parts; only the codes are certain to start at
// a multiple of 64 bytes from the group's start:
//   codes   for each block, registers of 64 bytes: lane n has inputs 4r .. 4r+3 of output n. With 4 bits, a register's
//           low nibbles are register 2q and its high nibbles register 2q+1 of the unpacked order.
//   scales  float16, blocks x 16 outputs
//   zeros   with Zero::kCode 4 bits, blocks x 16 outputs, the even output in the low half: value = (code - zero) * scale;
//           with Zero::kMinimum float16, blocks x 16 outputs: value = code * scale + minimum
// A group is padded to a multiple of 64 bytes. With Zero::kMiddle, the zero point is the middle code.
#pragma once
#include "program.h"
#include "simd.h"

namespace llmc {

/// The representation of zero in the blocks of a matrix (PackedZero of llmc/graph/model.py).
enum class Zero { kMiddle, kCode, kMinimum };

constexpr int round_up(int n, int m) { return (n + m - 1) / m * m; }

/// Activations of one row, K inputs in blocks of B: codes, then scales (float32), then the codes' sums (int32), then
/// the sums times their scales (float32). The sums add up what the codes represent, not the activations: the error of
/// a product is then the error of each activation times the weight, as without a minimum. With the exact sum it would
/// be the error times the weight above the minimum, which is larger.
/// With two parts, a code has 16 bits and is 256 times the first part's code plus the second part's code.
template <int K, int B, int Parts>
struct Quantized {
  static constexpr int blocks = (K + B - 1) / B;
  static constexpr int largest = Parts == 1 ? 127 : 127 * 256;                         // code
  static constexpr int scales_at = Parts * blocks * B / 4;                             // in floats
  static constexpr int width = round_up(scales_at + 3 * blocks, kLanes);

  static const int8_t* codes(const float* row, int part = 0) {
    return reinterpret_cast<const int8_t*>(row) + part * blocks * B;
  }
  static const float* scales(const float* row) { return row + scales_at; }
  static const int32_t* sums(const float* row) { return reinterpret_cast<const int32_t*>(row + scales_at + blocks); }
  static const float* totals(const float* row) { return row + scales_at + 2 * blocks; }
};

/// Quantize a row by block: code = nearest(x * largest / max|x|). With many rows, codes are stored with `kStoredAbove`
/// added. Width: number of floats that fit in the result.
template <int K, int B, int Parts, int Width>
void quantize_row(const Run& run, const Op& op, int64_t row) {
  using Q = Quantized<K, B, Parts>;
  static_assert(Width >= Q::width, "region.py gives too little room");
  const float* x = run.at(op.a, row);
  float* out = run.at(op.out, row);
  int8_t* codes = reinterpret_cast<int8_t*>(out);
  float* scales = out + Q::scales_at;
  int32_t* sums = reinterpret_cast<int32_t*>(scales + Q::blocks);
  float* products = scales + 2 * Q::blocks;
  const I flip = all(run.rows(op.space) >= kManyRows ? kStoredAbove : 0);
  for (int b = 0; b < Q::blocks; b += kLanes) {  // as many peaks and sums as a vector has lanes
    const int count = Q::blocks - b < kLanes ? Q::blocks - b : kLanes;
    const auto numbers = [&](int i, int v) {
      const int k = (b + i) * B + v * kLanes;
      return k < K ? load(x + k) : F{};
    };
    F tops[kLanes] = {};
    for (int i = 0; i < count; i++)
      for (int v = 0; v < B / kLanes; v++) tops[i] = max(tops[i], abs(numbers(i, v)));
    const F peaks = fold(tops, [](F p, F q) { return max(p, q); });
    const F most = all(static_cast<float>(Q::largest));
    const F inverse = peaks > all(1e-30f) ? most / peaks : F{};
    const F scale = peaks > all(1e-30f) ? peaks / most : F{};
    I totals[kLanes] = {};
    for (int i = 0; i < count; i++) {
      for (int v = 0; v < B / kLanes; v++) {
        const I code = nearest(numbers(i, v) * all(inverse[i]));
        totals[i] += code;
        int8_t* const to = codes + (b + i) * B + v * kLanes;
        if constexpr (Parts == 1) {
          store_bytes(to, code + flip);
        } else {
          const I first = (code + all(128)) >> 8;
          store_bytes(to, first + flip);
          store_bytes(to + Q::blocks * B, code - (first << 8) + flip);
        }
      }
    }
    const I sum = fold(totals, [](I p, I q) { return p + q; });
    std::memcpy(scales + b, &scale, sizeof(float) * count);
    std::memcpy(sums + b, &sum, sizeof(int32_t) * count);
    const F product = to_float(sum) * scale;
    std::memcpy(products + b, &product, sizeof(float) * count);
  }
}

/// Bytes between the weights that a product reads and the weights that it prefetches.
constexpr int kPrefetched = 12 << 10;

/// Parts: number of parts of the activations' codes.
template <int K_, int B_, int Bits_, Zero Zero_, int Parts_ = 1>
struct Matmul {
  static constexpr int K = K_, B = B_, Bits = Bits_, Parts = Parts_;
  static constexpr bool Codes = Zero_ == Zero::kCode, Minimum = Zero_ == Zero::kMinimum;
  using Q = Quantized<K, B, Parts>;
  static constexpr int blocks = Q::blocks;
  static constexpr int registers = B / 4;                    // unpacked registers of a block
  static constexpr int block_bytes = B * kLanes * Bits / 8;  // codes of a block
  static constexpr int scales_at = blocks * block_bytes;
  static constexpr int zeros_at = scales_at + blocks * 2 * kLanes;
  static constexpr int zeros_bytes = Minimum ? blocks * 2 * kLanes : Codes ? blocks * kLanes / 2 : 0;
  static constexpr int group_bytes = round_up(zeros_at + zeros_bytes, 64);

  /// Groups per chunk when there are few rows: large compared with the cost of a claim, small compared with a matrix.
  static constexpr int groups_of_chunk = group_bytes >= (48 << 10) ? 1 : (48 << 10) / group_bytes;
  /// Cache lines prefetched with each block: those of a group, including scales and zero points.
  static constexpr int lines_of_block = (group_bytes / 64 + blocks - 1) / blocks;
  static constexpr int64_t rows_of_tile = 256;
  static constexpr int strip_block = (registers + (Minimum ? 3 : 2)) * 64;
  static constexpr int strip_bytes = blocks * strip_block;
  static constexpr size_t scratch = 2 * static_cast<size_t>(strip_bytes);

  static F scales(const uint8_t* group, int b) {
    return load_half(reinterpret_cast<const uint16_t*>(group + scales_at) + b * kLanes);
  }
  static F minima(const uint8_t* group, int b) {
    return load_half(reinterpret_cast<const uint16_t*>(group + zeros_at) + b * kLanes);
  }

  static int64_t groups(const Op& op) { return (op.n + kLanes - 1) / kLanes; }

  static uint32_t chunks(const Run& run, const Op& op) {
    const int64_t rows = run.rows(op.space);
    if (rows < kManyRows) return static_cast<uint32_t>((groups(op) + groups_of_chunk - 1) / groups_of_chunk);
    return static_cast<uint32_t>((groups(op) + 1) / 2 * ((rows + rows_of_tile - 1) / rows_of_tile));
  }

  /// Prefetch the weights before the first line that the chunk itself prefetches.
  static void ahead(const Run& run, const Op& op, uint32_t index) {
    if (run.rows(op.space) >= kManyRows) return;
    const int64_t start = static_cast<int64_t>(index) * groups_of_chunk * group_bytes;
    const uint8_t* weights = run.tensor<const uint8_t>(op.weight) + start;
    for (int i = 0; i < kPrefetched; i += 64) __builtin_prefetch(weights + i);
  }

  static void chunk(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t rows = run.rows(op.space);
    if (rows >= kManyRows) return tile(run, op, index, scratch);
    const int64_t first = static_cast<int64_t>(index) * groups_of_chunk;
    const int64_t last = first + groups_of_chunk < groups(op) ? first + groups_of_chunk : groups(op);
    const uint8_t* weights = run.tensor<const uint8_t>(op.weight);
    for (int64_t g = first; g < last; g++) {
      const uint8_t* group = weights + g * group_bytes;
      int64_t row = 0;
      for (; row + 4 <= rows; row += 4) few<4>(run, op, group, g, row);
      for (; row + 2 <= rows; row += 2) few<2>(run, op, group, g, row);
      for (; row < rows; row++) few<1>(run, op, group, g, row);
    }
  }

  static void put(const Run& run, const Op& op, int64_t g, int64_t row, F value) {
    float* out = run.at(op.out, row) + g * kLanes;
    const int64_t left = op.n - g * kLanes;
    if (left >= kLanes || op.out.base >= 0) {
      store(out, value);
    } else {
      for (int64_t i = 0; i < left; i++) out[i] = value[i];
    }
  }

 private:
  /// Compute 16 outputs of `Rows` rows directly from the packed weights.
  template <int Rows>
  static void few(const Run& run, const Op& op, const uint8_t* group, int64_t g, int64_t row) {
    const float* a[Rows];
    F total[Rows];
    for (int r = 0; r < Rows; r++) {
      a[r] = run.at(op.a, row + r);
      total[r] = F{};
    }
    const uint8_t* codes = group;
    for (int b = 0; b < blocks; b++, codes += block_bytes) {
      for (int i = 0; i < lines_of_block; i++) __builtin_prefetch(group + kPrefetched + (b * lines_of_block + i) * 64);
      I low[Rows][Parts], high[Rows][Parts];
      const I zeros = Codes ? load_nibbles(group + zeros_at + b * (kLanes / 2)) : all(1 << (Bits - 1));
      for (int r = 0; r < Rows; r++) {
        for (int p = 0; p < Parts; p++) low[r][p] = high[r][p] = I{};
        if (!Minimum) low[r][Parts - 1] = -(zeros * all(Q::sums(a[r])[b]));
      }
      for (int j = 0; j < registers; j += 2) {
        I first, second;
        if constexpr (Bits == 4) {
          const I both = load_ints(codes + j * 32);
          first = both & all(0x0f0f0f0f);
          second = (both >> 4) & all(0x0f0f0f0f);
        } else {
          first = load_ints(codes + j * 64);
          second = load_ints(codes + j * 64 + 64);
        }
        for (int r = 0; r < Rows; r++) {
          for (int p = 0; p < Parts; p++) {
            int32_t x[2];
            std::memcpy(x, Q::codes(a[r], p) + b * B + j * 4, 8);
            low[r][p] = dot<Bits>(low[r][p], first, all(x[0]));
            high[r][p] = dot<Bits>(high[r][p], second, all(x[1]));
          }
        }
      }
      const F scale = scales(group, b);
      for (int r = 0; r < Rows; r++) {
        I sum = low[r][0] + high[r][0];
        if constexpr (Parts == 2) sum = (sum << 8) + (low[r][1] + high[r][1]);
        total[r] += to_float(sum) * (scale * all(Q::scales(a[r])[b]));
      }
      if constexpr (Minimum) {
        const F minimum = minima(group, b);
        for (int r = 0; r < Rows; r++) total[r] += minimum * all(Q::totals(a[r])[b]);
      }
    }
    for (int r = 0; r < Rows; r++) put(run, op, g, row + r, total[r]);
  }

  /// Compute up to 32 outputs of up to `rows_of_tile` rows.
  static void tile(const Run& run, const Op& op, uint32_t index, Scratch& scratch) {
    const int64_t pairs = (groups(op) + 1) / 2, rows = run.rows(op.space);
    const int64_t start = index / pairs * rows_of_tile, g = index % pairs * 2;
    const int64_t stop = start + rows_of_tile < rows ? start + rows_of_tile : rows;
    const uint8_t* weights = run.tensor<const uint8_t>(op.weight);
    const bool two = g + 1 < groups(op);
    uint8_t* strips[2] = {scratch.bytes, scratch.bytes + strip_bytes};
    unpack(weights + g * group_bytes, strips[0]);
    if (two) unpack(weights + (g + 1) * group_bytes, strips[1]);
    int64_t row = start;
    if (two) {
      for (; row + 6 <= stop; row += 6) many<2, 6>(run, op, strips, g, row);
      for (; row + 2 <= stop; row += 2) many<2, 2>(run, op, strips, g, row);
      for (; row < stop; row++) many<2, 1>(run, op, strips, g, row);
    } else {
      for (; row + 8 <= stop; row += 8) many<1, 8>(run, op, strips, g, row);
      for (; row < stop; row++) many<1, 1>(run, op, strips, g, row);
    }
  }

  /// Unpack a group into signed bytes minus their zero points: for each block its registers, then the initial value of
  /// the accumulator, -`kStoredAbove` times the sum of the block's weights; then scales; then minima, which include the
  /// offset that makes 8-bit codes signed.
  static void unpack(const uint8_t* group, uint8_t* strip) {
    for (int b = 0; b < blocks; b++, strip += strip_block) {
      const uint8_t* codes = group + b * block_bytes;
      constexpr int32_t middle = Minimum && Bits == 4 ? 0 : 1 << (Bits - 1);
      I zero = Codes ? load_nibbles(group + zeros_at + b * (kLanes / 2)) : all(middle);
      zero = zero | (zero << 8);
      zero = zero | (zero << 16);
      typedef uint8_t Bytes __attribute__((vector_size(64)));  // differences wrap around
      I start = I{};
      for (int j = 0; j < registers; j++) {
        I code;
        if constexpr (Bits == 4) {
          code = load_ints(codes + j / 2 * 64);
          code = (j % 2 ? code >> 4 : code) & all(0x0f0f0f0f);
        } else {
          code = load_ints(codes + j * 64);
        }
        const I weight = (I)((Bytes)code - (Bytes)zero);
        store_ints(strip + j * 64, weight);
        if constexpr (kStoredAbove > 0)
          start = dot<8>(start, all(static_cast<int32_t>(kStoredAbove * 0x01010101u)), weight);
      }
      store_ints(strip + registers * 64, -start);
      float* floats = reinterpret_cast<float*>(strip + registers * 64 + 64);
      store(floats, scales(group, b));
      if constexpr (Minimum)
        store(floats + kLanes, minima(group, b) + scales(group, b) * all(static_cast<float>(middle)));
    }
  }

  template <int Groups, int Rows>
  static void many(const Run& run, const Op& op, uint8_t* const* strips, int64_t g, int64_t row) {
    const float* a[Rows];
    F total[Groups][Rows];
    for (int r = 0; r < Rows; r++) {
      a[r] = run.at(op.a, row + r);
      for (int s = 0; s < Groups; s++) total[s][r] = F{};
    }
    for (int b = 0; b < blocks; b++) {
      const int at = b * strip_block;
      I c[Groups][Rows];
      for (int p = 0; p < Parts; p++) {
        for (int s = 0; s < Groups; s++) {
          const I start = load_ints(strips[s] + at + registers * 64);
          for (int r = 0; r < Rows; r++) c[s][r] = p == 0 ? start : (c[s][r] << 8) + start;
        }
        for (int j = 0; j < registers; j++) {
          I w[Groups];
          for (int s = 0; s < Groups; s++) w[s] = load_ints(strips[s] + at + j * 64);
          for (int r = 0; r < Rows; r++) {
            int32_t x;
            std::memcpy(&x, Q::codes(a[r], p) + b * B + j * 4, 4);
            const I wide = all(x);
            for (int s = 0; s < Groups; s++) c[s][r] = dot_stored < Bits == 4 ? 5 : 8 > (c[s][r], wide, w[s]);
          }
        }
      }
      for (int s = 0; s < Groups; s++) {
        const float* floats = reinterpret_cast<const float*>(strips[s] + at + registers * 64 + 64);
        const F scale = load(floats);
        for (int r = 0; r < Rows; r++) total[s][r] += to_float(c[s][r]) * (scale * all(Q::scales(a[r])[b]));
        if constexpr (Minimum) {
          const F minimum = load(floats + kLanes);
          for (int r = 0; r < Rows; r++) total[s][r] += minimum * all(Q::totals(a[r])[b]);
        }
      }
    }
    for (int s = 0; s < Groups; s++)
      for (int r = 0; r < Rows; r++) put(run, op, g + s, row + r, total[s][r]);
  }
};

inline const char* check_ids(const Run& run, const Op& op) {
  const int64_t* ids = run.tensor<const int64_t>(op.lengths);
  for (int64_t i = 0; i < run.rows(op.space); i++)
    if (ids[i] < 0 || ids[i] >= op.limit) return "a token id is outside of the vocabulary";
  return nullptr;
}

/// Read rows of an embedding that is packed like a product's weights. Ids are checked before the region runs.
template <class M>
void embed_row(const Run& run, const Op& op, int64_t row) {
  const int64_t id = run.tensor<const int64_t>(op.lengths)[row];
  const uint8_t* group = run.tensor<const uint8_t>(op.weight) + id / kLanes * M::group_bytes;
  const int lane = static_cast<int>(id % kLanes);
  float* out = run.at(op.out, row);
  for (int b = 0; b < M::blocks; b++) {
    const F scales = M::scales(group, b), minima = M::Minimum ? M::minima(group, b) : F{};
    const float scale = scales[lane], minimum = minima[lane];
    int zero = M::Minimum ? 0 : 1 << (M::Bits - 1);
    if (M::Codes) {
      const uint8_t pair = group[M::zeros_at + b * (kLanes / 2) + lane / 2];
      zero = lane % 2 ? pair >> 4 : pair & 15;
    }
    const uint8_t* codes = group + b * M::block_bytes;
    for (int i = 0; i < M::B && b * M::B + i < M::K; i++) {
      const int r = i / 4, byte = lane * 4 + i % 4;
      const int code = M::Bits == 8 ? codes[r * 64 + byte] : (codes[r / 2 * 64 + byte] >> (r % 2 * 4)) & 15;
      out[b * M::B + i] = static_cast<float>(code - zero) * scale + minimum;
    }
  }
}

}  // namespace llmc
