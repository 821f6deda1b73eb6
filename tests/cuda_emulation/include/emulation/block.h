// Runs the blocks of a launch one after the other, in an order that no kernel may rely on, each thread a fiber.
//
// A thread runs until it must wait, so within every stretch between two barriers it runs ahead of the others as far as
// it possibly can, and in an order drawn anew: results that need a barrier which is not there come out wrong.
// Whoever waits for ever, or for the wrong ones, is a fault with a sentence; the launch ends and returns an error.
#pragma once

#include <cstdarg>
#include <cstring>
#include <mutex>
#include <string>

#include "fiber.h"
#include "vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace vcrd_emulation {

constexpr unsigned kLanes = 32, kMostThreads = 1024;

// All __shared__ variables lie in one section, whose ends the linker names.
extern "C" {
extern char __start_vcrd_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_vcrd_shared[] __attribute__((weak, visibility("hidden")));
}

// Where in the kernel's source.
struct Site {
  const char* file;
  int line;
  VCRD_UNWATCHED bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};

struct Lane;
// What `lane` gets out of a warp operation, once all lanes of `mask` have brought their values.
using Combine = uint64_t (*)(const Lane* lanes, uint32_t mask, unsigned lane);

struct Lane {
  enum State : uint8_t { kRuns, kAtBarrier, kInWarp, kLeft };
  Fiber fiber;
  uint3 index;
  unsigned warp, lane;
  State state;
  // What it waits for, and what it brings.
  const char* operation;
  Site site;
  uint32_t mask;
  Combine combine;
  uint64_t value;
  int source;  // the lane that a shuffle reads
  uint64_t result;
};

class Machine {
 public:
  // The one machine, since shared memory is one: launches of several OS threads follow each other.
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  // Runs body() on every thread of the grid. Returns an empty string, or the sentence about what went wrong.
  std::string launch(dim3 grid, dim3 block, void (*body)(void*), void* argument) {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = body, argument_ = argument, gridDim = grid, blockDim = block;
    threads_ = block.x * block.y * block.z, warps_ = (threads_ + kLanes - 1) / kLanes;
    const char* seed = std::getenv("VCRD_EMULATION_SEED");
    seed_ = (seed ? std::strtoull(seed, nullptr, 10) : 0) + ++launches_;
    random_ = seed_ * 0x9e3779b97f4a7c15u + 1;
    fault_.clear();
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    uint64_t step = random() % blocks | 1, position = random() % blocks;
    while (greatest_common_divisor(step, blocks) != 1) step += 2;
    for (uint64_t i = 0; i < blocks && fault_.empty(); ++i, position = (position + step) % blocks) {
      blockIdx = {unsigned(position % grid.x), unsigned(position / grid.x % grid.y),
                  unsigned(position / grid.x / grid.y)};
      run_block();
    }
    return fault_;
  }

  VCRD_UNWATCHED void barrier(Site site) {
    Lane& self = *current_;
    self.state = Lane::kAtBarrier, self.operation = "__syncthreads", self.site = site;
    if (at_barrier_++ == 0) barrier_site_ = site;
    if (!(site == barrier_site_))
      fail("divergent barrier: threads of one block wait at different barriers, %s and %s", name(barrier_site_).c_str(),
           name(site).c_str());
    if (at_barrier_ == threads_) {
      at_barrier_ = 0;
      for (unsigned warp = 0; warp < warps_; ++warp) warp_[warp].ready = members(warp);
      shuffle_order();
    }
    wait();
  }

  // Meets the lanes of `mask` and returns what `combine` makes of all their values.
  VCRD_UNWATCHED uint64_t meet(const char* operation, uint32_t mask, uint64_t value, int source, Combine combine,
                               Site site) {
    Lane& self = *current_;
    Warp& warp = warp_[self.warp];
    self.state = Lane::kInWarp, self.operation = operation, self.site = site, self.mask = mask;
    self.combine = combine, self.value = value, self.source = source;
    const uint32_t bit = uint32_t(1) << self.lane;
    if (!(mask & bit))
      fail("%s at %s: lane %u calls it with mask 0x%08x, which leaves that lane out", operation, name(site).c_str(),
           self.lane, mask);
    if (uint32_t missing = mask & (warp.left | ~members(self.warp)))
      fail("%s at %s: mask 0x%08x names lanes that do not take part (0x%08x have left the kernel or never were)",
           operation, name(site).c_str(), mask, missing);
    warp.waiting |= bit;
    if ((warp.waiting & mask) == mask) complete(warp, self);
    wait();
    return self.result;
  }

