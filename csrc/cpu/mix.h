// Adds a teacher to a mixture of several. Part of loops.h.
#pragma once

#include "block.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

template <class T>
void mix(const MixParams& p, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const float subtracted = p.subtracted[row] - shift_of(p.teacher, row);
    for (int64_t block = 0; block < p.columns; block += kBlock) {
      const int64_t n = p.columns - block < kBlock ? p.columns - block : kBlock;
      const float* logits = widen(row_of<T>(p.teacher, row) + block, buffer, n);
      float* mixture = p.mixture + row * p.columns + block;
      if (p.first) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) mixture[i] = logits[i] - subtracted;
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) mixture[i] = log_of_sum(mixture[i], logits[i] - subtracted);
      }
    }
  }
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
