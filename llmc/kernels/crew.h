// Threads that work through the phases of a step together.
//
// Every thread calls the same phases in the same order. The chunks of a phase are divided into shares that are adjacent
// in memory; a thread claims chunks of its own share from the front, which suits hardware prefetching, and then helps
// with the other shares from their ends. A thread that comes late, or is descheduled between two chunks, therefore
// delays nobody, and one thread alone finishes as well, which makes the crew safe on a thread pool that promises no
// concurrency. The thread that finishes the last chunk runs the phase's serial tail and opens the next phase. The
// result of a chunk does not depend on which thread claims it.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace llmc {

class Crew {
 public:
  static constexpr uint32_t kMaxShares = 64;

  explicit Crew(uint32_t shares) : shares_(shares < 1 ? 1 : shares > kMaxShares ? kMaxShares : shares) {}

  uint32_t share_of(size_t thread) const { return static_cast<uint32_t>(thread % shares_); }
  /// The first chunk of a share.
  uint32_t first_of(uint32_t share, uint32_t chunks) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(chunks) * share / shares_);
  }

  /// Work through phase `index`, counted from 0 without gaps, as long as it has chunks to claim; it has at least one.
  /// `idle` is called when nothing is left to claim. Returns whether this thread claimed any chunk.
  template <class Work, class Idle, class Tail>
  bool phase(uint32_t index, uint32_t own, uint32_t chunks, Work&& work, Idle&& idle, Tail&& tail) {
    for (unsigned turns = 0; phase_of(claims_[own].word.load(std::memory_order_acquire)) < index;) rest(++turns);
    bool any = false;
    for (uint32_t i = 0; i < shares_; i++) {
      const uint32_t share = own + i < shares_ ? own + i : own + i - shares_;
      const uint32_t first = first_of(share, chunks), size = first_of(share + 1, chunks) - first;
      std::atomic<uint64_t>& claims = claims_[share].word;
      uint64_t seen = claims.load(std::memory_order_acquire);
      while (phase_of(seen) == index && front(seen) + back(seen) < size) {
        const uint64_t more = i == 0 ? uint64_t{1} << kBits : 1;
        if (!claims.compare_exchange_weak(seen, seen + more, std::memory_order_acq_rel, std::memory_order_acquire))
          continue;
        any = true;
        work(first + static_cast<uint32_t>(i == 0 ? front(seen) : size - 1 - back(seen)));
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) {
          tail();
          done_.store(0, std::memory_order_relaxed);
          for (uint32_t s = 0; s < shares_; s++)
            claims_[s].word.store(static_cast<uint64_t>(index + 1) << (2 * kBits), std::memory_order_release);
          return true;
        }
        seen = claims.load(std::memory_order_acquire);
      }
    }
    idle();
    return any;
  }

 private:
  /// A word holds the phase, then the claimed counts at the share's front and back, in kBits bits each.
  static constexpr int kBits = 24;
  static uint32_t phase_of(uint64_t word) { return static_cast<uint32_t>(word >> (2 * kBits)); }
  static uint64_t front(uint64_t word) { return word >> kBits & ((uint64_t{1} << kBits) - 1); }
  static uint64_t back(uint64_t word) { return word & ((uint64_t{1} << kBits) - 1); }

  /// Spin for some tens of microseconds, then yield: there may be more threads than cores.
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

  struct alignas(64) Claims {
    std::atomic<uint64_t> word{0};
  };
  Claims claims_[kMaxShares];
  alignas(64) std::atomic<uint32_t> done_{0};
  const uint32_t shares_;
};

}  // namespace llmc
