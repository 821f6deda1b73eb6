// Who works on what: groups of whole warps, each on one part of one row. And what the lanes of a warp say to each
// other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vcrd::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// How rows are dealt out: a group of `warps` (a power of two) takes one of a row's `splits` parts.
struct Grid {
  int64_t rows;
  int splits;
  int warps;

  __host__ __device__ int64_t groups() const { return rows * splits; }
  __host__ int64_t blocks() const { return (groups() * warps + kWarps - 1) / kWarps; }
};

// As many warps as leave each lane a few batches of columns: short rows then share a block, and a long row fills one.
inline Grid grid_of(int64_t rows, int64_t columns, int64_t splits) {
  int warps = 1;
  while (warps < kWarps && columns / splits > 2048 * warps) warps *= 2;
  return {rows, static_cast<int>(splits), warps};
}

// This thread's group.
struct Group {
  int64_t row;
  int split;
  int thread, threads;  // this thread's place in the group, and the group's size
  bool present;         // false past the last row

  __device__ explicit Group(const Grid& grid) {
    int warp = static_cast<int>(threadIdx.x) / 32;
    int64_t index = int64_t(blockIdx.x) * (kWarps / grid.warps) + warp / grid.warps;
    present = index < grid.groups();
    row = grid.splits == 1 ? index : index / grid.splits;
    split = grid.splits == 1 ? 0 : static_cast<int>(index % grid.splits);
    threads = 32 * grid.warps;
    thread = static_cast<int>(threadIdx.x) % threads;
  }

  __device__ int warp() const { return thread / 32; }
  __device__ int lane() const { return thread % 32; }

  // This part's share [begin, end) of `packs`.
  __device__ void share(int packs, int splits, int* begin, int* end) const {
    int each = (packs + splits - 1) / splits;
    *begin = min(packs, split * each);
    *end = min(packs, *begin + each);
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
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
