// Backward. Reads both rows once and writes the gradient of divergence and cross-entropy once, possibly over the
// student's logits.
#pragma once

#include "../slope.h"
#include "even_mixture.cuh"
#include "row.cuh"
#include "warp_group.cuh"

namespace vcrd::cuda {

template <Divergence kDivergence, bool kEven>
__device__ __forceinline__ RowGradient row_gradient_of(const GradientParams& p, int64_t row) {
  RowGradient g = row_gradient<kDivergence>(p, row);
  if constexpr (kEven) g.anchor = EvenMixtureRow(g.constants, p.inverse_temperature).anchor(g.constants);
  return g;
}

// x[i] = divergence_scale * slope(i) + cross_entropy_scale * q(i), with q at temperature 1. The caller subtracts the
// label's part.
template <Divergence kDivergence, bool kEven, int kBatch>
__device__ __forceinline__ void gradient_of(const GradientParams& p, const RowGradient& g, const float (&s)[kBatch],
                                            const float (&t)[kBatch], float (&x)[kBatch]) {
  const RowConstants& c = g.constants;
  const float it = p.inverse_temperature;
  const bool tempered = it != 1.0f;
  const ForwardKlScales scales = forward_kl_scales(g, tempered);
  if constexpr (kDivergence == Divergence::kForwardKl) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float student = exponential((s[i] - c.student_max) * it) * scales.student;
      x[i] = forward_kl_slope(exponential((t[i] - c.teacher_max) * it) * scales.teacher, student);
    }
  } else if constexpr (kEven) {
    const EvenMixtureRow row(c, it);
    const float scale = g.divergence_scale * c.student_tempered_inverse_sum * kHalfLn2;
    const float centre = g.centre / kHalfLn2, student_scale = tempered ? 0.0f : scales.untempered;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float u = row.student(s[i]), v = row.teacher(t[i]);
      const float slope = (row.at(u, v).potential() - g.anchor) - centre;
      x[i] = row.exponential(u) * (scale * slope + student_scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float u = distance(s[i], c.student_max) * it;
      const float q = exponential(u) * c.student_tempered_inverse_sum;
      const float v = distance(t[i], c.teacher_max) * it;
      const float p_teacher = exponential(v) * c.teacher_tempered_inverse_sum;
      x[i] = g.divergence_scale * slope<kDivergence>(p_teacher, q, u, v, t[i], g, it, p.mixture_weight) +
             (tempered ? 0.0f : g.cross_entropy_scale * q);
    }
  }
  if (tempered && g.cross_entropy_scale != 0.0f) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[i] += exponential(s[i] - c.student_max) * scales.untempered;
  }
}

// Writes the vectors first, first + stride, ... below `end`.
template <class S, class Pair>
__device__ __forceinline__ void write(S* out, const Tiling& tiling, int first, int stride, int end,
                                      const float (&x)[Pair::kBatch]) {
  constexpr int kColumns = Pair::kColumns, kWords = kColumns * sizeof(S) / 4;
#pragma unroll
  for (int i = 0; i < Pair::kVectors; ++i) {
    const int vector = first + i * stride, column = tiling.first_column(vector, kColumns);
    if (vector >= end) break;
    const Words<kWords> words = to_words<S, kWords>(x + i * kColumns);
    if (column >= 0 && column + kColumns <= tiling.columns) {
      store_words<kWords>(reinterpret_cast<char*>(out + column), words);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (column + j >= 0 && column + j < tiling.columns) out[column + j] = narrowed<S>(x[i * kColumns + j]);
    }
  }
}

template <class S, class T, Divergence kDivergence, bool kEven>
__global__ void __launch_bounds__(kThreads, 3) gradient_kernel(GradientParams p, Grid grid) {
  using Pair = RowPair<S, T>;
  const WarpGroup group(grid);
  if (!group.present) return;
  S* out = static_cast<S*>(p.gradient) + group.row * p.gradient_stride;
  // The tiling is aligned with the gradient and covers its padding too. The rows that are read end before the padding.
  const Tiling written = tiling_at<S, Pair::kColumns>(out, static_cast<int>(p.gradient_columns));
  int begin, end;
  group.range(written.vectors, grid.splits, &begin, &end);
  const int stride = group.threads;
  float x[Pair::kBatch];
  const bool masked = p.tokens.mask && !p.tokens.mask[group.row];
  RowGradient g = {};
  if (!masked) g = row_gradient_of<kDivergence, kEven>(p, group.row);
  if (g.divergence_scale == 0.0f && g.cross_entropy_scale == 0.0f) {
#pragma unroll
    for (int i = 0; i < Pair::kBatch; ++i) x[i] = 0.0f;
    for (int first = begin + group.thread; first < end; first += Pair::kVectors * stride)
      write<S, Pair>(out, written, first, stride, end, x);
    return;
  }
  const int columns = static_cast<int>(p.tokens.columns);
  const Tiling tiling = {columns, written.misalignment, written.vectors};
  const Pair pair(static_cast<const S*>(p.student.data) + group.row * p.student.stride,
                  static_cast<const T*>(p.teacher.data) + group.row * p.teacher.stride, tiling);
  int64_t label = g.cross_entropy_scale != 0.0f ? p.tokens.labels[group.row] - p.tokens.first_column : -1;
  const int label_column = label >= 0 && label < columns ? static_cast<int>(label) : -1 - Pair::kColumns;
  for (int first = begin + group.thread; first < end; first += Pair::kVectors * stride) {
    float s[Pair::kBatch], t[Pair::kBatch];
    const bool whole = pair.read(first, stride, end, s, t);
    gradient_of<kDivergence, kEven>(p, g, s, t, x);
#pragma unroll
    for (int i = 0; i < Pair::kVectors; ++i) {
      const int column = tiling.first_column(first + i * stride, Pair::kColumns);
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
  return with_teacher<__nv_bfloat16, __half>(p.teacher.dtype, [&](auto teacher) {
    using T = decltype(teacher);
    return with_form(p, [&](auto divergence, auto even) {
      auto kernel = gradient_kernel<S, T, divergence.value, even.value>;
      return launch(kernel, grid.blocks(), kThreads, stream, p, grid);
    });
  });
}

}  // namespace vcrd::cuda
