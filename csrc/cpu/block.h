// Blocks of columns: how they are read, widened, narrowed and searched. Part of loops.h, which says how it is compiled.
#pragma once

#include "../elementwise.h"
#include "../kernels.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

constexpr int64_t kBlock = 1024;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float widened(const float* in, int64_t i) { return in[i]; }
inline float widened(const BFloat16* in, int64_t i) { return bfloat16_to_float(in[i].bits); }
inline float widened(const Float16* in, int64_t i) { return float16_to_float(in[i].bits); }
inline float widened(const Sqrt8* in, int64_t i) { return sqrt8_to_float(in[i].code); }

// float32 is used in place. The narrow types are widened into a buffer of one block.
template <class T>
const float* widen(const T* in, float* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    return in;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = widened(in, i);
    return buffer;
  }
}

inline void narrow(const float* in, float* out, int64_t n) { memcpy(out, in, n * sizeof(float)); }

inline void narrow(const float* in, BFloat16* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i].bits = float_to_bfloat16(in[i]);
}

inline void narrow(const float* in, Float16* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i].bits = float_to_float16(in[i]);
}

template <class T>
const T* row_of(const Logits& logits, int64_t row) {
  return static_cast<const T*>(logits.data) + row * logits.stride;
}

inline float larger_of(float x, float y) { return x > y ? x : y; }

inline bool masked(const uint8_t* mask, int64_t row) { return mask && !mask[row]; }

// Widens a block and finds its maximum in one pass. Not inlined, because the compiler does not vectorise it where it is
// inlined into some of its callers.
template <class T>
__attribute__((noinline)) float widen_and_maximum(const T* in, float* buffer, int64_t n) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < n; ++i) {
    float x = widened(in, i);
    if constexpr (!std::is_same_v<T, float>) buffer[i] = x;
    maximum = x > maximum ? x : maximum;
  }
  return maximum;
}

// Not inlined: it is rarely called, and without it the compiler optimises the loop over a row better.
template <class T>
__attribute__((noinline)) int64_t first_index_of(const T* in, int64_t n, float value) {
  int32_t first = static_cast<int32_t>(n);
#pragma omp simd reduction(min : first)
  for (int32_t i = 0; i < static_cast<int32_t>(n); ++i) {
    int32_t index = widened(in, i) == value ? i : static_cast<int32_t>(n);
    first = index < first ? index : first;
  }
  return first;
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
