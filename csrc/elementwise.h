// Per-element mathematics, shared by the CPU loops and the CUDA kernels. Everything is a small static function without
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

// A logit further than this below its row's maximum counts as -inf, and -inf becomes this distance: far below every
// exponential, yet so small that no sum over a row overflows, and none of its products with an inverse temperature.
// 0 * distance is then 0 and the difference of two such distances is 0, neither NaN. Whether a divergence is infinite
// is never read from such sums: RowPartial keeps what decides it.
constexpr float kLowestDistance = -1e30f;
// log of half the smallest float64. A probability below it counts as 0, as it does in the float64 reference.
constexpr double kLowestLogProbability = -745.1332191;
// 2^-127: the first power of two that is no normal float32.
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
// 2^n 2^f with f in [-1/2, 1/2]; the polynomial is the minimax one of 2^f - 1 that passes through 0.
// `clamped` is at least kLowestExponent. Float is float, or a register of floats, whose bits Bits holds.
template <class Bits, class Float>
VCRD_FUNCTION Float exponential_of_clamped(Float clamped) {
  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits; 127 makes that a biased exponent, which
  // is 0 at the lowest x, and with it the result.
  const float round_to_exponent = 12582912.0f + 127.0f;
  Float shifted = clamped * 1.44269504f + round_to_exponent;
  Float n = shifted - round_to_exponent;
  Float f = clamped * 1.44269504f - n;
  Float p = 1.325460267e-3f * f + 9.671999142e-3f;
  p = p * f + 5.550779402e-2f;
  p = p * f + 2.402223200e-1f;
  p = p * f + 6.931469440e-1f;
  p = p * f + 1.0f;
  // Multiplied, not added to the exponent bits, so that a NaN cannot turn into a number.
  Bits exponent;
  memcpy(&exponent, &shifted, sizeof exponent);
  exponent <<= 23;
  Float power;
  memcpy(&power, &exponent, sizeof power);
  return p * power;
}

VCRD_FUNCTION float exponential(float x) {
#ifdef __CUDA_ARCH__
  return exp2f(x * 1.44269504f);  // one instruction on the special-function unit, since denormals are flushed to zero
#else
  return exponential_of_clamped<uint32_t>(x < kLowestExponent ? kLowestExponent : x);
#endif
}

// a / b for |b| < 2^126. On a GPU two units in the last place buy freedom from a slow path.
VCRD_FUNCTION float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// log(x) for normal x > 0, with the coefficients of Cephes' logf.
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

VCRD_FUNCTION float bfloat16_to_float(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even; in the upper half of the bits. Float and Bits as in exponential_of_clamped.
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
  // 2^112 moves float16's exponent bias to float32's, subnormals included; infinities and NaN need all bits set.
  uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000u));
  uint32_t special = magnitude | 0x7f800000u;
  return from_bits((magnitude >= 0x0f800000u ? special : finite) | sign);
}

VCRD_FUNCTION uint16_t float_to_float16(float value) {
  uint32_t bits = to_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns a subnormal result's last bit with float32's, and the addition itself rounds to nearest even.
  uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | sign);
}

constexpr float kDistance8Step = 0.0192116844f;   // sqrt(kDistance8Range) / 255
constexpr float kDistance8Inverse = 52.0516570f;  // 255 / sqrt(kDistance8Range)
constexpr float kLowestFloat16 = -65504.0f;

// A distance coded in 8 bits, as the logit it stands for relative to the row's maximum.
VCRD_FUNCTION float distance8_to_float(float code) {
  float root = code * kDistance8Step;
  return -root * root;
}

// The nearest code in the square root, where the error of exp(-d) is about even.
VCRD_FUNCTION uint8_t float_to_distance8(float distance_below) {
  float d = distance_below < 0.0f ? 0.0f : distance_below;
  d = d < kDistance8Range ? d : kDistance8Range;  // a NaN too: codes have none
  return static_cast<uint8_t>(sqrtf(d) * kDistance8Inverse + 0.5f);
}

// What is added to a row of the teacher's logits after they are read.
VCRD_FUNCTION float shift_of(const Logits& teacher, int64_t row) { return teacher.shift ? teacher.shift[row] : 0.0f; }

