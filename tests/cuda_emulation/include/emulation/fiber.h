// Fibers: stacks of their own on one OS thread, and the switch between them. Written for speed, since a warp shuffle is
// a meeting of 32 fibers and a row's reduction has a hundred of them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a called function must keep, stores the stack pointer, takes the other stack's and returns on it. Weak,
// because every file that includes this header carries a copy.
extern "C" void vcrd_emulation_switch(void** from, void* to);
// Where a new fiber starts: calls the function that was left on its stack.
extern "C" void vcrd_emulation_start();

#if defined(__x86_64__)
asm(R"(
  .pushsection .text
  .weak vcrd_emulation_switch, vcrd_emulation_start
  .hidden vcrd_emulation_switch, vcrd_emulation_start
  .type vcrd_emulation_switch, @function
  .type vcrd_emulation_start, @function
vcrd_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
vcrd_emulation_start:
  movq %r12, %rdi
  callq *%rbx
  ud2
  .popsection
)");
#elif defined(__aarch64__)
asm(R"(
  .pushsection .text
  .weak vcrd_emulation_switch, vcrd_emulation_start
  .hidden vcrd_emulation_switch, vcrd_emulation_start
  .type vcrd_emulation_switch, %function
  .type vcrd_emulation_start, %function
vcrd_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
vcrd_emulation_start:
  mov x0, x20
  blr x19
  brk #1
  .popsection
)");
#else
#error "the emulation's context switch is written for x86-64 and aarch64"
#endif

// The machinery itself is not instrumented: for speed, and since a thread that ends never returns through the frames
// below its kernel, whose redzones would stay poisoned and be taken for faults of the stack's next user.
#define VCRD_UNWATCHED __attribute__((no_sanitize("address", "undefined")))

namespace vcrd_emulation {

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's own
};

inline Fiber* previous_fiber = nullptr;  // whom the running one was switched to from

// AddressSanitizer must know which stack is in use. First thing on every arrival.
VCRD_UNWATCHED __attribute__((always_inline)) inline void arrived(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  // The bounds of the stack that was left: news only for the OS thread's own, and the same for all others.
  __sanitizer_finish_switch_fiber(fake_stack, &previous_fiber->stack_bottom, &previous_fiber->stack_bytes);
#else
  (void)fake_stack;
#endif
}

VCRD_UNWATCHED __attribute__((always_inline)) inline void switch_fiber(Fiber& from, Fiber& to, bool ends) {
  previous_fiber = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
#else
  (void)ends;
#endif
  vcrd_emulation_switch(&from.stack_pointer, to.stack_pointer);
  arrived(from.fake_stack);
}

// One stack per thread of a block, with an unreadable page below each, so that an overflow is a fault and not a riddle.
class Stacks {
 public:
  static constexpr size_t kBytes = size_t(256) << 10;

  explicit Stacks(size_t count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    memory_ = static_cast<char*>(
        mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) {
      std::perror("emulation: no memory for the threads' stacks");
      std::abort();
    }
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kBytes, page, PROT_NONE);
    guard_ = page;
  }

  // A fiber on stack `i` that will call run(argument), which must not return.
  void prepare(Fiber& fiber, size_t i, void (*run)(void*), void* argument) const {
    char* bottom = memory_ + i * kBytes + guard_;
    fiber.stack_bottom = bottom;
    fiber.stack_bytes = kBytes - guard_;
    fiber.fake_stack = nullptr;
    // Stacks a power of two apart would all compete for the same lines of the cache.
    auto* top = reinterpret_cast<uint64_t*>(bottom + fiber.stack_bytes - (i * 1216) % 65536 / 64 * 64);
#if defined(__x86_64__)
    const uint64_t frame[] = {0, 0, 0, uint64_t(argument), uint64_t(run), 0, uint64_t(&vcrd_emulation_start)};
#else
    const uint64_t frame[20] = {
        uint64_t(run), uint64_t(argument), 0, 0, 0, 0, 0, 0, 0, 0, 0, uint64_t(&vcrd_emulation_start)};
#endif
    // x86-64 pops seven words and then calls: the stack is aligned to 16 bytes there, as it must be.
    const size_t words = sizeof frame / sizeof *frame;
    top -= words;
    for (size_t word = 0; word < words; ++word) top[word] = frame[word];
    fiber.stack_pointer = top;
  }

  // After a fault: the threads that were stopped in the middle left their frames' redzones behind.
  void forget(const Fiber& fiber) const {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack_bottom, fiber.stack_bytes);
#else
    (void)fiber;
#endif
  }

 private:
  char* memory_;
  size_t guard_;
};

}  // namespace vcrd_emulation
