// Logits as distances below their row's maximum: what the teacher sends. Part of loops.h.
#pragma once

#include "lanes.h"

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

inline void encode_block(const float* in, float maximum, Distance8* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i].code = float_to_distance8(maximum - in[i]);
}

inline void encode_block(const float* in, float maximum, Float16* out, int64_t n) {
#if VCRD_REGISTER_BYTES > 16
  // These processors round to float16 in one instruction, which the compiler does not find.
  const Floats reference = all_lanes(maximum);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(load(in + i) - reference, out + i);
  for (; i < n; ++i) out[i].bits = float_to_float16(in[i] - maximum);
#else
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i].bits = float_to_float16(in[i] - maximum);
#endif
}

template <class S, class Code>
void encode_row(const S* in, float maximum, Code* out, int64_t columns) {
  alignas(64) float buffer[kBlock];
  for (int64_t block = 0; block < columns; block += kBlock) {
    int64_t n = columns - block < kBlock ? columns - block : kBlock;
    encode_block(widen(in + block, buffer, n), maximum, out + block, n);
  }
}

template <class S>
void encode(const EncodeParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    // A row without any finite logit has no maximum to measure from.
    const float maximum = p.maxima[row] == -INFINITY ? 0.0f : p.maxima[row];
    const S* in = row_of<S>(p.logits, row);
    const int64_t start = row * p.columns;
    p.code == Dtype::kDistance8 ? encode_row(in, maximum, static_cast<Distance8*>(p.codes) + start, p.columns)
                                : encode_row(in, maximum, static_cast<Float16*>(p.codes) + start, p.columns);
  }
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
