// Encodes logits as distances below the row's maximum, in 16 or 8 bits. The teacher sends these codes.
#include "../dispatch.h"
#include "row.cuh"
#include "warp_group.cuh"

namespace vcrd::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads) row_maxima_kernel(MaximumParams p, Grid grid) {
  constexpr int kColumns = 16 / sizeof(S);
  __shared__ float of_warps[kWarps];
  const WarpGroup group(grid);
  float maximum = -INFINITY;
  if (group.present) {
    const S* row = static_cast<const S*>(p.logits.data) + group.row * p.logits.stride;
    const Tiling tiling = tiling_at<S, kColumns>(row, static_cast<int>(p.columns));
    const Reader<S, kColumns> reader(row, tiling);
#pragma unroll 4
    for (int vector = group.thread; vector < tiling.vectors; vector += group.threads) {
      float x[kColumns];
      reader.any_vector(vector, -INFINITY, x);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) maximum = fmaxf(maximum, x[i]);
    }
  }
  maximum = warp_max(maximum);
  if (grid.warps_log2 > 0) {
    if (group.lane() == 0) of_warps[threadIdx.x / 32] = maximum;
    __syncthreads();
    if (group.thread != 0) return;
    for (int i = 1; i < grid.warps(); ++i) maximum = fmaxf(maximum, of_warps[threadIdx.x / 32 + i]);
  }
  if (group.present && group.thread == 0) p.maxima[group.row] = maximum;
}

template <class Code>
__device__ __forceinline__ Code coded(float logit, float maximum) {
  const float relative = logit - maximum;
  if constexpr (std::is_same_v<Code, Sqrt8>) {
    return {float_to_sqrt8(-relative)};
  } else {
    const float above = relative < kLowestFloat16 ? kLowestFloat16 : relative;  // a NaN stays
    return narrowed<Code>(above > 0.0f ? 0.0f : above);
  }
}

template <class S, class Code>
__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeParams p, Grid grid) {
  constexpr int kColumns = 16 / sizeof(S), kWords = kColumns * sizeof(Code) / 4;
  const WarpGroup group(grid);
  if (!group.present) return;
  const S* row = static_cast<const S*>(p.logits.data) + group.row * p.logits.stride;
  Code* out = static_cast<Code*>(p.codes) + group.row * p.columns;
  // A row without a finite logit has no maximum to subtract.
  const float maximum = p.maxima[group.row] == -INFINITY ? 0.0f : p.maxima[group.row];
  const Tiling tiling = tiling_at<S, kColumns>(row, static_cast<int>(p.columns));
  const Reader<S, kColumns> reader(row, tiling);
  int begin, end;
  group.range(tiling.vectors, grid.splits, &begin, &end);
#pragma unroll 4
  for (int vector = begin + group.thread; vector < end; vector += group.threads) {
    float x[kColumns];
    reader.any_vector(vector, 0.0f, x);
    Code codes[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) codes[i] = coded<Code>(x[i], maximum);
    const int column = tiling.first_column(vector, kColumns);
    Code* at = out + column;
    if (column >= 0 && column + kColumns <= tiling.columns && reinterpret_cast<uintptr_t>(at) % sizeof codes == 0) {
      store_words(reinterpret_cast<char*>(at), bits_as<Words<kWords>>(codes));
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (column + i >= 0 && column + i < tiling.columns) at[i] = codes[i];
    }
  }
}

}  // namespace

const char* row_maxima(const MaximumParams& p, Stream stream) {
  if (const char* error = too_large(p.columns)) return error;
  const Grid grid = grid_of(p.rows, p.columns, 1);
  return with_student<__nv_bfloat16, __half>(p.logits.dtype, [&](auto s) {
    return launch(row_maxima_kernel<decltype(s)>, grid.blocks(), kThreads, stream, p, grid);
  });
}

const char* encode(const EncodeParams& p, Stream stream) {
  if (const char* error = too_large(p.columns)) return error;
  const Grid grid = grid_of(p.rows, p.columns, row_splits(p.rows, p.columns));
  return with_student<__nv_bfloat16, __half>(p.logits.dtype, [&](auto s) {
    using S = decltype(s);
    auto kernel = p.code == Dtype::kSqrt8 ? encode_kernel<S, Sqrt8> : encode_kernel<S, __half>;
    return launch(kernel, grid.blocks(), kThreads, stream, p, grid);
  });
}

}  // namespace vcrd::cuda
