// Memory of one thread for the passes of a block.
#pragma once

#include <cstdint>
#include <vector>

namespace upstep::UPSTEP_CAPABILITY {

// memory of a thread, cut in pieces aligned to a vector
struct Scratch {
  std::vector<float> memory;
  int64_t used = 0;

  explicit Scratch(int64_t size) : memory(size + 64) {
    used = (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / sizeof(float);
  }
  float* take(int64_t size) {
    float* piece = memory.data() + used;
    used += size + (16 - size % 16) % 16;
    return piece;
  }
};

}  // namespace upstep::UPSTEP_CAPABILITY
