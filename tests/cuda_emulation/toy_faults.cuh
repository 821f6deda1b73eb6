// Toys with a fault each, which the emulation must notice; and where a barrier is the point, the same one without it.
#pragma once

#include "toys.cuh"

namespace {

__global__ void copy_kernel(const uint16_t* in, int count, uint16_t* out) {
  if (int(threadIdx.x) <= count) out[threadIdx.x] = in[threadIdx.x];  // one too many
}

int out_of_bounds(int in_count, int out_count) {
  std::vector<uint16_t> in(in_count), out(out_count);
  run(copy_kernel, 1, 32, in.data(), 10, out.data());
  return 0;
}

__global__ void load_kernel(const float* in, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(in);
  *out = four.x + four.w;
}

__global__ void hinted_load_kernel(const float* in, float* out) {
  const uint4 four = __ldcs(reinterpret_cast<const uint4*>(in));
  *out = float(four.x + four.w);
}

__global__ void store_kernel(const float* in, float* out) {
  *reinterpret_cast<uint2*>(out) = make_uint2(unsigned(in[0]), 0);
}

template <class Kernel>
int misaligned(Kernel kernel) {
  alignas(16) float in[8] = {};
  alignas(16) float out[4];
  run(kernel, 1, 1, in + 1, out + 1);
  return 0;
}

template <bool kBarrier>
__global__ void reverse_kernel(int* numbers) {
  __shared__ int kept[256];
  kept[threadIdx.x] = numbers[threadIdx.x];
  if (kBarrier) __syncthreads();
  numbers[threadIdx.x] = kept[255 - threadIdx.x];
}

// A warp reads what another wrote last time round, unless a second barrier keeps the writer back.
template <bool kBarrier>
__global__ void rotate_kernel(int* numbers) {
  __shared__ int kept[64];
  int mine = numbers[threadIdx.x];
  for (int round = 0; round < 8; ++round) {
    kept[threadIdx.x] = mine;
    __syncthreads();
    mine = kept[(threadIdx.x + 33) % 64];
    if (kBarrier) __syncthreads();
  }
  numbers[threadIdx.x] = mine;
}

template <bool kBarrier>
__global__ void exchange_kernel(int* numbers) {
  __shared__ int kept[32];
  kept[threadIdx.x] = numbers[threadIdx.x];
  if (kBarrier) __syncwarp();
  numbers[threadIdx.x] = kept[threadIdx.x ^ 1];
}

int race(void (*kernel)(int*), int threads, int (*expected)(int)) {
  std::vector<int> numbers(threads);
  for (int i = 0; i < threads; ++i) numbers[i] = i;
  if (run(kernel, 1, threads, numbers.data()) != cudaSuccess) return 2;
  bool right = true;
  for (int i = 0; i < threads; ++i) right = right && numbers[i] == expected(i);
  return verdict(right, "a race: wrong numbers");
}
int reversed(int i) { return 255 - i; }
int rotated(int i) { return (i + 8 * 33) % 64; }
int exchanged(int i) { return i ^ 1; }

// Depends on the order of blocks: each adds to what the one before it left.
__global__ void chained_kernel(int* numbers) { numbers[blockIdx.x + 1] = numbers[blockIdx.x] + 1; }

int chained() {
  std::vector<int> numbers(65);
  if (run(chained_kernel, 64, 1, numbers.data()) != cudaSuccess) return 2;
  return verdict(numbers[64] == 64, "blocks ran in another order");
}

__global__ void returns_early_kernel() {
  if (threadIdx.x == 63) return;
  __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_and_shuffle_kernel(int* out) {
  if (threadIdx.x == 3)
    __syncthreads();
  else
    *out = __shfl_sync(kAll, 1, 0);
}

__global__ void left_lane_kernel(int* out) {
  if (threadIdx.x == 7) return;
  *out = __shfl_xor_sync(kAll, int(threadIdx.x), 1);
}

__global__ void foreign_mask_kernel(int* out) { *out = __shfl_sync(0x0000ffffu, int(threadIdx.x), 0); }

__global__ void outside_source_kernel(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0x0000ffffu, int(threadIdx.x), 20);
}

__global__ void different_masks_kernel(int* out) {
  const unsigned mask = threadIdx.x < 8 ? kAll : 0xfffffff0u;
  *out = __shfl_sync(mask | 1u << threadIdx.x, int(threadIdx.x), 31);
}

// 3 for an error of the launch that is kept until it is asked for, after which the machine works again.
int faults(cudaError_t error) {
  std::printf("%s\n", cudaGetErrorString(error));
  const bool kept = cudaGetLastError() == error && cudaGetLastError() == cudaSuccess;
  const bool works_again = race(reverse_kernel<true>, 256, reversed) == 0;
  return error == cudaErrorLaunchFailure && kept && works_again ? 3 : 0;
}

template <class T>
__global__ void shared_overrun_kernel(T* out, int index) {
  __shared__ T kept[8];
  T* somewhere = kept;  // so that no bound is known where it is used
  somewhere[threadIdx.x + index] = T(threadIdx.x);
  __syncthreads();
  *out = kept[0];
}

__global__ void unwritten_shared_kernel(float* out) {
  __shared__ float kept[2];
  if (threadIdx.x == 0) kept[0] = 1;
  __syncthreads();
  *out = kept[0] + kept[1];
}

int unwritten_shared() {
  float out = 0;
  run(unwritten_shared_kernel, 1, 32, &out);
  return verdict(out == out, "not a number");
}

__global__ void overflow_kernel(int* out) { *out = *out + 1; }

__global__ void recursing_kernel(int* out) {
  struct Deep {
    static __attribute__((noinline)) int down(volatile int* depth) {
      volatile char room[1000];
      room[*depth % 1000] = char(*depth);
      *depth = *depth + 1;
      return down(depth) + room[0];
    }
  };
  volatile int depth = 0;
  *out = Deep::down(&depth);
}

}  // namespace
