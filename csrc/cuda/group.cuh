// Who works on what: groups of whole warps, each on one part of one row. And what the lanes of a warp say to each
// other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vcrd::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// How rows are dealt out: a group of 2^warps_log2 warps takes one of a row's `splits` parts.
struct Grid {
  int64_t rows;
  int splits;
  int warps_log2;

  __host__ __device__ int64_t groups() const { return rows * splits; }
  __host__ __device__ int warps() const { return 1 << warps_log2; }
  __host__ int64_t blocks() const { return (groups() * warps() + kWarps - 1) / kWarps; }
};

// As many warps as leave each lane 128 columns or so, against which the end of a row weighs little: short rows then
// share a block, and a long row fills one.
inline Grid grid_of(int64_t rows, int64_t columns, int64_t splits) {
  int warps_log2 = 0;
  while ((1 << warps_log2) < kWarps && columns / splits > int64_t(4096) << warps_log2) ++warps_log2;
  return {rows, static_cast<int>(splits), warps_log2};
}

// This thread's group.
struct Group {
  int64_t row;
  int split;
  int thread, threads;  // this thread's place in the group, and the group's size
  bool present;         // false past the last row

  __device__ explicit Group(const Grid& grid) {
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

  // This part's share [begin, end) of `packs`.
  __device__ void share(int packs, int splits, int* begin, int* end) const {
    int each = splits == 1 ? packs : (packs + splits - 1) / splits;
    *begin = min(packs, split * each);
    *end = min(packs, *begin + each);
  }
};

// Over groups of kLanes neighbouring lanes, a power of two; every lane gets the result.
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

// A launch in plain C++, so that the sources need no compiler that knows <<<>>>. Returns null or what went wrong.
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
