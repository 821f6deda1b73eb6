// The launchers of kernels.h that choose among instances compiled elsewhere.
#include "instances.cuh"

namespace vcrd::cuda {

template <class S>
const char* launch_row_statistics(const StatisticsParams& p, int64_t splits, cudaStream_t stream);
template <class S>
const char* launch_mixture_sums(const MixtureParams& p, int64_t splits, cudaStream_t stream);
template <class S>
const char* launch_gradient(const GradientParams& p, cudaStream_t stream);

int64_t row_splits(int64_t rows, int64_t columns) {
  constexpr int64_t kLeastColumns = 8192;  // of a part: below, the end of a part costs more than what it shortens
  constexpr int64_t kBlocksEach = 16;      // of a multiprocessor: five waves of three, so that the last weighs little
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;  // the launch will say what is wrong
  int64_t wanted = rows ? (kBlocksEach * multiprocessors + rows - 1) / rows : 1;
  int64_t most = columns / kLeastColumns;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

const char* row_statistics(const StatisticsParams& p, int64_t splits, Stream stream) {
  if (const char* error = too_large(p.tokens.columns)) return error;
  return with_student(p.student.dtype, [&](auto s) { return launch_row_statistics<decltype(s)>(p, splits, stream); });
}

const char* mixture_sums(const MixtureParams& p, int64_t splits, Stream stream) {
  if (const char* error = too_large(p.tokens.columns)) return error;
  return with_student(p.student.dtype, [&](auto s) { return launch_mixture_sums<decltype(s)>(p, splits, stream); });
}

const char* gradient(const GradientParams& p, Stream stream) {
  if (const char* error = too_large(p.gradient_columns)) return error;
  return with_student(p.student.dtype, [&](auto s) { return launch_gradient<decltype(s)>(p, stream); });
}

}  // namespace vcrd::cuda
