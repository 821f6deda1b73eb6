// What threads of a block do together: barriers, shuffles, votes, atomics.
#pragma once

#include <type_traits>

#include "block.h"

namespace vcrd_emulation {

template <class T>
uint64_t to_word(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles 4- and 8-byte numbers");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

VCRD_UNWATCHED inline uint64_t read_source(const Lane* lanes, uint32_t, unsigned lane) {
  return lanes[lanes[lane].source].value;
}
inline uint64_t nothing(const Lane*, uint32_t, unsigned) { return 0; }

VCRD_UNWATCHED inline uint64_t ballot(const Lane* lanes, uint32_t mask, unsigned) {
  uint64_t votes = 0;
  for (unsigned i = 0; i < kLanes; ++i) votes |= uint64_t((mask >> i & 1) && lanes[i].value) << i;
  return votes;
}

template <class T, class Operation>
uint64_t reduce(const Lane* lanes, uint32_t mask, unsigned) {
  T total{};
  bool first = true;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const T value = from_word<T>(lanes[i].value);
    total = first ? value : Operation()(total, value), first = false;
  }
  return to_word(total);
}

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  }
};
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, Site site) {
  return from_word<T>(Machine::instance().meet(operation, mask, to_word(value), source, read_source, site));
}

inline int lane() { return int(Machine::instance().lane()); }
inline int group_start(int width) { return lane() & ~(width - 1); }

}  // namespace vcrd_emulation

// The place of the call, for the report of a fault. Two calls meet only if it is the same one.
#define VCRD_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(VCRD_SITE) { vcrd_emulation::Machine::instance().barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, VCRD_SITE) {
  vcrd_emulation::Machine::instance().meet("__syncwarp", mask, 0, vcrd_emulation::lane(), vcrd_emulation::nothing,
                                           {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, VCRD_SITE) {
  source = vcrd_emulation::group_start(width) + (source & (width - 1));
  return vcrd_emulation::shuffle("__shfl_sync", mask, value, source, {file, line});
}

// Past its group of `width` lanes a lane reads itself.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, VCRD_SITE) {
  int source = vcrd_emulation::lane() ^ lane_mask;
  if (source >= vcrd_emulation::group_start(width) + width) source = vcrd_emulation::lane();
  return vcrd_emulation::shuffle("__shfl_xor_sync", mask, value, source, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, VCRD_SITE) {
  int source = vcrd_emulation::lane() + int(delta);
  if (source >= vcrd_emulation::group_start(width) + width) source = vcrd_emulation::lane();
  return vcrd_emulation::shuffle("__shfl_down_sync", mask, value, source, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, VCRD_SITE) {
  int source = vcrd_emulation::lane() - int(delta);
  if (source < vcrd_emulation::group_start(width)) source = vcrd_emulation::lane();
  return vcrd_emulation::shuffle("__shfl_up_sync", mask, value, source, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, VCRD_SITE) {
  return unsigned(vcrd_emulation::Machine::instance().meet(
      "__ballot_sync", mask, predicate != 0, vcrd_emulation::lane(), vcrd_emulation::ballot, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, VCRD_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, VCRD_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

#define VCRD_EMULATION_REDUCE(name, Operation)                                                              \
  template <class T>                                                                                        \
  T name(unsigned mask, T value, VCRD_SITE) {                                                               \
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "CUDA reduces int and unsigned");                \
    using namespace vcrd_emulation;                                                                         \
    return from_word<T>(                                                                                    \
        Machine::instance().meet(#name, mask, to_word(value), lane(), reduce<T, Operation>, {file, line})); \
  }
VCRD_EMULATION_REDUCE(__reduce_add_sync, Add)
VCRD_EMULATION_REDUCE(__reduce_min_sync, Least)
VCRD_EMULATION_REDUCE(__reduce_max_sync, Greatest)
#undef VCRD_EMULATION_REDUCE

inline void __threadfence() {}
inline void __threadfence_block() {}

// One thread runs at a time and gives way only where it waits.
template <class T>
T atomicAdd(T* target, T value) {
  T before = *target;
  *target = before + value;
  return before;
}
template <class T>
T atomicMax(T* target, T value) {
  T before = *target;
  *target = before < value ? value : before;
  return before;
}
template <class T>
T atomicMin(T* target, T value) {
  T before = *target;
  *target = value < before ? value : before;
  return before;
}
template <class T>
T atomicExch(T* target, T value) {
  T before = *target;
  *target = value;
  return before;
}
