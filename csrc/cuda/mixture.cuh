// The pass after the merge that only divergences against a mixture need: their value and the centre of their potential.
#pragma once

#include "../slope.h"
#include "even_mixture.cuh"
#include "row.cuh"
#include "warp_group.cuh"

namespace vcrd::cuda {

// Sums up the divergence and the centre of one row, batch by batch.
template <Divergence kDivergence, bool kEven>
class MixtureRow {
 public:
  __device__ MixtureRow(const MixtureParams& p, int64_t row)
      : c_(constants_of(p.constants, p.teacher, row)),
        it_(p.inverse_temperature),
        weight_(p.mixture_weight),
        anchor_(mixture_anchor<kDivergence>(c_, it_, weight_)) {}

  template <int kBatch>
  __device__ void add(const float (&s)[kBatch], const float (&t)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      // Where there is no column, both probabilities are 0, and so are their products.
      float u = distance(s[i], c_.student_max) * it_, v = distance(t[i], c_.teacher_max) * it_;
      float q = exponential(u) * c_.student_tempered_inverse_sum;
      float p = exponential(v) * c_.teacher_tempered_inverse_sum;
      MixtureElement e = mixture_element<kDivergence>(p, q, u - v - c_.log_sum_difference, weight_);
      divergence_ += e.term;
      centre_ += q * (e.potential - anchor_);
    }
  }

  __device__ float divergence() const { return divergence_; }
  __device__ float centre() const { return centre_; }

 private:
  const RowConstants c_;
  const float it_, weight_, anchor_;
  float divergence_ = 0, centre_ = 0;
};

template <>
class MixtureRow<Divergence::kJsd, true> {
 public:
  __device__ MixtureRow(const MixtureParams& p, int64_t row)
      : row_(constants_of(p.constants, p.teacher, row), p.inverse_temperature),
        anchor_(row_.anchor(constants_of(p.constants, p.teacher, row))) {}

  template <int kBatch>
  __device__ void add(const float (&s)[kBatch], const float (&t)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float u = row_.student(s[i]), v = row_.teacher(t[i]);
      const float q = row_.exponential(u) * row_.student_inverse_sum;
      const float p = row_.exponential(v) * row_.teacher_inverse_sum;
      const EvenMixture m = row_.at(u, v);
      divergence_ += fmaxf(p, q) * m.term();
      centre_ += q * (m.potential() - anchor_);
    }
  }

  __device__ float divergence() const { return divergence_ * kHalfLn2; }
  __device__ float centre() const { return centre_ * kHalfLn2; }

 private:
  const EvenMixtureRow row_;
  const float anchor_;
  float divergence_ = 0, centre_ = 0;
};

template <class S, class T, Divergence kDivergence, bool kEven>
__global__ void __launch_bounds__(kThreads, 3) mixture_sums_kernel(MixtureParams p, Grid grid) {
  using Pair = RowPair<S, T>;
  __shared__ float of_warps[2][kWarps];
  const WarpGroup group(grid);
  const bool read = group.present && !(p.tokens.mask && !p.tokens.mask[group.row]);
  float divergence = 0, centre = 0;
  if (read) {
    MixtureRow<kDivergence, kEven> row(p, group.row);
    const S* student = static_cast<const S*>(p.student.data) + group.row * p.student.stride;
    const T* teacher = static_cast<const T*>(p.teacher.data) + group.row * p.teacher.stride;
    const Tiling tiling = tiling_at<S, Pair::kColumns>(student, static_cast<int>(p.tokens.columns));
    const Pair pair(student, teacher, tiling);
    int begin, end;
    group.range(tiling.vectors, grid.splits, &begin, &end);
    for (int first = begin + group.thread; first < end; first += Pair::kVectors * group.threads) {
      float s[Pair::kBatch], t[Pair::kBatch];
      pair.read(first, group.threads, end, s, t);
      row.add(s, t);
    }
    divergence = row.divergence();
    centre = row.centre();
  }
  divergence = warp_sum(divergence);
  centre = warp_sum(centre);
  if (grid.warps_log2 > 0) {
    if (group.lane() == 0) of_warps[0][threadIdx.x / 32] = divergence, of_warps[1][threadIdx.x / 32] = centre;
    __syncthreads();
    if (group.thread != 0) return;
    for (int i = 1; i < grid.warps(); ++i) {
      divergence += of_warps[0][threadIdx.x / 32 + i];
      centre += of_warps[1][threadIdx.x / 32 + i];
    }
  }
  if (group.present && group.thread == 0) {
    float* sums = p.sums + 2 * (group.split * p.tokens.rows + group.row);
    sums[0] = divergence;
    sums[1] = centre;
  }
}

// Chooses the instance for one type of student; each type has a file of its own, to be compiled side by side.
template <class S>
const char* launch_mixture_sums(const MixtureParams& p, int64_t splits, cudaStream_t stream) {
  const Grid grid = grid_of(p.tokens.rows, p.tokens.columns, splits);
  return with_teacher<__nv_bfloat16, __half>(p.teacher.dtype, [&](auto teacher) {
    using T = decltype(teacher);  // here, because GCC takes the captured value of an inner lambda for a reference
    return with_form(p, [&](auto divergence, auto even) -> const char* {
      if constexpr (has_mixture(divergence.value)) {
        auto kernel = mixture_sums_kernel<S, T, divergence.value, even.value>;
        return launch(kernel, grid.blocks(), kThreads, stream, p, grid);
      }
      return "this divergence has no mixture";
    });
  });
}

}  // namespace vcrd::cuda
