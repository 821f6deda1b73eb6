// Adds a teacher to a mixture of several.
#include "../dispatch.h"
#include "row.cuh"
#include "warp_group.cuh"

namespace vcrd::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) mix_kernel(MixParams p, Grid grid) {
  constexpr int kColumns = 16 / sizeof(T);
  const WarpGroup group(grid);
  if (!group.present) return;
  const T* row = static_cast<const T*>(p.teacher.data) + group.row * p.teacher.stride;
  float* mixture = p.mixture + group.row * p.columns;
  const float subtracted = p.subtracted[group.row] - shift_of(p.teacher, group.row);
  const Tiling tiling = tiling_at<T, kColumns>(row, static_cast<int>(p.columns));
  const Reader<T, kColumns> reader(row, tiling);
  int begin, end;
  group.range(tiling.vectors, grid.splits, &begin, &end);
  for (int vector = begin + group.thread; vector < end; vector += group.threads) {
    float share[kColumns];
    reader.any_vector(vector, 0.0f, share);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) share[i] -= subtracted;
    const int column = tiling.first_column(vector, kColumns);
    float* at = mixture + column;
    if (column >= 0 && column + kColumns <= tiling.columns && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 4) {
        char* four = reinterpret_cast<char*>(at + i);
        float sum[4];
        to_floats<float, 4>(p.first ? Words<4>{} : load_words<4>(four), sum);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = p.first ? share[i + j] : log_of_sum(sum[j], share[i + j]);
        store_words(four, bits_as<Words<4>>(sum));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (column + i >= 0 && column + i < tiling.columns) at[i] = p.first ? share[i] : log_of_sum(at[i], share[i]);
    }
  }
}

}  // namespace

const char* mix(const MixParams& p, Stream stream) {
  if (const char* error = too_large(p.columns)) return error;
  const Grid grid = grid_of(p.rows, p.columns, row_splits(p.rows, p.columns));
  return with_teacher<__nv_bfloat16, __half>(p.teacher.dtype, [&](auto t) {
    return launch(mix_kernel<decltype(t)>, grid.blocks(), kThreads, stream, p, grid);
  });
}

}  // namespace vcrd::cuda
