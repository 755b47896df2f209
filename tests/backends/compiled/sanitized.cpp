// Kernels over buffers of exactly their size, for AddressSanitizer and UndefinedBehaviorSanitizer; four threads for
// ThreadSanitizer. Prints the number of values that are not finite, and writes all values to the file that is named, so
// that those of two instruction sets can be held against each other (benchmarks/arm.py).
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "attention.h"
#include "convolution.h"
#include "crew.h"
#include "linear_attention.h"
#include "matmul.h"
#include "rows.h"

using namespace llmc;

namespace {

int broken = 0;
FILE* values = nullptr;

/// The same numbers with every C library: a linear congruential generator (Knuth, MMIX).
uint32_t draw() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

void note(const float* result, int64_t count) {
  for (int64_t i = 0; i < count; i++) broken += !std::isfinite(result[i]);
  if (values != nullptr) std::fwrite(result, sizeof(float), count, values);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
std::unique_ptr<T, Free> room(size_t count) {
  return std::unique_ptr<T, Free>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

float noise() { return (static_cast<float>(draw() % 2001) - 1000) * 1e-3f; }

/// Chunks of an operation by four threads, in three shares; each is to be claimed once.
void run_chunks(const Run& run, const Op& op, size_t scratch) {
  Crew crew(3);
  const uint32_t chunks = op.chunks(run, op);
  std::vector<std::atomic<uint32_t>> claimed(chunks);
  std::atomic<size_t> come{0};
  uint32_t phases = 0;  // that only the one serial tail at a time counts
  const auto work = [&] {
    auto memory = room<uint8_t>(scratch);
    Scratch mine{memory.get(), scratch};
    const uint32_t share = crew.share_of(come++);
    for (uint32_t phase = 0; phase < 3; phase++)
      crew.phase(
          phase, share, chunks,
          [&](uint32_t i) {
            claimed[i]++;
            op.chunk(run, op, i, mine);
          },
          [&] {
            if (op.ahead != nullptr) op.ahead(run, op, crew.first_of(share, chunks));
          },
          [&] { phases++; });
  };
  std::vector<std::thread> others;
  for (int i = 0; i < 3; i++) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
  broken += phases != 3;
  for (const auto& count : claimed) broken += count != 3;
}

template <class M>
void product(int64_t rows, int32_t outputs) {
  const int64_t groups = (outputs + 15) / 16;
  const int32_t stride = round_up(M::K, 16), wide = round_up(outputs, 16);
  auto weights = room<uint8_t>(groups * M::group_bytes);
  for (int64_t i = 0; i < groups * M::group_bytes; i++) weights.get()[i] = static_cast<uint8_t>(draw());
  for (int64_t g = 0; g < groups; g++) {
    auto* scales = reinterpret_cast<uint16_t*>(weights.get() + g * M::group_bytes + M::scales_at);
    for (int i = 0; i < M::blocks * 16; i++) scales[i] = 0x1c00;
    auto* minima = reinterpret_cast<uint16_t*>(weights.get() + g * M::group_bytes + M::zeros_at);
    for (int i = 0; M::Minimum && i < M::blocks * 16; i++) minima[i] = static_cast<uint16_t>(0xa800 + draw() % 1024);
  }
  auto memory = room<float>(rows * (stride + M::Q::width + wide));
  for (int64_t i = 0; i < rows * stride; i++) memory.get()[i] = noise();
  auto result = room<float>(rows * outputs);
  void* tensors[] = {weights.get(), result.get()};
  Shape shapes[2]{};
  const Run run{nullptr, tensors, shapes, memory.get(), nullptr, 1, rows, rows, 1};
  Op quantize{};
  quantize.a = {0, stride, 0};
  quantize.out = {stride, M::Q::width, 0};
  for (int64_t row = 0; row < rows; row++) quantize_row<M::K, M::B, M::Parts, M::Q::width>(run, quantize, row);
  Op op{};
  op.chunks = M::chunks;
  op.chunk = M::chunk;
  op.ahead = M::ahead;
  op.a = quantize.out;
  op.out = {~1, outputs, 0};
  op.n = outputs;
  run_chunks(run, op, M::scratch);
  note(result.get(), rows * outputs);
}

template <class A>
void attend(int64_t batch, int64_t sequence, int64_t past, int heads, int kv_heads, int width, int32_t window,
            bool sinks = false) {
  const int64_t slots = past + sequence, rows = batch * sequence;
  const int32_t all = heads * width, few = kv_heads * width;
  std::vector<std::vector<uint8_t>> caches;
  for (int i = 0; i < 2; i++) {
    const int64_t count = batch * slots * kv_heads;
    caches.emplace_back(count * A::Rows::bytes);
    for (int64_t k = 0; k < count; k++) {
      std::vector<float> numbers(width);
      for (float& number : numbers) number = noise();
      A::Rows::put(caches.back().data() + k * A::Rows::bytes, numbers.data());
    }
  }
  std::vector<int32_t> lengths(batch, static_cast<int32_t>(slots - 1));
  std::vector<float> tables(slots * width / 2, 0.5f), scores(heads, 1.0f);
  void* tensors[] = {caches[0].data(), caches[1].data(), lengths.data(), tables.data(), scores.data()};
  const Shape shape{{batch, kv_heads, slots, A::Rows::elements}, 4};
  const Shape shapes[] = {shape, shape, {}, {}, {}};
  auto memory = room<float>(rows * (3 * all + 2 * few));
  for (int64_t i = 0; i < rows * (3 * all + 2 * few); i++) memory.get()[i] = noise();
  Run run{nullptr, tensors, shapes, memory.get(), nullptr, batch, sequence, slots, 1};
  auto shared = room<uint8_t>(A::shared(run) + 64);
  run.shared = shared.get();
  Op op{};
  op.chunks = A::chunks;
  op.chunk = A::chunk;
  op.a = {0, all, 0};
  op.b = {2 * all, few, 0};
  op.c = {2 * all + few, few, 0};
  op.x = 0.25f;
  for (int i = 0; i < 4; i++) op.cache[i] = i % 2;
  op.lengths = 2;
  op.cos = op.sin = 3;
  op.limit = slots;
  op.window = window;
  if (sinks) op.sinks = 4;
  if (A::check(run, op) != nullptr) broken += 1000;
  lengths[0]++;
  if (A::check(run, op) == nullptr) broken += 1000;  // one token more than there are slots
  lengths[0]--;
  op.out = {all, all, 0};
  for (int64_t row = 0; row < rows; row++) A::append(run, op, row);
  op.a = op.out;
  op.out = {2 * all + 2 * few, all, 0};
  run_chunks(run, op, A::scratch);
  for (int64_t row = 0; row < rows; row++) A::combine(run, op, row);
  note(run.at(op.out, 0), rows * all);
}

template <class A>
void attend_all(int heads, int kv_heads, int width) {
  attend<A>(1, 1, 700, heads, kv_heads, width, 0);
  attend<A>(2, 70, 0, heads, kv_heads, width, 20);
  attend<A>(1, 9, 130, heads, kv_heads, width, 0, true);
  attend<A>(1, 1, 0, heads, kv_heads, width, 0, true);
}

/// A buffer of noise, of exactly `count` numbers.
std::vector<float> numbers(int64_t count, float size = 1) {
  std::vector<float> made(count);
  for (float& number : made) number = size * noise();
  return made;
}

/// The state of a step that `run_chunks` runs three times: `before` and after it, and a mask with padding on both sides.
struct State {
  State(int64_t batch, int64_t sequence, int64_t size)
      : before(numbers(batch * size)), after(batch * size), mask(batch * (sequence + 2), 1) {
    if (sequence > 3) mask[2] = mask[batch * (sequence + 2) - 1] = 0;
  }
  std::vector<float> before, after;
  std::vector<int64_t> mask;
};

template <int Channels, int Taps>
void convolve(int64_t batch, int64_t sequence) {
  const int64_t rows = batch * sequence;
  State state(batch, sequence, Channels * (Taps - 1));
  auto weights = numbers(Channels * Taps), bias = numbers(Channels), given = numbers(rows * Channels);
  std::vector<float> result(rows * Channels);
  void* tensors[] = {state.before.data(), state.mask.data(), given.data(), weights.data(), bias.data(),
                     state.after.data(), result.data()};
  Shape shapes[7]{};
  const Shape shape{{batch, Channels, Taps - 1, 1, 1, 1}, 3};
  shapes[0] = shapes[5] = shape;
  shapes[1] = {{batch, sequence + 2, 1, 1, 1, 1}, 2};
  const Run run{nullptr, tensors, shapes, nullptr, nullptr, batch, sequence, sequence + 2, 1};
  using Kernel = Convolution<Channels, Taps, true>;
  Op op{};
  op.chunks = Kernel::chunks;
  op.chunk = Kernel::chunk;
  op.a = {~2, Channels, 0};
  op.out = {~6, Channels, 0};
  op.weight = 3;
  op.bias = 4;
  op.cache[1] = 5;
  op.lengths = 1;
  if (Kernel::check(run, op) != nullptr) broken += 1000;
  run_chunks(run, op, Kernel::scratch);
  note(result.data(), rows * Channels);
  note(state.after.data(), batch * Channels * (Taps - 1));
}

/// A kernel K of linear attention with this geometry; N: features of a row of decays.
template <class K, int N>
void recur(int64_t batch, int64_t sequence, int heads, int key_heads, int keys, int values) {
  const int64_t rows = batch * sequence;
  State state(batch, sequence, heads * keys * values);
  auto query = numbers(rows * key_heads * keys), key = numbers(rows * key_heads * keys, 0.1f);
  auto value = numbers(rows * heads * values), decay = numbers(rows * N), beta = numbers(rows * heads);
  for (float& number : decay) number = -std::fabs(number);
  std::vector<float> result(rows * heads * values);
  void* tensors[] = {state.before.data(), state.mask.data(), query.data(), key.data(), value.data(), decay.data(),
                     beta.data(), state.after.data(), result.data()};
  Shape shapes[9]{};
  shapes[0] = shapes[7] = {{batch, heads, keys, values, 1, 1}, 4};
  shapes[1] = {{batch, sequence + 2, 1, 1, 1, 1}, 2};
  const Run run{nullptr, tensors, shapes, nullptr, nullptr, batch, sequence, sequence + 2, 1};
  Op op{};
  op.chunks = K::chunks;
  op.chunk = K::chunk;
  op.a = {~2, key_heads * keys, 0};
  op.b = {~3, key_heads * keys, 0};
  op.c = {~4, heads * values, 0};
  op.d = {~5, N, 0};
  op.e = {~6, heads, 0};
  op.out = {~8, heads * values, 0};
  op.cache[1] = 7;
  op.lengths = 1;
  op.x = 0.25f;
  if (K::check(run, op) != nullptr) broken += 1000;
  run_chunks(run, op, K::scratch);
  note(result.data(), rows * heads * values);
  note(state.after.data(), batch * heads * keys * values);
}

}  // namespace

int main(int count, char** names) {
  if (count > 1) values = std::fopen(names[1], "wb");
  for (int64_t rows : {1, 7, 70}) {
    product<llmc::Matmul<80, 32, 4, Zero::kCode>>(rows, 40);
    product<llmc::Matmul<64, 64, 8, Zero::kMiddle>>(rows, 17);
    product<llmc::Matmul<144, 128, 8, Zero::kMiddle>>(rows, 17);
    product<llmc::Matmul<144, 128, 4, Zero::kCode>>(rows, 17);
    product<llmc::Matmul<80, 32, 4, Zero::kMinimum>>(rows, 40);
    product<llmc::Matmul<48, 16, 8, Zero::kMinimum>>(rows, 17);
    product<llmc::Matmul<80, 32, 4, Zero::kCode, 2>>(rows, 40);
    product<llmc::Matmul<144, 128, 8, Zero::kMiddle, 2>>(rows, 17);
  }
  attend_all<llmc::Attention<6, 2, 32, 32, false>>(6, 2, 32);
  attend_all<llmc::Attention<6, 2, 32, 32, false, llmc::HalfRows>>(6, 2, 32);
  attend_all<llmc::Attention<6, 2, 32, 32, false, llmc::ByteRows>>(6, 2, 32);
  attend_all<llmc::Attention<3, 1, 64, 64, false, llmc::ByteRows>>(3, 1, 64);
  for (int64_t sequence : {1, 7}) {
    convolve<20, 4>(2, sequence);
    convolve<300, 2>(1, sequence);
    recur<llmc::LinearAttention<4, 2, 20, 70, true, false>, 4>(2, sequence, 4, 2, 20, 70);
    recur<llmc::LinearAttention<2, 2, 16, 64, false, true>, 32>(1, sequence, 2, 2, 16, 64);
    recur<llmc::NarrowAttention<20, 1, 12, false, true>, 240>(2, sequence, 20, 1, 12, 1);
    recur<llmc::NarrowAttention<4, 4, 16, true, false>, 4>(1, sequence, 4, 4, 16, 1);
  }
  if (values != nullptr) std::fclose(values);
  std::printf("%d\n", broken);
}
