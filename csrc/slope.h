// The formulas of the divergences, for the CPU loops and the CUDA kernels alike: the value of each, and its slope,
// which is its derivative by one logit.
//
// p is the teacher's probability of a column, q the student's, both at temperature T. A divergence D has
// T dD / dlogit_j = q_j (G_j - sum_k q_k G_k), where the potential G = dD / dq. Where the student is sure of itself,
// the potential of its action and the mean of the potential agree to many digits. So G is always taken relative to its
// value at the student's action (the "anchor"), and the mean (the "centre") is summed up from these differences.
#pragma once

#include "elementwise.h"

namespace vcrd {

// What the slopes of one row need besides its logits.
struct RowGradient {
  RowConstants constants;
  float divergence_scale, cross_entropy_scale;
  float anchor, centre;
};

// The value of a divergence that follows from both KLs; 0 for the mixtures, whose values the second pass sums up.
VCRD_FUNCTION double value_of(Divergence divergence, double forward_kl, double reverse_kl) {
  return divergence == Divergence::kForwardKl   ? forward_kl
         : divergence == Divergence::kReverseKl ? reverse_kl
         : divergence == Divergence::kJeffreys  ? 0.5 * (forward_kl + reverse_kl)
                                                : 0.0;
}

// KL(p || q). Float is float, or a register of floats. The slope is linear in p and q, so both may be scaled; see
// ForwardKlScales.
template <class Float>
VCRD_FUNCTION Float forward_kl_slope(Float p, Float q) {
  return q - p;
}

// What turns the exponential of a distance into a probability times the scale of the gradient. At temperature 1 the
// student's factor includes the cross-entropy. At other temperatures `untempered` is the factor of the cross-entropy.
struct ForwardKlScales {
  float student, teacher, untempered;
};

VCRD_FUNCTION ForwardKlScales forward_kl_scales(const RowGradient& row, bool tempered) {
  const RowConstants& c = row.constants;
  const float student = row.divergence_scale * c.student_tempered_inverse_sum;
  const float teacher = row.divergence_scale * c.teacher_tempered_inverse_sum;
  const float untempered = row.cross_entropy_scale * c.student_inverse_sum;
  return {student + (tempered ? 0.0f : untempered), teacher, untempered};
}

// KL(q || p). `u` is the student's tempered distance; log(q/p) is taken relative to its value at the student's action.
VCRD_FUNCTION float reverse_kl_slope(float q, float u, float teacher_logit, const RowGradient& row,
                                     float inverse_temperature) {
  float potential = u - distance(teacher_logit, row.constants.teacher_at_student_action) * inverse_temperature;
  return q * (potential - row.centre);
}

// An infinite reverse KL has no gradient: the row's scale becomes 0, and its constants become finite so that its slopes
// do too. Returns the scale.
VCRD_FUNCTION float scale_of_finite(RowConstants& c, float scale) {
  if (c.reverse_centre != INFINITY) return scale;
  c.reverse_centre = 0.0f;
  c.teacher_at_student_action = c.teacher_max;
  return 0.0f;
}

// One column's term of a divergence against the mixture m = weight p + (1 - weight) q, and its potential.
struct MixtureElement {
  float term, potential;
};

// Computed from the ratio of the two probabilities, which keeps the digits that log p - log m loses where p is close to
// q. It uses only minima and maxima and returns its result by value: shared conditions, or a struct that is passed on,
// keep the compiler from vectorising the loops.
template <Divergence kDivergence>
VCRD_FUNCTION MixtureElement mixture_element(float p, float q, float log_q_minus_log_p, float weight) {
  static_assert(has_mixture(kDivergence));
  const float tiny = 1e-37f;  // keeps every result finite where both probabilities are 0
  float larger = p < q ? q : p;
  float divisor = larger < tiny ? tiny : larger;
  float teacher = divide(p, divisor), student = divide(q, divisor);
  float sum = weight * teacher + (1.0f - weight) * student;
  float mixture = sum < tiny ? tiny : sum;
  float log_mixture = logarithm(mixture);  // log(m / larger)
  // The minimum with 0, in the order that keeps a NaN, because logarithm() does not keep it.
  float log_student_ratio = (log_q_minus_log_p > 0.0f ? 0.0f : log_q_minus_log_p) - log_mixture;   // log(q/m)
  float log_teacher_ratio = (log_q_minus_log_p < 0.0f ? 0.0f : -log_q_minus_log_p) - log_mixture;  // log(p/m)
  if constexpr (kDivergence == Divergence::kJsd)  // weight KL(p || m) + (1 - weight) KL(q || m)
    return {weight * (p * log_teacher_ratio) + (1.0f - weight) * (q * log_student_ratio),
            (1.0f - weight) * log_student_ratio};
  if constexpr (kDivergence == Divergence::kSkewKl)  // KL(p || m)
    return {p * log_teacher_ratio, (weight - 1.0f) * divide(teacher, mixture)};
  if constexpr (kDivergence == Divergence::kSkewReverseKl)  // KL(q || m)
    return {q * log_student_ratio, log_student_ratio - (1.0f - weight) * divide(student, mixture)};
}

// The mixture's potential at the student's action, where u is 0.
template <Divergence kDivergence>
VCRD_FUNCTION float mixture_anchor(const RowConstants& c, float inverse_temperature, float weight) {
  float v = distance(c.teacher_at_student_action, c.teacher_max) * inverse_temperature;
  float p = exponential(v) * c.teacher_tempered_inverse_sum;
  float q = c.student_tempered_inverse_sum;
  return mixture_element<kDivergence>(p, q, 0.0f - v - c.log_sum_difference, weight).potential;
}

// T dD / dlogit of one column, from both probabilities and both tempered distances u and v.
template <Divergence kDivergence>
VCRD_FUNCTION float slope(float p, float q, float u, float v, float teacher_logit, const RowGradient& row,
                          float inverse_temperature, float mixture_weight) {
  if constexpr (kDivergence == Divergence::kForwardKl) {
    return forward_kl_slope(p, q);
  } else if constexpr (kDivergence == Divergence::kReverseKl) {
    return reverse_kl_slope(q, u, teacher_logit, row, inverse_temperature);
  } else if constexpr (kDivergence == Divergence::kJeffreys) {
    return 0.5f * (forward_kl_slope(p, q) + reverse_kl_slope(q, u, teacher_logit, row, inverse_temperature));
  } else {
    MixtureElement e = mixture_element<kDivergence>(p, q, u - v - row.constants.log_sum_difference, mixture_weight);
    return q * ((e.potential - row.anchor) - row.centre);
  }
}

// The row's constants and scales, for logits that are read without their shift.
template <Divergence kDivergence>
VCRD_FUNCTION RowGradient row_gradient(const GradientParams& p, int64_t row) {
  RowGradient g;
  g.constants = constants_of(p.constants, p.teacher, row);
  g.divergence_scale = p.divergence_gradient ? p.divergence_gradient[row] * p.inverse_temperature : 0.0f;
  g.cross_entropy_scale = p.cross_entropy_gradient ? p.cross_entropy_gradient[row] : 0.0f;
  if (!p.tokens.labels || p.tokens.labels[row] < 0) g.cross_entropy_scale = 0.0f;
  if constexpr (has_reverse(kDivergence)) g.divergence_scale = scale_of_finite(g.constants, g.divergence_scale);
  g.anchor = 0.0f;
  g.centre = g.constants.reverse_centre;
  if constexpr (has_mixture(kDivergence)) {
    g.anchor = mixture_anchor<kDivergence>(g.constants, p.inverse_temperature, p.mixture_weight);
    g.centre = p.sums[2 * row + 1];
  }
  return g;
}

}  // namespace vcrd
