// How rows are assigned to warps: a group of warps works on one part of one row. Also reductions over the lanes of a
// warp, and the launch of a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vcrd::cuda {

constexpr int kThreads = 256;  // per block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Each row is divided into `splits` parts. A group of 2^warps_log2 warps works on one part.
struct Grid {
  int64_t rows;
  int splits;
  int warps_log2;

  __host__ __device__ int64_t groups() const { return rows * splits; }
  __host__ __device__ int warps() const { return 1 << warps_log2; }
  __host__ int64_t blocks() const { return (groups() * warps() + kWarps - 1) / kWarps; }
};

// Chooses the warps per group so that each lane gets about 128 columns; the end of a row then costs little in
// comparison. Short rows share a block, and a long row fills one.
inline Grid grid_of(int64_t rows, int64_t columns, int64_t splits) {
  int warps_log2 = 0;
  while ((1 << warps_log2) < kWarps && columns / splits > int64_t(4096) << warps_log2) ++warps_log2;
  return {rows, static_cast<int>(splits), warps_log2};
}

// The group of the calling thread.
struct WarpGroup {
  int64_t row;
  int split;
  int thread, threads;  // the thread's index in the group, and the group's size
  bool present;         // false past the last row

  __device__ explicit WarpGroup(const Grid& grid) {
    int warp = static_cast<int>(threadIdx.x) / 32;
    int64_t index = int64_t(blockIdx.x) * (kWarps >> grid.warps_log2) + (warp >> grid.warps_log2);
    present = index < grid.groups();
    row = grid.splits == 1 ? index : index / grid.splits;
    split = grid.splits == 1 ? 0 : static_cast<int>(index % grid.splits);
    threads = 32 << grid.warps_log2;
    thread = static_cast<int>(threadIdx.x) & (threads - 1);
  }

  __device__ int warp() const { return thread / 32; }
  __device__ int lane() const { return thread % 32; }

  // The range [begin, end) of the row's `vectors` that belongs to this part.
  __device__ void range(int vectors, int splits, int* begin, int* end) const {
    int each = splits == 1 ? vectors : (vectors + splits - 1) / splits;
    *begin = min(vectors, split * each);
    *end = min(vectors, *begin + each);
  }
};

// Reductions over groups of kLanes neighbouring lanes, a power of two. Every lane gets the result.
template <int kLanes = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <int kLanes = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// An error if one launch cannot take rows of this length, because the kernels count columns in 32 bits; null otherwise.
inline const char* too_large(int64_t columns) {
  return columns > (int64_t(1) << 30) ? "more than 2^30 columns in one shard" : nullptr;
}

// Launches a kernel in plain C++, so that compilers without <<<>>> can read these files too. Returns null, or the
// error.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more rows than one launch can take";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vcrd::cuda
