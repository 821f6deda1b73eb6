// The passes after the merge: sums of the mixture divergences, and the gradient. Part of loops.h.
#pragma once

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
      const float anchor = mixture_anchor<kDivergence>(c, p.inverse_temperature, p.teacher_share);
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
              mixture_element<kDivergence>(teacher, student, u - v - c.log_sum_difference, p.teacher_share);
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

// What one row's gradient needs besides its logits. `centre` and `anchor`: see MixtureElement.
struct RowGradient {
  RowConstants constants;
  float inverse_temperature, teacher_share;
  float anchor, centre;
  float divergence_scale, cross_entropy_scale;
};

// Each writes divergence_scale * slope + cross_entropy_scale * q at temperature 1; the label is the caller's.
// The plain case, apart because it is the common one: no logarithm, the scales fold into the normalisers, and the
// logits are read and the gradient written without a buffer in between.
template <bool kTempered>
struct ForwardKlGradient {
  float student_max, teacher_max, inverse_temperature, student_scale, teacher_scale, untempered_scale;

  explicit ForwardKlGradient(const RowGradient& row)
      : student_max(row.constants.student_max),
        teacher_max(row.constants.teacher_max),
        inverse_temperature(row.inverse_temperature),
        student_scale(row.divergence_scale * row.constants.student_tempered_inverse_sum),
        teacher_scale(row.divergence_scale * row.constants.teacher_tempered_inverse_sum),
        untempered_scale(row.cross_entropy_scale * row.constants.student_inverse_sum) {
    if (!kTempered) student_scale += untempered_scale;
  }

  VCRD_LANES Floats operator()(Floats s, Floats t) const {
    Floats u = s - student_max, v = t - teacher_max;
    if constexpr (!kTempered) return exponentials(u) * student_scale - exponentials(v) * teacher_scale;
    Floats slope =
        exponentials(u * inverse_temperature) * student_scale - exponentials(v * inverse_temperature) * teacher_scale;
    return slope + exponentials(u) * untempered_scale;
  }
};

template <Divergence kDivergence, bool kTempered>
void gradient_block(const float* s, const float* t, int64_t n, const RowGradient& row, float* out) {
  const RowConstants c = row.constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float distance_u = distance(s[i], c.student_max), distance_v = distance(t[i], c.teacher_max);
    float u = kTempered ? distance_u * row.inverse_temperature : distance_u;
    float v = kTempered ? distance_v * row.inverse_temperature : distance_v;
    float q = exponential(u) * c.student_tempered_inverse_sum;
    float slope;
    if constexpr (kDivergence == Divergence::kReverseKl) {
      slope = q * (reverse_potential(u, t[i], c, row.inverse_temperature) - row.centre);
    } else {
      float p = exponential(v) * c.teacher_tempered_inverse_sum;
      if constexpr (kDivergence == Divergence::kJeffreys) {
        slope = 0.5f * ((q - p) + q * (reverse_potential(u, t[i], c, row.inverse_temperature) - row.centre));
      } else {
        MixtureElement e = mixture_element<kDivergence>(p, q, u - v - c.log_sum_difference, row.teacher_share);
        slope = q * ((e.potential - row.anchor) - row.centre);
      }
    }
    float untempered = kTempered ? exponential(distance_u) * c.student_inverse_sum : q;
    out[i] = row.divergence_scale * slope + row.cross_entropy_scale * untempered;
  }
}

template <class S, class T, bool kTempered>
void forward_kl_gradient_row(const S* s, const T* t, int64_t n, const RowGradient& row, int64_t label, S* out) {
  constexpr bool kHalves = kInHalves<S, T>;
  const ForwardKlGradient<kTempered> gradient(row);
  auto write_pair = [&](auto* student, auto* teacher, S* to) __attribute__((always_inline)) {
    Pair x = load_pair<kHalves>(student), y = load_pair<kHalves>(teacher);
    store_pair<kHalves>({gradient(x.first, y.first), gradient(x.second, y.second)}, to);
  };
  // The label's element before its logit may be overwritten.
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

// The other divergences, block by block. `out` is where the logits lie or elsewhere: the buffer between them keeps the
// compiler from fearing that writing one column changes the next.
template <class S, class T, Divergence kDivergence, bool kTempered>
void gradient_row(const S* student, const T* teacher, int64_t columns, const RowGradient& row, int64_t label, S* out) {
  alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock], gradient_buffer[kBlock];
  for (int64_t block = 0; block < columns; block += kBlock) {
    int64_t n = columns - block < kBlock ? columns - block : kBlock;
    const float* s = widen(student + block, student_buffer, n);
    const float* t = widen(teacher + block, teacher_buffer, n);
    gradient_block<kDivergence, kTempered>(s, t, n, row, gradient_buffer);
    if (label >= block && label < block + n) gradient_buffer[label - block] -= row.cross_entropy_scale;
    narrow(gradient_buffer, out + block, n);
  }
}

template <class S, class T, Divergence kDivergence, bool kTempered>
void gradient(const GradientParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    S* out = static_cast<S*>(p.gradient) + row * p.gradient_stride;
    float divergence_scale = p.divergence_gradient ? p.divergence_gradient[row] * p.inverse_temperature : 0.0f;
    float cross_entropy_scale = p.cross_entropy_gradient ? p.cross_entropy_gradient[row] : 0.0f;
    int64_t label = p.tokens.labels ? p.tokens.labels[row] : -1;
    if (label < 0) cross_entropy_scale = 0.0f;
    RowConstants constants = constants_of(p.constants, p.teacher, row);
    if constexpr (kHasReverse<kDivergence>) divergence_scale = scale_of_finite(constants, divergence_scale);
    if (masked(p.tokens.mask, row) || (divergence_scale == 0.0f && cross_entropy_scale == 0.0f)) {
      memset(static_cast<void*>(out), 0, p.gradient_columns * sizeof(S));
      continue;
    }
    RowGradient g{constants,        p.inverse_temperature, p.teacher_share, 0.0f, constants.reverse_centre,
                  divergence_scale, cross_entropy_scale};
    if constexpr (kDivergence >= Divergence::kJsd) {
      g.anchor = mixture_anchor<kDivergence>(g.constants, p.inverse_temperature, p.teacher_share);
      g.centre = p.sums[2 * row + 1];
    }
    label -= p.tokens.first_column;
    const S* s = row_of<S>(p.student, row);
    const T* t = row_of<T>(p.teacher, row);
    if constexpr (kDivergence == Divergence::kForwardKl)
      forward_kl_gradient_row<S, T, kTempered>(s, t, p.tokens.columns, g, label, out);
    else
      gradient_row<S, T, kDivergence, kTempered>(s, t, p.tokens.columns, g, label, out);
    memset(static_cast<void*>(out + p.tokens.columns), 0, (p.gradient_columns - p.tokens.columns) * sizeof(S));
  }
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
