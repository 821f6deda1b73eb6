// Encodes logits as distances below the row's maximum. The teacher sends these codes. Part of loops.h.
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

// As float_to_sqrt8 in elementwise.h, before the fraction is cut off. The processor's square root takes three times as
// long as its estimate of the inverse root with one Newton step, which is right to one or two units in the last place.
VCRD_LANES Floats coded(Floats below, Sqrt8) {
  Floats d = smaller(below, all_lanes(kSqrt8Range));  // a NaN becomes the range: codes have no NaN
#if VCRD_REGISTER_BYTES > 16
#if VCRD_REGISTER_BYTES == 64
  const Floats inverse = _mm512_rsqrt14_ps(d);
#else
  const Floats inverse = _mm256_rsqrt_ps(d);
#endif
  // For d <= 0 this is not finite. The conversion to integers then gives a number whose low byte is 0, which is code 0.
  const Floats root = d * inverse;
  return root * (1.5f * kSqrt8Inverse - 0.5f * kSqrt8Inverse * (root * inverse)) + 0.5f;
#else
  d = larger(d, Floats{});
  Floats root;
  for (int64_t i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(d[i]);
  return root * kSqrt8Inverse + 0.5f;
#endif
}

VCRD_LANES Integers cut_off(Floats x) {
#if VCRD_REGISTER_BYTES == 64
  return (Integers)_mm512_cvttps_epi32(x);
#elif VCRD_REGISTER_BYTES == 32
  return (Integers)_mm256_cvttps_epi32(x);
#else
  return __builtin_convertvector(x, Integers);
#endif
}

VCRD_LANES Floats coded(Floats below, Float16) {
  return smaller(all_lanes(0.0f), at_least(kLowestFloat16, -below));  // a NaN stays
}

VCRD_LANES Bytes packed(Floats x, Sqrt8) { return __builtin_convertvector(cut_off(x), Bytes); }

VCRD_LANES auto packed(Floats x, Float16) {
  struct {
    alignas(2 * kLanes) Float16 codes[kLanes];
  } out;
  store(x, out.codes);
  return out;
}

// The even and odd columns of bfloat16; see load_pair.
VCRD_LANES Halves packed(Pair x, Sqrt8) {
  return __builtin_convertvector(cut_off(x.first) | cut_off(x.second) << 8, Halves);
}

// With kStream, stores that bypass the caches: an ordinary store reads each cache line before it writes.
template <bool kStream, class Packed>
VCRD_LANES void put(const Packed& codes, void* out) {
#if VCRD_REGISTER_BYTES > 16
  if constexpr (kStream && sizeof codes == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(out), bits_as<__m256i>(codes));
  else if constexpr (kStream && sizeof codes == 16)
    return _mm_stream_si128(static_cast<__m128i*>(out), bits_as<__m128i>(codes));
  else if constexpr (kStream && sizeof codes == 8)
    return _mm_stream_si64(static_cast<long long*>(out), bits_as<long long>(codes));
#endif
  memcpy(out, &codes, sizeof codes);
}

template <bool kStream, class S, class Code>
void encode_row(const S* in, float maximum, Code* out, int64_t columns) {
  const Floats reference = all_lanes(maximum);
  int64_t i = 0;
  if constexpr (std::is_same_v<S, BFloat16> && std::is_same_v<Code, Sqrt8>) {
    for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
      const Pair x = load_pair<true>(in + i);
      put<kStream>(packed(Pair{coded(reference - x.first, Code{}), coded(reference - x.second, Code{})}, Code{}),
                   out + i);
    }
  }
  for (; i + kLanes <= columns; i += kLanes)
    put<kStream>(packed(coded(reference - load(in + i), Code{}), Code{}), out + i);
  if (i == columns) return;
  // The last columns by the same arithmetic, so that a code does not depend on its position in the row.
  S last[kLanes] = {};
  memcpy(last, in + i, (columns - i) * sizeof(S));
  const auto codes = packed(coded(reference - load(last), Code{}), Code{});
  memcpy(out + i, &codes, (columns - i) * sizeof(Code));
}

template <class S, class Code>
void encode_rows(const EncodeParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kAligned = 2 * kLanes * sizeof(Code), kMoreThanCached = int64_t{1} << 23;  // bytes
  const int64_t row_bytes = p.columns * sizeof(Code);
  const bool aligned = (reinterpret_cast<uintptr_t>(p.codes) | row_bytes) % kAligned == 0;
  auto encode_one =
      aligned && p.rows * row_bytes >= kMoreThanCached ? encode_row<true, S, Code> : encode_row<false, S, Code>;
  for (int64_t row = begin; row < end; ++row) {
    // A row without a finite logit has no maximum to subtract.
    const float maximum = p.maxima[row] == -INFINITY ? 0.0f : p.maxima[row];
    encode_one(row_of<S>(p.logits, row), maximum, static_cast<Code*>(p.codes) + row * p.columns, p.columns);
  }
#if VCRD_REGISTER_BYTES > 16
  _mm_sfence();  // makes the streaming stores visible to other threads
#endif
}

template <class S>
void encode(const EncodeParams& p, int64_t begin, int64_t end) {
  p.code == Dtype::kSqrt8 ? encode_rows<S, Sqrt8>(p, begin, end) : encode_rows<S, Float16>(p, begin, end);
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
