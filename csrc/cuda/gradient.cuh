// Backward: both rows read once, the gradient of divergence and cross-entropy written once, perhaps over the student's.
#pragma once

#include "even_mixture.cuh"
#include "group.cuh"
#include "instances.cuh"

namespace vcrd::cuda {

// What one row's gradient needs besides its logits.
struct RowGradient {
  RowConstants constants;
  float divergence_scale, cross_entropy_scale;
  float anchor, centre;  // of the mixtures' potential; see mixture_element
};

template <Divergence kDivergence>
__device__ __forceinline__ RowGradient row_gradient(const GradientParams& p, int64_t row) {
  RowGradient g;
  g.constants = constants_of(p.constants, p.teacher, row);
  g.divergence_scale = p.divergence_gradient ? p.divergence_gradient[row] * p.inverse_temperature : 0.0f;
  g.cross_entropy_scale = p.cross_entropy_gradient ? p.cross_entropy_gradient[row] : 0.0f;
  if (!p.tokens.labels || p.tokens.labels[row] < 0) g.cross_entropy_scale = 0.0f;
  if constexpr (kHasReverse<kDivergence>) g.divergence_scale = scale_of_finite(g.constants, g.divergence_scale);
  g.anchor = 0.0f;
  g.centre = g.constants.reverse_centre;
  if constexpr (kDivergence >= Divergence::kJsd) {
    if constexpr (kDivergence == Divergence::kEvenJsd)
      g.anchor = EvenMixtureRow(g.constants, p.inverse_temperature).anchor(g.constants);
    else
      g.anchor = mixture_anchor<kDivergence>(g.constants, p.inverse_temperature, p.teacher_share);
    g.centre = p.sums[2 * row + 1];
  }
  return g;
}

// x[i] = divergence_scale * slope(i) + cross_entropy_scale * q(i) at temperature 1; the label is the caller's.
template <Divergence kDivergence, int kBatch>
__device__ __forceinline__ void gradient_of(const GradientParams& p, const RowGradient& g, const float (&s)[kBatch],
                                            const float (&t)[kBatch], float (&x)[kBatch]) {
  const RowConstants& c = g.constants;
  const float it = p.inverse_temperature;
  const bool tempered = it != 1.0f;
  const float untempered_scale = g.cross_entropy_scale * c.student_inverse_sum;
  if constexpr (kDivergence == Divergence::kForwardKl) {
    // The scales fold into the normalisers.
    const float teacher_scale = g.divergence_scale * c.teacher_tempered_inverse_sum;
    const float student_scale = g.divergence_scale * c.student_tempered_inverse_sum + (tempered ? 0 : untempered_scale);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      x[i] = exponential((s[i] - c.student_max) * it) * student_scale -
             exponential((t[i] - c.teacher_max) * it) * teacher_scale;
  } else if constexpr (kDivergence == Divergence::kEvenJsd) {
    const EvenMixtureRow row(c, it);
    const float scale = g.divergence_scale * c.student_tempered_inverse_sum * kHalfLn2;
    const float centre = g.centre / kHalfLn2, student_scale = tempered ? 0.0f : untempered_scale;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float u = row.student(s[i]), v = row.teacher(t[i]);
      const float slope = (row.at(u, v).potential() - g.anchor) - centre;
      x[i] = row.exponential(u) * (scale * slope + student_scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float u = distance(s[i], c.student_max) * it;
      float q = exponential(u) * c.student_tempered_inverse_sum;
      float slope;
      if constexpr (kDivergence == Divergence::kReverseKl) {
        slope = q * (reverse_potential(u, t[i], c, it) - g.centre);
      } else {
        float v = distance(t[i], c.teacher_max) * it;
        float p_teacher = exponential(v) * c.teacher_tempered_inverse_sum;
        if constexpr (kDivergence == Divergence::kJeffreys) {
          slope = 0.5f * ((q - p_teacher) + q * (reverse_potential(u, t[i], c, it) - g.centre));
        } else {
          MixtureElement e = mixture_element<kDivergence>(p_teacher, q, u - v - c.log_sum_difference, p.teacher_share);
          slope = q * ((e.potential - g.anchor) - g.centre);
        }
      }
      x[i] = g.divergence_scale * slope + (tempered ? 0.0f : g.cross_entropy_scale * q);
    }
  }
  if (tempered && g.cross_entropy_scale != 0.0f) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[i] += exponential(s[i] - c.student_max) * untempered_scale;
  }
}

