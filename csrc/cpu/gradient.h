// The passes after the merge: sums of the mixture divergences, and the gradient. Part of loops.h.
#pragma once

#include "../slope.h"
#include "lanes.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

template <class S, class T, Divergence kDivergence>
void mixture_sums(const MixtureParams& p, int64_t begin, int64_t end) {
  alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    double divergence = 0, centre = 0;
    if (!masked(p.tokens.mask, row)) {
      const RowConstants c = constants_of(p.constants, p.teacher, row);
      const float anchor = mixture_anchor<kDivergence>(c, p.inverse_temperature, p.mixture_weight);
      for (int64_t block = 0; block < p.tokens.columns; block += kBlock) {
        int64_t n = p.tokens.columns - block < kBlock ? p.tokens.columns - block : kBlock;
        const float* s = widen(row_of<S>(p.student, row) + block, student_buffer, n);
        const float* t = widen(row_of<T>(p.teacher, row) + block, teacher_buffer, n);
        float block_divergence = 0, block_centre = 0;
#pragma omp simd reduction(+ : block_divergence, block_centre)
        for (int64_t i = 0; i < n; ++i) {
          float u = distance(s[i], c.student_max) * p.inverse_temperature;
          float v = distance(t[i], c.teacher_max) * p.inverse_temperature;
          float student = exponential(u) * c.student_tempered_inverse_sum;
          float teacher = exponential(v) * c.teacher_tempered_inverse_sum;
          MixtureElement e =
              mixture_element<kDivergence>(teacher, student, u - v - c.log_sum_difference, p.mixture_weight);
          block_divergence += e.term;
          block_centre += student * (e.potential - anchor);
        }
        divergence += block_divergence;
        centre += block_centre;
      }
    }
    p.sums[2 * row] = static_cast<float>(divergence);
    p.sums[2 * row + 1] = static_cast<float>(centre);
  }
}

// Both ways write divergence_scale * slope + cross_entropy_scale * q, with q at temperature 1, and subtract the label's
// part afterwards. Forward KL has a separate path because it is the common case: it needs no logarithm, and the
// logits are read and the gradient written without a buffer in between.
template <bool kTempered>
struct ForwardKlGradient {
  float student_max, teacher_max, inverse_temperature;
  ForwardKlScales scales;

  ForwardKlGradient(const RowGradient& row, float inverse_temperature)
      : student_max(row.constants.student_max),
        teacher_max(row.constants.teacher_max),
        inverse_temperature(inverse_temperature),
        scales(forward_kl_scales(row, kTempered)) {}

  VCRD_LANES Floats operator()(Floats s, Floats t) const {
    Floats u = s - student_max, v = t - teacher_max;
    Floats q = exponentials(kTempered ? u * inverse_temperature : u) * scales.student;
    Floats p = exponentials(kTempered ? v * inverse_temperature : v) * scales.teacher;
    Floats slope = forward_kl_slope(p, q);
    if constexpr (kTempered) slope += exponentials(u) * scales.untempered;
    return slope;
  }
};

template <Divergence kDivergence, bool kTempered>
void gradient_block(const float* s, const float* t, int64_t n, const RowGradient& row, float inverse_temperature,
                    float mixture_weight, float* out) {
  const RowConstants c = row.constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float distance_u = distance(s[i], c.student_max), distance_v = distance(t[i], c.teacher_max);
    float u = kTempered ? distance_u * inverse_temperature : distance_u;
    float v = kTempered ? distance_v * inverse_temperature : distance_v;
    float q = exponential(u) * c.student_tempered_inverse_sum;
    float p = exponential(v) * c.teacher_tempered_inverse_sum;
    float of_divergence = slope<kDivergence>(p, q, u, v, t[i], row, inverse_temperature, mixture_weight);
    float untempered = kTempered ? exponential(distance_u) * c.student_inverse_sum : q;
    out[i] = row.divergence_scale * of_divergence + row.cross_entropy_scale * untempered;
  }
}

template <class S, class T, bool kTempered>
void forward_kl_gradient_row(const S* s, const T* t, int64_t n, const RowGradient& row, float inverse_temperature,
                             int64_t label, S* out) {
  constexpr bool kHalves = kInHalves<S, T>;
  const ForwardKlGradient<kTempered> gradient(row, inverse_temperature);
  auto write_pair = [&](auto* student, auto* teacher, S* to) __attribute__((always_inline)) {
    Pair x = load_pair<kHalves>(student), y = load_pair<kHalves>(teacher);
    store_pair<kHalves>({gradient(x.first, y.first), gradient(x.second, y.second)}, to);
  };
  // Computes the label's element before its logit may be overwritten.
  S at_label[2 * kLanes];
  if (label >= 0 && label < n) {
    Floats slope = gradient(all_lanes(widened(s, label)), all_lanes(widened(t, label)));
    store(slope - row.cross_entropy_scale, at_label);
  }
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    prefetch_ahead(s + i);
    prefetch_ahead(t + i);
    write_pair(s + i, t + i, out + i);
  }
  if (i < n) {
    S last[2 * kLanes];
    write_pair(Padded<S>(s + i, n - i).columns, Padded<T>(t + i, n - i).columns, last);
    memcpy(static_cast<void*>(out + i), last, (n - i) * sizeof(S));
  }
  if (label >= 0 && label < n) out[label] = at_label[0];
}

// The other divergences, block by block. `out` may be the memory of the logits. Because of the buffer between them, the
// compiler need not assume that writing one column changes the next.
template <class S, class T, Divergence kDivergence, bool kTempered>
void gradient_row(const S* student, const T* teacher, const GradientParams& p, const RowGradient& row, int64_t label,
                  S* out) {
  alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock], gradient_buffer[kBlock];
  for (int64_t block = 0; block < p.tokens.columns; block += kBlock) {
    int64_t n = p.tokens.columns - block < kBlock ? p.tokens.columns - block : kBlock;
    const float* s = widen(student + block, student_buffer, n);
    const float* t = widen(teacher + block, teacher_buffer, n);
    gradient_block<kDivergence, kTempered>(s, t, n, row, p.inverse_temperature, p.mixture_weight, gradient_buffer);
    if (label >= block && label < block + n) gradient_buffer[label - block] -= row.cross_entropy_scale;
    narrow(gradient_buffer, out + block, n);
  }
}

template <class S, class T, Divergence kDivergence, bool kTempered>
void gradient(const GradientParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    S* out = static_cast<S*>(p.gradient) + row * p.gradient_stride;
    RowGradient g = {};
    if (!masked(p.tokens.mask, row)) g = row_gradient<kDivergence>(p, row);
    if (g.divergence_scale == 0.0f && g.cross_entropy_scale == 0.0f) {
      memset(static_cast<void*>(out), 0, p.gradient_columns * sizeof(S));
      continue;
    }
    const int64_t label = p.tokens.labels ? p.tokens.labels[row] - p.tokens.first_column : -1;
    const S* s = row_of<S>(p.student, row);
    const T* t = row_of<T>(p.teacher, row);
    if constexpr (kDivergence == Divergence::kForwardKl)
      forward_kl_gradient_row<S, T, kTempered>(s, t, p.tokens.columns, g, p.inverse_temperature, label, out);
    else
      gradient_row<S, T, kDivergence, kTempered>(s, t, p, g, label, out);
    memset(static_cast<void*>(out + p.tokens.columns), 0, (p.gradient_columns - p.tokens.columns) * sizeof(S));
  }
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