// A row's constants, for logits that are read without their shift.
VCRD_FUNCTION RowConstants constants_of(const RowConstants* constants, const Logits& teacher, int64_t row) {
  RowConstants c = constants[row];
  c.teacher_max -= shift_of(teacher, row);
  c.teacher_at_student_action -= shift_of(teacher, row);
  return c;
}

// The divergences D of a token's probabilities have d D / d logit_j = q_j (G_j - sum_k q_k G_k) / T, where the
// potential G = d D / d q. Where the student is sure of itself, G_j of its action and the mean of G agree to many
// digits. So G is always taken relative to its value at the student's action, and the mean ("centre") is summed of
// these differences.

// What reverse_cross is relative to: the teacher's logit at the student's action, or, where the teacher has no
// probability there, its maximum, so that sums stay finite. A NaN stays.
VCRD_FUNCTION float reverse_reference(float teacher_at_student_action, float teacher_max) {
  float reference = teacher_at_student_action < teacher_max + kLowestDistance ? teacher_max : teacher_at_student_action;
  return reference == -INFINITY ? 0.0f : reference;  // no finite logit so far
}

template <Divergence kDivergence>
constexpr bool kHasReverse = kDivergence == Divergence::kReverseKl || kDivergence == Divergence::kJeffreys;

// An infinite reverse KL has no gradient, and its row gets none. Returns the scale of the row's slopes, which become
// finite where it is 0.
VCRD_FUNCTION float scale_of_finite(RowConstants& c, float scale) {
  if (c.reverse_centre != INFINITY) return scale;
  c.reverse_centre = 0.0f;
  c.teacher_at_student_action = c.teacher_max;
  return 0.0f;
}

// log(q/p) relative to its value at the student's action. `u` is the student's tempered distance.
VCRD_FUNCTION float reverse_potential(float u, float teacher_logit, const RowConstants& c, float inverse_temperature) {
  return u - distance(teacher_logit, c.teacher_at_student_action) * inverse_temperature;
}

// One token's term of a divergence against the mixture m = share p + (1 - share) q, and its potential.
struct MixtureElement {
  float term, potential;
};

// From the ratio of the two probabilities, which keeps the digits that log p - log m would lose where p is close to q.
// Minima and maxima alone, and one result by value: shared conditions, or a struct passed on, would keep the compiler
// from vectorising the loops.
template <Divergence kDivergence>
VCRD_FUNCTION MixtureElement mixture_element(float p, float q, float log_q_minus_log_p, float share) {
  const float tiny = 1e-37f;  // where both probabilities are 0: every result is finite, to be multiplied by them
  float larger = p < q ? q : p;
  float divisor = larger < tiny ? tiny : larger;
  float teacher = divide(p, divisor), student = divide(q, divisor);
  float sum = share * teacher + (1.0f - share) * student;
  float mixture = sum < tiny ? tiny : sum;
  float log_mixture = logarithm(mixture);  // log(m / larger)
  // Not above 0 in this order, which keeps a NaN: logarithm() does not.
  float log_student_ratio = (log_q_minus_log_p > 0.0f ? 0.0f : log_q_minus_log_p) - log_mixture;   // log(q/m)
  float log_teacher_ratio = (log_q_minus_log_p < 0.0f ? 0.0f : -log_q_minus_log_p) - log_mixture;  // log(p/m)
  if constexpr (kDivergence == Divergence::kJsd)
    return {share * (p * log_teacher_ratio) + (1.0f - share) * (q * log_student_ratio),
            (1.0f - share) * log_student_ratio};
  if constexpr (kDivergence == Divergence::kSkewKl)
    return {p * log_teacher_ratio, (share - 1.0f) * divide(teacher, mixture)};
  return {q * log_student_ratio, log_student_ratio - (1.0f - share) * divide(student, mixture)};
}

// The mixture's potential at the student's action, where u is 0.
template <Divergence kDivergence>
VCRD_FUNCTION float mixture_anchor(const RowConstants& c, float inverse_temperature, float share) {
  float v = distance(c.teacher_at_student_action, c.teacher_max) * inverse_temperature;
  float p = exponential(v) * c.teacher_tempered_inverse_sum;
  float q = c.student_tempered_inverse_sum;
  return mixture_element<kDivergence>(p, q, 0.0f - v - c.log_sum_difference, share).potential;
}

}  // namespace vcrd
