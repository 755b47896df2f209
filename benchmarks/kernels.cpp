// Kernels alone on one core, for kernels.py: the shapes of SmolLM2-135M over weights and rows of noise.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention_prefill.h"
#include "matmul.h"

using namespace llmc;

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class Work>
double microseconds(int repeats, Work&& work) {
  double best = 1e30;
  for (int round = 0; round < 7; round++) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; i++) work();
    const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count() / repeats);
  }
  return best;
}

std::vector<float> noise(size_t count) {
  std::vector<float> made(count);
  for (float& x : made) x = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  return made;
}

/// `copies` matrices after each other, so that they come from memory where they are larger than every cache.
template <class M>
void product(const char* name, int32_t outputs, int copies, int64_t rows) {
  const size_t bytes = static_cast<size_t>(outputs / kLanes) * M::group_bytes;
  std::unique_ptr<uint8_t, Free> weights(static_cast<uint8_t*>(std::aligned_alloc(64, bytes * copies)));
  for (size_t i = 0; i < bytes * copies; i++) weights.get()[i] = static_cast<uint8_t>(std::rand());
  std::vector<float> memory = noise(rows * (M::K + M::Q::width + outputs) + kLanes);
  std::vector<uint8_t> room(M::scratch + 64);
  Scratch scratch{room.data(), M::scratch};
  void* tensors[1];
  const Shape shapes[1]{};
  const Run run{nullptr, tensors, shapes, memory.data(), nullptr, 1, rows, rows, 1};
  Op quantize{};
  quantize.a = {0, M::K, 0};
  quantize.out = {M::K, M::Q::width, 0};
  for (int64_t row = 0; row < rows; row++) quantize_row<M::K, M::B, M::Parts, M::Q::width>(run, quantize, row);
  Op op{};
  op.a = quantize.out;
  op.out = {M::K + M::Q::width, outputs, 0};
  op.n = outputs;
  const double taken = microseconds(rows > 64 ? 1 : 4, [&] {
                         for (int copy = 0; copy < copies; copy++) {
                           tensors[0] = weights.get() + copy * bytes;
                           for (uint32_t i = 0; i < M::chunks(run, op); i++) M::chunk(run, op, i, scratch);
                         }
                       }) / copies;
  std::printf("%s, %3d rows: %8.2f us, %5.1f GB/s of packed weights, %6.1f GOP/s\n", name, static_cast<int>(rows),
              taken, bytes / taken * 1e-3, 2e-3 * M::K * outputs * rows / taken);
}

void quantized_row() {
  using M = Matmul<576, 32, 4, Zero::kCode>;
  std::vector<float> memory = noise(M::K + M::Q::width);
  const Run run{nullptr, nullptr, nullptr, memory.data(), nullptr, 1, 1, 1, 1};
  Op op{};
  op.a = {0, M::K, 0};
  op.out = {M::K, M::Q::width, 0};
  std::printf("a row of 576 quantized: %.3f us\n", microseconds(100000, [&] { quantize_row<M::K, M::B, M::Parts, M::Q::width>(run, op, 0); }));
}

struct All {
  int64_t start = 0, stop = kKeysOfTile;
};

/// 96 queries over one tile of 64 keys and values of 64 numbers.
void attention() {
  using T = Tile<FloatRows<64>, 64>;
  constexpr int queries = 96, together = T::rows_of_block;
  auto tile = std::make_unique<T>();
  std::vector<typename T::State> states(queries);
  std::vector<int32_t> codes(queries * T::pairs);
  const std::vector<float> keys = noise(64 * 64), values = noise(64 * 64), query = noise(queries * 64);
  std::vector<float> out(queries * 64 + kLanes);
  for (int r = 0; r < queries; r++)
    states[r] = {F{}, T::encode(query.data() + r * 64, codes.data() + r * T::pairs), -3e38f};
  const auto* k = reinterpret_cast<const uint8_t*>(keys.data());
  const auto* v = reinterpret_cast<const uint8_t*>(values.data());
  std::printf("a tile of keys and values packed: %.3f us\n", microseconds(2000, [&] { tile->take(k, v, 64); }));
  const double taken = microseconds(2000, [&] {
    for (int r = 0; r < queries; r += together)
      tile->pass<together>(codes.data() + r * T::pairs, states.data() + r, out.data() + r * 64,
                           [](int) { return All{}; }, [](F score) { return score; });
  });
  std::printf("96 queries over it: %.3f us, %.0f GOP/s\n", taken, 4e-3 * queries * 64 * 64 / taken);
}

}  // namespace

int main() {
  for (int rows : {1, 4, 8, 16, 32, 256})
    product<Matmul<576, 32, 4, Zero::kCode>>("576 x 3072, block 32", 3072, rows > 64 ? 2 : 60, rows);
  for (int rows : {1, 256}) product<Matmul<1536, 64, 4, Zero::kCode>>("1536 x 576, block 64", 576, rows > 64 ? 4 : 150, rows);
  for (int rows : {1, 256}) {
    product<Matmul<576, 32, 4, Zero::kMinimum>>("576 x 3072, block 32, minima", 3072, rows > 64 ? 2 : 60, rows);
    product<Matmul<576, 32, 4, Zero::kMinimum, 2>>("the same, 16-bit activations", 3072, rows > 64 ? 2 : 60, rows);
  }
  quantized_row();
  attention();
}
