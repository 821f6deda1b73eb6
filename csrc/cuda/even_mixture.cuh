// The Jensen-Shannon divergence with beta = 1/2, which is the default of GKD. This form takes two thirds of the
// instructions of the general one, so that memory limits the speed of the passes, not arithmetic. Logarithms are to the
// base of 2.
#pragma once

#include <cuda_runtime.h>

#include "../dispatch.h"

namespace vcrd::cuda {

constexpr float kLog2E = 1.44269504f, kHalfLn2 = 0.346573590f;

// log2((1 + r) / 2) for r in [0, 1]. It adds a relative error of 1.1e-7 to that of r. The polynomial is the minimax one
// in t = (1 - r) / 2, which is computed exactly.
__device__ __forceinline__ float log2_of_even_mixture(float r) {
  const float t = 0.5f - 0.5f * r;
  float p = 2.561705828f;
  p = p * t - 3.682665110f;
  p = p * t + 2.952837467f;
  p = p * t - 9.139248133e-1f;
  p = p * t + 5.097876787e-1f;
  p = p * t + 2.500079572e-1f;
  p = p * t + 3.637926579e-1f;
  p = p * t + 4.807714820e-1f;
  p = p * t + 7.213494778e-1f;
  p = p * t + 1.442695022f;
  return -t * p;
}

// m / max(p, q) is (1 + r) / 2 with r = 2^-|log2(q/p)|, so that no quotient is needed.
struct EvenMixture {
  float log_ratio;    // log2(q/p)
  float log_mixture;  // log2(m / max(p, q))
  float smaller;      // min(p, q) / max(p, q)

  __device__ explicit EvenMixture(float log2_q_minus_log2_p)
      : log_ratio(log2_q_minus_log2_p), smaller(exp2f(-fabsf(log2_q_minus_log2_p))) {
    log_mixture = log2_of_even_mixture(smaller);
  }

  // log2(q/m), twice the potential.
  __device__ float potential() const { return fminf(log_ratio, 0.0f) - log_mixture; }

  // Twice this column's term of the divergence, in units of max(p, q).
  __device__ float term() const { return -((1.0f + smaller) * log_mixture + smaller * fabsf(log_ratio)); }
};

// The constants of a row.
struct EvenMixtureRow {
  float student_max, teacher_max, student_inverse_sum, teacher_inverse_sum;
  float scale, log_sum_difference;

  __device__ EvenMixtureRow(const RowConstants& c, float inverse_temperature)
      : student_max(c.student_max),
        teacher_max(c.teacher_max),
        student_inverse_sum(c.student_tempered_inverse_sum),
        teacher_inverse_sum(c.teacher_tempered_inverse_sum),
        scale(inverse_temperature * kLog2E),
        log_sum_difference(c.log_sum_difference * kLog2E) {}

  __device__ float student(float logit) const { return distance(logit, student_max); }
  __device__ float teacher(float logit) const { return distance(logit, teacher_max); }

  // Both take distances. `exponential` is a probability without its normaliser. `at` subtracts the distances before it
  // scales them: where the models are close, the difference is exact.
  __device__ float exponential(float distance) const { return exp2f(distance * scale); }
  __device__ EvenMixture at(float student, float teacher) const {
    return EvenMixture((student - teacher) * scale - log_sum_difference);
  }

  // The potential at the student's action.
  __device__ float anchor(const RowConstants& c) const {
    return at(0.0f, teacher(c.teacher_at_student_action)).potential();
  }
};

// Calls f with the divergence and with whether it takes the form of this file. Params: MixtureParams or GradientParams.
template <class Params, class F>
const char* with_form(const Params& p, F f) {
  if (p.divergence == Divergence::kJsd && p.mixture_weight == 0.5f)
    return f(std::integral_constant<Divergence, Divergence::kJsd>{}, std::true_type{});
  return with_divergence(p.divergence, [&](auto divergence) { return f(divergence, std::false_type{}); });
}

}  // namespace vcrd::cuda
