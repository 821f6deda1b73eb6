// The Jensen-Shannon divergence with beta = 1/2, GKD's default, in two thirds of the instructions that other mixtures
// take: in the passes over both models memory then sets the pace, not arithmetic. Logarithms are to the base of 2.
#pragma once

#include <cuda_runtime.h>

#include "../elementwise.h"

namespace vcrd::cuda {

constexpr float kLog2E = 1.44269504f, kHalfLn2 = 0.346573590f;

// log2((1 + r) / 2) for r in [0, 1], relative error 1.1e-7 beside that of r: minimax in t = (1 - r) / 2, which is
// exact.
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

  // Twice the divergence's, in units of max(p, q).
  __device__ float term() const { return -((1.0f + smaller) * log_mixture + smaller * fabsf(log_ratio)); }
};

// A row of both models.
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

  // For distances: probabilities without their inverse sums, and the mixture. Of the ratio first the difference, which
  // is exact where it matters.
  __device__ float exponential(float distance) const { return exp2f(distance * scale); }
  __device__ EvenMixture at(float student, float teacher) const {
    return EvenMixture((student - teacher) * scale - log_sum_difference);
  }

  // The potential at the student's action.
  __device__ float anchor(const RowConstants& c) const {
    return at(0.0f, teacher(c.teacher_at_student_action)).potential();
  }
};

}  // namespace vcrd::cuda
