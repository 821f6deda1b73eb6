// Logits as distances below their row's maximum: what the teacher sends. Part of loops.h.
#pragma once

#include "block.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

template <class S>
void row_maxima(const MaximumParams& p, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    float maximum = -INFINITY;
    for (int64_t block = 0; block < p.columns; block += kBlock) {
      int64_t n = p.columns - block < kBlock ? p.columns - block : kBlock;
      float of_block = widen_and_maximum(row_of<S>(p.logits, row) + block, buffer, n);
      maximum = of_block > maximum ? of_block : maximum;
    }
    p.maxima[row] = maximum;
  }
}

template <class S>
void encode(const EncodeParams& p, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    // A row without any finite logit has no maximum to measure from.
    const float maximum = p.maxima[row] == -INFINITY ? 0.0f : p.maxima[row];
    for (int64_t block = 0; block < p.columns; block += kBlock) {
      int64_t n = p.columns - block < kBlock ? p.columns - block : kBlock;
      const float* x = widen(row_of<S>(p.logits, row) + block, buffer, n);
      if (p.code == Dtype::kDistance8) {
        uint8_t* out = static_cast<uint8_t*>(p.codes) + row * p.columns + block;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = float_to_distance8(maximum - x[i]);
      } else {
        uint16_t* out = static_cast<uint16_t*>(p.codes) + row * p.columns + block;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = float_to_float16(x[i] - maximum);
      }
    }
  }
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
