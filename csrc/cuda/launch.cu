// Those launchers of kernels.h whose kernels are compiled in other files, one file for each dtype of the student.
#include "../dispatch.h"
#include "row.cuh"
#include "warp_group.cuh"

namespace vcrd::cuda {

template <class S>
const char* launch_row_statistics(const StatisticsParams& p, int64_t splits, cudaStream_t stream);
template <class S>
const char* launch_mixture_sums(const MixtureParams& p, int64_t splits, cudaStream_t stream);
template <class S>
const char* launch_gradient(const GradientParams& p, cudaStream_t stream);

int64_t row_splits(int64_t rows, int64_t columns) {
  constexpr int64_t kLeastColumns = 8192;  // per part; the ends of shorter parts cost more than the parallelism gains
  constexpr int64_t kBlocksEach =
      16;  // per multiprocessor: five waves of three blocks, so that the last wave costs little
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;  // the launch will return the error
  int64_t wanted = rows ? (kBlocksEach * multiprocessors + rows - 1) / rows : 1;
  int64_t most = columns / kLeastColumns;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

const char* row_statistics(const StatisticsParams& p, int64_t splits, Stream stream) {
  if (const char* error = too_large(p.tokens.columns)) return error;
  return with_student<__nv_bfloat16, __half>(
      p.student.dtype, [&](auto s) { return launch_row_statistics<decltype(s)>(p, splits, stream); });
}

const char* mixture_sums(const MixtureParams& p, int64_t splits, Stream stream) {
  if (const char* error = too_large(p.tokens.columns)) return error;
  return with_student<__nv_bfloat16, __half>(
      p.student.dtype, [&](auto s) { return launch_mixture_sums<decltype(s)>(p, splits, stream); });
}

const char* gradient(const GradientParams& p, Stream stream) {
  if (const char* error = too_large(p.gradient_columns)) return error;
  return with_student<__nv_bfloat16, __half>(p.student.dtype,
                                             [&](auto s) { return launch_gradient<decltype(s)>(p, stream); });
}

}  // namespace vcrd::cuda
