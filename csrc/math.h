// Per-element and row-merge mathematics, shared by the CPU loops and the CUDA kernels. Everything is a small static
// function without branches in the element path, so that host compilers vectorise the loops that call it.
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

// Logits of -inf become this distance from the row's maximum: far below every exponential, yet finite, so that
// 0 * distance is 0 and the difference of two such distances is 0, neither NaN.
constexpr float kLowestDistance = -1e37f;
// A divergence past this can only come from kLowestDistance: probability where the other model has none.
constexpr double kInfiniteDivergence = 1e25;
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
VCRD_FUNCTION float exponential(float x) {
  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits; 127 makes that a biased exponent, which
  // is 0 at the lowest x, and with it the result.
  const float round_to_exponent = 12582912.0f + 127.0f;
  float clamped = x < kLowestExponent ? kLowestExponent : x;
  float shifted = clamped * 1.44269504f + round_to_exponent;
  float n = shifted - round_to_exponent;
  float f = clamped * 1.44269504f - n;
  float p = 1.325460267e-3f;
  p = p * f + 9.671999142e-3f;
  p = p * f + 5.550779402e-2f;
  p = p * f + 2.402223200e-1f;
  p = p * f + 6.931469440e-1f;
  p = p * f + 1.0f;
  // Multiplied, not added to the exponent bits, so that a NaN cannot turn into a number.
  return p * from_bits(to_bits(shifted) << 23);
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

VCRD_FUNCTION uint16_t float_to_bfloat16(float value) {
  uint32_t bits = to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
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

// The divergences D of a token's probabilities have d D / d logit_j = q_j (G_j - sum_k q_k G_k) / T, where the
// potential G = d D / d q. Where the student is sure of itself, G_j of its action and the mean of G agree to many
// digits. So G is always taken relative to its value at the student's action, and the mean ("centre") is summed of
// these differences.

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
  float teacher = p / divisor, student = q / divisor;
  float sum = share * teacher + (1.0f - share) * student;
  float mixture = sum < tiny ? tiny : sum;
  float log_mixture = logarithm(mixture);                                                           // log(m / larger)
  float log_student_ratio = (log_q_minus_log_p < 0.0f ? log_q_minus_log_p : 0.0f) - log_mixture;    // log(q/m)
  float log_teacher_ratio = (-log_q_minus_log_p < 0.0f ? -log_q_minus_log_p : 0.0f) - log_mixture;  // log(p/m)
  if constexpr (kDivergence == Divergence::kJsd)
    return {share * (p * log_teacher_ratio) + (1.0f - share) * (q * log_student_ratio),
            (1.0f - share) * log_student_ratio};
  if constexpr (kDivergence == Divergence::kSkewKl)
    return {p * log_teacher_ratio, (share - 1.0f) * (teacher / mixture)};
  return {q * log_student_ratio, log_student_ratio - (1.0f - share) * (student / mixture)};
}

// The mixture's potential at the student's action, where u is 0.
template <Divergence kDivergence>
VCRD_FUNCTION float mixture_anchor(const RowConstants& c, float inverse_temperature, float share) {
  float v = distance(c.teacher_at_student_action, c.teacher_max) * inverse_temperature;
  float p = exponential(v) * c.teacher_tempered_inverse_sum;
  float q = c.student_tempered_inverse_sum;
  return mixture_element<kDivergence>(p, q, 0.0f - v - c.log_sum_difference, share).potential;
}

// What one row of merged statistics holds before it is written to its several arrays.
struct MergedRow {
  float statistics[kStatistics];
  int32_t student_action, teacher_action;
  RowConstants constants;
};

// Merges a row's shards, `stride` partials apart, in double: a few operations per row buy exact normalisers.
// A label that no shard holds lies outside the vocabulary: its numbers are NaN, since a silent 0 would train on
// nothing.
VCRD_FUNCTION MergedRow merge_row(const RowPartial* partials, int64_t shards, int64_t stride, bool labelled,
                                  double inverse_temperature, Divergence divergence) {
  double student_max = -INFINITY, teacher_max = -INFINITY;
  int64_t student_shard = 0, teacher_shard = 0;
  for (int64_t i = 0; i < shards; ++i) {
    const RowPartial& part = partials[i * stride];
    if (part.student_max > student_max) student_max = part.student_max, student_shard = i;
    if (part.teacher_max > teacher_max) teacher_max = part.teacher_max, teacher_shard = i;
  }
  const RowPartial& student_part = partials[student_shard * stride];
  const RowPartial& teacher_part = partials[teacher_shard * stride];
  double student_sum = 0, teacher_sum = 0, student_moment = 0, teacher_moment = 0;
  double student_tempered = 0, teacher_tempered = 0, forward_cross = 0, reverse_cross = 0;
  double student_label = NAN, teacher_label = NAN;
  for (int64_t i = 0; i < shards; ++i) {
    const RowPartial& part = partials[i * stride];
    // A shard of padding alone, or of -inf alone, has nothing to move: its maximum of -inf would give NaN.
    double student_shift = part.student_max == -INFINITY ? 0.0 : part.student_max - student_max;
    double teacher_shift = part.teacher_max == -INFINITY ? 0.0 : part.teacher_max - teacher_max;
    double student_scale = exp(student_shift), teacher_scale = exp(teacher_shift);
    student_sum += student_scale * part.student_sum;
    teacher_sum += teacher_scale * part.teacher_sum;
    student_moment += student_scale * (part.student_moment + student_shift * part.student_sum);
    teacher_moment += teacher_scale * (part.teacher_moment + teacher_shift * part.teacher_sum);
    double student_weight = exp(student_shift * inverse_temperature);
    double teacher_weight = exp(teacher_shift * inverse_temperature);
    double action_shift = double(part.teacher_at_student_action) - student_part.teacher_at_student_action;
    student_tempered += student_weight * part.student_tempered_sum;
    teacher_tempered += teacher_weight * part.teacher_tempered_sum;
    forward_cross +=
        teacher_weight * (part.forward_cross + (teacher_shift - student_shift) * part.teacher_tempered_sum);
    reverse_cross += student_weight * (part.reverse_cross + (student_shift - action_shift) * part.student_tempered_sum);
    if (part.has_label) {
      student_label = part.student_label;
      teacher_label = part.teacher_label;
    }
  }
  // A row without any probability (all -inf) has no distribution; its numbers are NaN, as torch's softmax gives.
  if (student_sum == 0) student_sum = student_tempered = NAN;
  if (teacher_sum == 0) teacher_sum = teacher_tempered = NAN;
  double student_log_sum = log(student_sum), teacher_log_sum = log(teacher_sum);
  double log_sum_difference = log(student_tempered / teacher_tempered);
  double forward_kl = forward_cross / teacher_tempered * inverse_temperature + log_sum_difference;
  double reverse_centre = reverse_cross / student_tempered * inverse_temperature;
  double reverse_kl = reverse_centre - (student_part.teacher_at_student_action - teacher_max) * inverse_temperature -
                      log_sum_difference;
  // Rounding may leave a hair below zero; a NaN must stay.
  forward_kl = forward_kl < 0 ? 0 : forward_kl > kInfiniteDivergence ? INFINITY : forward_kl;
  reverse_kl = reverse_kl < 0 ? 0 : reverse_kl > kInfiniteDivergence ? INFINITY : reverse_kl;

  MergedRow row;
  float* out = row.statistics;
  out[kDivergence] = static_cast<float>(divergence == Divergence::kForwardKl   ? forward_kl
                                        : divergence == Divergence::kReverseKl ? reverse_kl
                                        : divergence == Divergence::kJeffreys  ? 0.5 * (forward_kl + reverse_kl)
                                                                               : 0.0);
  double student_label_logprob = labelled ? student_label - student_max - student_log_sum : 0.0;
  out[kCrossEntropy] = static_cast<float>(labelled ? -student_label_logprob : 0.0);
  out[kStudentLabelLogprob] = static_cast<float>(student_label_logprob);
  out[kTeacherLabelLogprob] = static_cast<float>(labelled ? teacher_label - teacher_max - teacher_log_sum : 0.0);
  out[kStudentLogprobOfStudentAction] = static_cast<float>(-student_log_sum);
  out[kStudentLogprobOfTeacherAction] =
      static_cast<float>(teacher_part.student_at_teacher_action - student_max - student_log_sum);
  out[kTeacherLogprobOfStudentAction] =
      static_cast<float>(student_part.teacher_at_student_action - teacher_max - teacher_log_sum);
  out[kTeacherLogprobOfTeacherAction] = static_cast<float>(-teacher_log_sum);
  out[kStudentEntropy] = static_cast<float>(student_log_sum - student_moment / student_sum);
  out[kTeacherEntropy] = static_cast<float>(teacher_log_sum - teacher_moment / teacher_sum);
  row.student_action = student_part.student_action;
  row.teacher_action = teacher_part.teacher_action;
  row.constants.student_max = static_cast<float>(student_max);
  row.constants.teacher_max = static_cast<float>(teacher_max);
  row.constants.teacher_at_student_action = student_part.teacher_at_student_action;
  row.constants.student_inverse_sum = static_cast<float>(1.0 / student_sum);
  row.constants.student_tempered_inverse_sum = static_cast<float>(1.0 / student_tempered);
  row.constants.teacher_tempered_inverse_sum = static_cast<float>(1.0 / teacher_tempered);
  row.constants.log_sum_difference = static_cast<float>(log_sum_difference);
  row.constants.reverse_centre = static_cast<float>(reverse_centre);
  return row;
}

}  // namespace vcrd
