// Keeps the memory of the last large gradient on the CPU for the next one.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <utility>

namespace vcrd::cpu {

// The pages of a fresh buffer cost more time than the arithmetic: the C library returns large blocks to the operating
// system at once, which then maps and clears every page again. At most one buffer is kept, and only after its gradient
// is freed.
class GradientMemory {
 public:
  static constexpr size_t kSmallest = size_t(4) << 20;  // below, the C library keeps the memory itself

  static GradientMemory& instance() {
    static auto* memory = new GradientMemory;  // never destroyed: a gradient may outlive static destruction
    return *memory;
  }

  // Null where there is no memory.
  void* take(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (kept_ && kept_bytes_ == bytes) return std::exchange(kept_, nullptr);
    }
    void* block = nullptr;
    return posix_memalign(&block, kAlignment, bytes) == 0 ? block : nullptr;
  }

  void keep(void* block, size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      std::swap(block, kept_);
      kept_bytes_ = bytes;
    }
    free(block);  // what was kept before
  }

 private:
  static constexpr size_t kAlignment = 4096;

  std::mutex mutex_;
  void* kept_ = nullptr;
  size_t kept_bytes_ = 0;
};

}  // namespace vcrd::cpu
