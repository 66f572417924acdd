// A word in host memory, in which a kernel reports one decision a step to the host. No torch, no CUDA, no Python here:
// the memory is the caller's (pinned where a GPU writes it).
#pragma once

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>

#include "gate.h"

namespace upstep {

struct Decision {
  int64_t sequence;
  bool is_finite, is_open;
};

class GateFlag {
 public:
  explicit GateFlag(int64_t* word) : word_(word) {}

  Decision latest() const {
    const int64_t word = __atomic_load_n(word_, __ATOMIC_ACQUIRE);
    return {word >> 2, (word & 2) != 0, (word & 1) != 0};
  }

  void publish(int64_t sequence, bool is_finite, bool is_open) {
    __atomic_store_n(word_, flag_word(sequence, is_finite, is_open), __ATOMIC_RELEASE);
  }

  // True once decision `sequence` is there; false when `patience` has passed. A decision takes some 10 us: spin first,
  // then yield the core, then sleep.
  bool wait(int64_t sequence, std::chrono::nanoseconds patience) const {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    for (;;) {
      for (int i = 0; i < 64; ++i)
        if (latest().sequence >= sequence) return true;
      const auto waited = Clock::now() - start;
      if (waited >= patience) return false;
      if (waited > std::chrono::milliseconds(2)) std::this_thread::sleep_for(std::chrono::microseconds(50));
      else if (waited > std::chrono::microseconds(200)) std::this_thread::yield();
    }
  }

 private:
  int64_t* word_;
};

}  // namespace upstep
