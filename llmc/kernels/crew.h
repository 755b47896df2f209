// Threads that work through the phases of a step together.
//
// Every thread calls the same phases in the same order. The chunks of a phase are claimed one by one, so a thread
// that comes late, or is descheduled between two chunks, holds nobody up; one thread alone gets through as well,
// which makes the crew safe on a thread pool that promises no concurrency. Whoever finishes the last chunk runs the
// phase's serial tail and opens the next phase. What a chunk computes does not depend on who claims it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace llmc {

class Crew {
 public:
  /// Work through phase `index`, which counts from 0 without gaps, as long as it has chunks to claim.
  template <class Work, class Tail>
  void phase(uint32_t index, uint32_t chunks, Work&& work, Tail&& tail) {
    uint64_t seen = claims_.load(std::memory_order_acquire);
    for (unsigned turns = 0; (seen >> 32) < index; seen = claims_.load(std::memory_order_acquire)) rest(++turns);
    while ((seen >> 32) == index && static_cast<uint32_t>(seen) < chunks) {
      if (!claims_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      work(static_cast<uint32_t>(seen));
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) {
        tail();
        done_.store(0, std::memory_order_relaxed);
        claims_.store(static_cast<uint64_t>(index + 1) << 32, std::memory_order_release);
      }
      seen = claims_.load(std::memory_order_acquire);
    }
  }

 private:
  /// Spin for some tens of microseconds, then let others run: there may be more threads than cores.
  static void rest(unsigned turns) {
    if (turns > 2000) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }

  alignas(64) std::atomic<uint64_t> claims_{0};  // phase in the high half, next chunk in the low one
  alignas(64) std::atomic<uint32_t> done_{0};
};

}  // namespace llmc