  VCRD_UNWATCHED uint64_t random() {  // xorshift
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_;
  }

  VCRD_UNWATCHED unsigned lane() const { return current_->lane; }

  __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char where[200];
    snprintf(where, sizeof where, " [block (%u, %u, %u) of (%u, %u, %u), %u threads, VCRD_EMULATION_SEED %llu]",
             blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z, threads_,
             static_cast<unsigned long long>(seed_ - 1));
    fault_ = std::string("emulated CUDA: ") + text + where;
    // The faulting thread is never resumed; its frames are forgotten with those of the others.
    switch_fiber(current_->fiber, outside_, false);
  }

 private:
  struct Warp {
    uint32_t ready, waiting, left;  // a bit per lane
    unsigned rotation;              // where the search for the next lane starts
    bool descending;
  };

  Machine() : stacks_(kMostThreads) {}

  VCRD_UNWATCHED uint32_t members(unsigned warp) const {
    unsigned count = warp + 1 < warps_ ? kLanes : threads_ - warp * kLanes;
    return count == kLanes ? ~uint32_t(0) : (uint32_t(1) << count) - 1;
  }

  static std::string name(Site site) {
    const char* file = std::strrchr(site.file, '/');
    return std::string(file ? file + 1 : site.file) + ":" + std::to_string(site.line);
  }

  static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

  VCRD_UNWATCHED void shuffle_order() {
    uint64_t bits = random();
    warp_rotation_ = bits >> 8 & 31, warps_descend_ = bits >> 13 & 1;
    for (unsigned warp = 0; warp < warps_; ++warp) {
      bits = random();
      warp_[warp].rotation = bits >> 8 & 31, warp_[warp].descending = bits >> 13 & 1;
    }
  }

  void run_block() {
    // Shared memory starts with whatever was there: here NaN, or -1, so that nobody takes it for zero.
    fill_shared();
    for (unsigned i = 0; i < threads_; ++i) {
      Lane& lane = lanes_[i];
      lane.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      lane.warp = i / kLanes, lane.lane = i % kLanes, lane.state = Lane::kRuns;
      stacks_.prepare(lane.fiber, i, &Machine::thread, this);
    }
    for (unsigned warp = 0; warp < warps_; ++warp) warp_[warp] = {members(warp), 0, 0, 0, false};
    shuffle_order();
    at_barrier_ = left_ = 0;
    Lane* first = next();
    begin(*first);
    switch_fiber(outside_, first->fiber, false);
    if (!fault_.empty())
      for (unsigned i = 0; i < threads_; ++i) stacks_.forget(lanes_[i].fiber);
  }

  VCRD_UNWATCHED static void fill_shared() {
    // Word by word, since the library's memset would stumble over the redzones; the section is aligned to 32 bytes.
    auto* end = reinterpret_cast<volatile uint64_t*>(__stop_vcrd_shared);
    for (auto* word = reinterpret_cast<volatile uint64_t*>(__start_vcrd_shared); word < end; ++word)
      *word = ~uint64_t(0);
  }

  // The bottom frame of every thread.
  VCRD_UNWATCHED static void thread(void* self) {
    arrived(nullptr);
    auto* machine = static_cast<Machine*>(self);
    machine->body_(machine->argument_);
    machine->leave();
  }

  VCRD_UNWATCHED void leave() {
    Lane& self = *current_;
    self.state = Lane::kLeft;
    warp_[self.warp].left |= uint32_t(1) << self.lane;
    ++left_;
    Lane* following = next();
    if (!following) {
      if (left_ != threads_) deadlock();
      switch_fiber(self.fiber, outside_, true);
    }
    begin(*following);
    switch_fiber(self.fiber, following->fiber, true);
  }

  VCRD_UNWATCHED void wait() {
    Lane& self = *current_;
    Lane* following = next();
    if (!following) deadlock();
    begin(*following);
    if (following != &self) switch_fiber(self.fiber, following->fiber, false);
  }

  VCRD_UNWATCHED void begin(Lane& lane) {
    current_ = &lane, threadIdx = lane.index;
    lane.state = Lane::kRuns;
  }

  // Of the bits of `set`, the one that comes first from `rotation` on, upwards or downwards.
  VCRD_UNWATCHED static unsigned first_of(uint32_t set, unsigned rotation, bool descending) {
    const uint32_t turned = set >> rotation | set << ((kLanes - rotation) & 31);
    return ((descending ? 31 - __builtin_clz(turned) : __builtin_ctz(turned)) + rotation) & 31;
  }

  // A warp goes on for as long as it can; then another's turn comes.
  VCRD_UNWATCHED Lane* next() {
    unsigned warp = current_ ? current_->warp : 0;
    if (warp >= warps_ || !warp_[warp].ready) {
      uint32_t ready = 0;
      for (unsigned i = 0; i < warps_; ++i) ready |= uint32_t(warp_[i].ready != 0) << i;
      if (!ready) return nullptr;
      warp = first_of(ready, warp_rotation_, warps_descend_);
    }
    const unsigned lane = first_of(warp_[warp].ready, warp_[warp].rotation, warp_[warp].descending);
    warp_[warp].ready &= ~(uint32_t(1) << lane);
    return &lanes_[warp * kLanes + lane];
  }

  VCRD_UNWATCHED void complete(Warp& warp, const Lane& self) {
    Lane* lanes = &lanes_[self.warp * kLanes];
    for (unsigned i = 0; i < kLanes; ++i) {
      if (!(self.mask >> i & 1)) continue;
      const Lane& other = lanes[i];
      if (other.mask != self.mask || other.combine != self.combine || !(other.site == self.site))
        fail(
            "lanes of a warp meet in different operations: lane %u in %s at %s with mask 0x%08x, lane %u in %s at %s "
            "with mask 0x%08x",
            self.lane, self.operation, name(self.site).c_str(), self.mask, i, other.operation, name(other.site).c_str(),
            other.mask);
      if (!(self.mask >> other.source & 1))
        fail("%s at %s: lane %u reads lane %d, which mask 0x%08x does not name", self.operation,
             name(self.site).c_str(), i, other.source, self.mask);
    }
    for (unsigned i = 0; i < kLanes; ++i)
      if (self.mask >> i & 1) lanes[i].result = self.combine(lanes, self.mask, i);
    warp.waiting &= ~self.mask;
    warp.ready |= self.mask;
    const uint64_t bits = random();
    warp.rotation = bits >> 8 & 31, warp.descending = bits >> 13 & 1;
  }

  void deadlock() {
    const Lane* waiting = nullptr;
    unsigned in_warps = 0;
    for (unsigned i = 0; i < threads_; ++i) {
      in_warps += lanes_[i].state == Lane::kInWarp;
      if (lanes_[i].state == Lane::kAtBarrier && !waiting) waiting = &lanes_[i];
    }
    for (unsigned i = 0; i < threads_ && !waiting; ++i)
      if (lanes_[i].state == Lane::kInWarp) waiting = &lanes_[i];
    fail("%s: %u threads wait at a barrier, %u in a warp operation, %u have left; one waits in %s at %s",
         at_barrier_ ? "divergent barrier" : "divergent warp operation", at_barrier_, in_warps, left_,
         waiting->operation, name(waiting->site).c_str());
  }

  std::mutex mutex_;
  Stacks stacks_;
  Lane lanes_[kMostThreads];
  Warp warp_[kMostThreads / kLanes];
  Fiber outside_;
  Lane* current_ = nullptr;
  void (*body_)(void*);
  void* argument_;
  unsigned threads_, warps_, at_barrier_, left_, warp_rotation_;
  bool warps_descend_;
  Site barrier_site_;
  uint64_t launches_ = 0, seed_, random_;
  std::string fault_;
};

}  // namespace vcrd_emulation
