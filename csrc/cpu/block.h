// Blocks of columns: how they are read, widened, narrowed and searched. Part of loops.h, which says how it is compiled.
#pragma once

#include "../kernels.h"
#include "../math.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

constexpr int64_t kBlock = 1024;

// float32 is used where it lies; the narrow types are widened into a buffer of one block.
inline const float* widen(const float* in, float*, int64_t) { return in; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline const float* widen(const BFloat16* in, float* buffer, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = bfloat16_to_float(in[i].bits);
  return buffer;
}

inline const float* widen(const Float16* in, float* buffer, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = float16_to_float(in[i].bits);
  return buffer;
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

inline bool masked(const uint8_t* mask, int64_t row) { return mask && !mask[row]; }

// The sweep for the maximum waits for memory, the sweep of exponentials does not: so each block's exponentials are
// taken while the next block is on its way.
template <class T>
void prefetch(const T* row, int64_t begin, int64_t columns) {
  int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
  for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// Kept out of line: inlined into some callers the compiler no longer vectorises it.
__attribute__((noinline)) float block_maximum(const float* x, int64_t n) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  return maximum;
}

inline int64_t first_index_of(const float* x, float value) {
  int64_t i = 0;
  while (x[i] != value) ++i;
  return i;
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