// Packs first, first + stride, ... below `end`.
template <class S, class Pair>
__device__ __forceinline__ void write(S* out, const Cut& cut, int first, int stride, int end,
                                      const float (&x)[Pair::kBatch]) {
  constexpr int kColumns = Pair::kColumns, kWords = kColumns * sizeof(S) / 4;
#pragma unroll
  for (int i = 0; i < Pair::kPacks; ++i) {
    const int pack_index = first + i * stride, column = cut.first_column(pack_index, kColumns);
    if (pack_index >= end) break;
    const Words<kWords> words = pack<S, kWords>(x + i * kColumns);
    if (column >= 0 && column + kColumns <= cut.columns) {
      store_words<kWords>(reinterpret_cast<char*>(out + column), words);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (column + j >= 0 && column + j < cut.columns) out[column + j] = narrowed<S>(x[i * kColumns + j]);
    }
  }
}

template <class S, class T, Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(GradientParams p, Grid grid) {
  using Pair = RowPair<S, T>;
  const Group group(grid);
  if (!group.present) return;
  S* out = static_cast<S*>(p.gradient) + group.row * p.gradient_stride;
  // Packs are cut where the gradient is aligned, and cover its padding too; the rows that are read end before it.
  const Cut written = cut_at<S, Pair::kColumns>(out, static_cast<int>(p.gradient_columns));
  int begin, end;
  group.share(written.packs, grid.splits, &begin, &end);
  const int stride = group.threads;
  float x[Pair::kBatch];
  const bool masked = p.tokens.mask && !p.tokens.mask[group.row];
  RowGradient g = {};
  if (!masked) g = row_gradient<kDivergence>(p, group.row);
  if (g.divergence_scale == 0.0f && g.cross_entropy_scale == 0.0f) {
#pragma unroll
    for (int i = 0; i < Pair::kBatch; ++i) x[i] = 0.0f;
    for (int first = begin + group.thread; first < end; first += Pair::kPacks * stride)
      write<S, Pair>(out, written, first, stride, end, x);
    return;
  }
  const int columns = static_cast<int>(p.tokens.columns);
  const Cut cut = {columns, written.lead, written.packs};
  const Pair pair(static_cast<const S*>(p.student.data) + group.row * p.student.stride,
                  static_cast<const T*>(p.teacher.data) + group.row * p.teacher.stride, cut);
  int64_t label = g.cross_entropy_scale != 0.0f ? p.tokens.labels[group.row] - p.tokens.first_column : -1;
  const int label_column = label >= 0 && label < columns ? static_cast<int>(label) : -1 - Pair::kColumns;
  for (int first = begin + group.thread; first < end; first += Pair::kPacks * stride) {
    float s[Pair::kBatch], t[Pair::kBatch];
    const bool whole = pair.read(first, stride, end, s, t);
    gradient_of<kDivergence>(p, g, s, t, x);
#pragma unroll
    for (int i = 0; i < Pair::kPacks; ++i) {
      const int column = cut.first_column(first + i * stride, Pair::kColumns);
      if (label_column >= column && label_column < column + Pair::kColumns) {
#pragma unroll
        for (int j = 0; j < Pair::kColumns; ++j)
          x[i * Pair::kColumns + j] -= column + j == label_column ? g.cross_entropy_scale : 0.0f;
      }
      if (!whole) {
#pragma unroll
        for (int j = 0; j < Pair::kColumns; ++j)
          if (column + j < 0 || column + j >= columns) x[i * Pair::kColumns + j] = 0.0f;
      }
    }
    write<S, Pair>(out, written, first, stride, end, x);
  }
}

// Chooses the instance for one type of student; each type has a file of its own, to be compiled side by side.
template <class S>
const char* launch_gradient(const GradientParams& p, cudaStream_t stream) {
  const Grid grid = grid_of(p.tokens.rows, p.gradient_columns, row_splits(p.tokens.rows, p.gradient_columns));
  return with_teacher(p.teacher.dtype, [&](auto teacher) {
    using T = decltype(teacher);
    return with_divergence(p, [&](auto divergence) {
      return launch(gradient_kernel<S, T, decltype(divergence)::value>, grid.blocks(), kThreads, stream, p, grid);
    });
  });
}

}  // namespace vcrd::cuda
