// How fast threads read memory, for memory_bound.py: every cache line of a buffer, once a pass, each thread its part.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

typedef uint64_t Line __attribute__((vector_size(64), may_alias));

/// The exclusive or of a part, `passes` times; memory is asked for 8 KB ahead, as the kernels do.
uint64_t read(const char* from, size_t bytes, int passes) {
  Line total{};
  for (int pass = 0; pass < passes; pass++) {
    for (size_t i = 0; i + 256 <= bytes; i += 256) {
      for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(from + i + 8192 + line);
      for (size_t line = 0; line < 256; line += 64) total ^= *reinterpret_cast<const Line*>(from + i + line);
    }
  }
  return total[0] ^ total[1] ^ total[2] ^ total[3] ^ total[4] ^ total[5] ^ total[6] ^ total[7];
}

}  // namespace

/// Seconds of one pass over `bytes` (aligned to 64), by `threads` threads.
extern "C" __attribute__((visibility("default"))) double seconds_of_pass(const char* data, size_t bytes, int threads,
                                                                         int passes) {
  std::vector<uint64_t> kept(threads);
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> crew;
  for (int t = 0; t < threads; t++)
    crew.emplace_back([&, t] {
      const size_t part = bytes / threads / 64 * 64;
      kept[t] = read(data + t * part, part, passes);
    });
  for (auto& one : crew) one.join();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  volatile uint64_t sink = kept[0];
  (void)sink;
  return taken.count() / passes;
}
