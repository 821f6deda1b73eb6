// Between the passes: merges the partials of a row and computes the row's statistics. One thread per row.
#include "../merge.h"

#include "../kernels.h"
#include "warp_group.cuh"

namespace vcrd::cuda {
namespace {

constexpr int kRowThreads = 64;  // few, so that even some thousand rows keep every multiprocessor busy
// The launch bounds ask for eight blocks per multiprocessor because the compiler spills registers without such a
// number.

__global__ void __launch_bounds__(kRowThreads, 8) combine_partials_kernel(CombineParams p) {
  int64_t row = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= p.rows) return;
  bool masked = p.mask && !p.mask[row];
  p.out[row] =
      masked ? RowPartial{} : partial_of(add_partials(p.partials + row, p.splits, p.rows, p.inverse_temperature));
}

__global__ void __launch_bounds__(kRowThreads, 8) merge_statistics_kernel(MergeParams p) {
  int64_t row = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= p.rows) return;
  MergedRow merged = {};
  if (!p.mask || p.mask[row])
    merged = merge_row(p.partials + row, p.shards, p.rows, p.labels && p.labels[row] >= 0, p.inverse_temperature,
                       p.divergence);
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) p.statistics[i * p.rows + row] = merged.statistics[i];
  p.actions[row] = merged.student_action;
  p.actions[p.rows + row] = merged.teacher_action;
  p.constants[row] = merged.constants;
}

int64_t blocks_of(int64_t rows) { return (rows + kRowThreads - 1) / kRowThreads; }

}  // namespace

const char* combine_partials(const CombineParams& p, Stream stream) {
  return launch(combine_partials_kernel, blocks_of(p.rows), kRowThreads, stream, p);
}

const char* merge_statistics(const MergeParams& p, Stream stream) {
  return launch(merge_statistics_kernel, blocks_of(p.rows), kRowThreads, stream, p);
}

}  // namespace vcrd::cuda
