// Per-element mathematics for the CPU loops and the CUDA kernels alike. Everything is a small static function without
// branches, so that host compilers vectorise the loops that call it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

#ifdef __CUDACC__
#define VCRD_FUNCTION static __host__ __device__ __forceinline__
#else
// Internal linkage and forced inlining: this header is compiled once per instruction set, and the linker must never
// take one translation unit's copy for another's.
#define VCRD_FUNCTION static inline __attribute__((always_inline))
#endif

namespace vcrd {

// A logit further than this below its row's maximum counts as -inf, and -inf becomes this distance. The exponential of
// this distance is 0, yet no sum over a row overflows, nor does its product with an inverse temperature. So 0 *
// distance is 0, and the difference of two such distances is 0: neither is NaN. Such sums do not tell whether a
// divergence is infinite; RowPartial has fields for that.
constexpr float kLowestDistance = -1e30f;
// log of half the smallest float64. A probability below it counts as 0, as it does in the float64 reference.
constexpr double kLowestLogProbability = -745.1332191;
// log(2^-127), of the largest power of two that is no normal float32.
constexpr float kLowestExponent = -88.0296919f;

VCRD_FUNCTION float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

VCRD_FUNCTION uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

VCRD_FUNCTION float at_least_lowest(float x) { return x < kLowestDistance ? kLowestDistance : x; }  // a NaN stays

VCRD_FUNCTION float distance(float logit, float reference) { return at_least_lowest(logit - reference); }

// exp(x) for x <= 0, relative error 2e-7 with fused multiply-add; zero below kLowestExponent; NaN stays NaN.
// Computed as 2^n 2^f with f in [-1/2, 1/2]. The polynomial is the minimax one of 2^f - 1 that passes through 0.
// `clamped` is at least kLowestExponent. Float is float, or a register of floats, and Bits holds its bits.
template <class Bits, class Float>
VCRD_FUNCTION Float exponential_of_clamped(Float clamped) {
  // Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits. The 127 makes it a biased exponent, which is
  // 0 at the lowest x; the result is then 0 too.
  const float round_to_exponent = 12582912.0f + 127.0f;
  Float shifted = clamped * 1.44269504f + round_to_exponent;
  Float n = shifted - round_to_exponent;
  Float f = clamped * 1.44269504f - n;
  Float p = 1.325460267e-3f * f + 9.671999142e-3f;
  p = p * f + 5.550779402e-2f;
  p = p * f + 2.402223200e-1f;
  p = p * f + 6.931469440e-1f;
  p = p * f + 1.0f;
  // The power is multiplied, not added to the exponent bits, so that a NaN cannot turn into a number.
  Bits exponent;
  memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= 23;
  Float power;
  memcpy(&power, &exponent, sizeof power);
  return p * power;
}

VCRD_FUNCTION float exponential(float x) {
#ifdef __CUDA_ARCH__
  return exp2f(x * 1.44269504f);  // one instruction of the special-function unit, because denormals are flushed to zero
#else
  return exponential_of_clamped<uint32_t>(x < kLowestExponent ? kLowestExponent : x);
#endif
}

// a / b for |b| < 2^126. The GPU's fast division errs by up to two units in the last place and has no slow path.
VCRD_FUNCTION float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// log(x) for normal x > 0, with the coefficients of logf in Cephes.
VCRD_FUNCTION float logarithm(float x) {
  uint32_t bits = to_bits(x);
  // Mantissa into [sqrt(1/2), sqrt(2)), so that log(1) is exactly 0.
  uint32_t offset = bits - 0x3f3504f3u;
  float e = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  float m = from_bits((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z - 2.12194440e-4f * e - 0.5f * z;
  return m + p + 0.693359375f * e;
}

// log(exp(mixture) + exp(share)), where -inf is no probability. The error is below 1e-7 of 1 + |result|. A NaN stays.
VCRD_FUNCTION float log_of_sum(float mixture, float share) {
  float a = at_least_lowest(mixture), b = at_least_lowest(share);
  float apart = a > b ? b - a : a - b;
  float sum = (a > b ? a : b) + logarithm(1.0f + exponential(apart)) + 0.0f * apart;  // logarithm() has no NaN
  return sum <= kLowestDistance ? -INFINITY : sum;
}

VCRD_FUNCTION float bfloat16_to_float(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

// Rounds to nearest, ties to even; the result is the upper half of the bits. Float and Bits are as in
// exponential_of_clamped.
template <class Bits, class Float>
VCRD_FUNCTION Bits rounded_to_bfloat16(Float value) {
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? 0x7fc00000u : rounded;
}

VCRD_FUNCTION uint16_t float_to_bfloat16(float value) {
  return static_cast<uint16_t>(rounded_to_bfloat16<uint32_t>(value) >> 16);
}

VCRD_FUNCTION float float16_to_float(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  // Multiplying by 2^112 changes the exponent bias of float16 to that of float32, for subnormals too. Infinities and
  // NaN need all bits of the exponent set.
  uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
  uint32_t special = magnitude | 0x7f800000u;
  return from_bits((magnitude >= 0x0f800000u ? special : finite) | sign);
}

VCRD_FUNCTION uint16_t float_to_float16(float value) {
  uint32_t bits = to_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns the last bit of a subnormal result with that of a float32, and the addition rounds to nearest
  // even.
  uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

constexpr float kSqrt8Step = 0.0192116844f;   // sqrt(kSqrt8Range) / 255
constexpr float kSqrt8Inverse = 52.0516570f;  // 255 / sqrt(kSqrt8Range)
constexpr float kLowestFloat16 = -65504.0f;

// The teacher's 8-bit code; see Dtype::kSqrt8.
struct Sqrt8 {
  uint8_t code;
};

// The logit that a code stands for, relative to the row's maximum.
VCRD_FUNCTION float sqrt8_to_float(float code) {
  float root = code * kSqrt8Step;
  return -root * root;
}

// The nearest code. Codes are evenly spaced in the square root of d, so that the error of exp(-d) is about even.
VCRD_FUNCTION uint8_t float_to_sqrt8(float distance_below) {
  float d = distance_below < 0.0f ? 0.0f : distance_below;
  d = d < kSqrt8Range ? d : kSqrt8Range;  // a NaN becomes the range: codes have no NaN
  return static_cast<uint8_t>(sqrtf(d) * kSqrt8Inverse + 0.5f);
}

// What is added to the teacher's logits of a row after they are read.
VCRD_FUNCTION float shift_of(const Logits& teacher, int64_t row) { return teacher.shift ? teacher.shift[row] : 0.0f; }

// The constants of a row, for logits that are read without their shift.
VCRD_FUNCTION RowConstants constants_of(const RowConstants* constants, const Logits& teacher, int64_t row) {
  RowConstants c = constants[row];
  c.teacher_max -= shift_of(teacher, row);
  c.teacher_at_student_action -= shift_of(teacher, row);
  return c;
}

// What reverse_cross is relative to: the teacher's logit at the student's action. Where the teacher has no probability
// there, its maximum takes the place of that logit, so that sums stay finite. A NaN stays.
VCRD_FUNCTION float reverse_reference(float teacher_at_student_action, float teacher_max) {
  float reference = teacher_at_student_action < teacher_max + kLowestDistance ? teacher_max : teacher_at_student_action;
  return reference == -INFINITY ? 0.0f : reference;  // no finite logit so far
}

}  // namespace vcrd
