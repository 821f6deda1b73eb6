// Small kernels that show that the emulation computes what CUDA would, and that it notices what CUDA would not forgive.
// `toys NAME` runs one of them; it prints "right", or says what is wrong and ends with 1.
#include "toy_faults.cuh"

namespace {

// Sums by warp shuffles, then by shared memory.
template <class T>
__global__ void __launch_bounds__(256) sum_kernel(const T* in, int64_t count, T* out) {
  __shared__ T of_warps[8];
  T sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * count + threadIdx.x; i < int64_t(blockIdx.x + 1) * count; i += blockDim.x)
    sum += in[i];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < blockDim.x / 32; ++i) sum += of_warps[i];
    out[blockIdx.x] = sum;
  }
}

template <class T>
int sums() {
  constexpr int kRows = 7, kColumns = 1000;
  std::vector<T> in(kRows * kColumns), out(kRows);
  for (size_t i = 0; i < in.size(); ++i) in[i] = T(i % 89);
  if (run(sum_kernel<T>, kRows, 256, in.data(), kColumns, out.data()) != cudaSuccess) return 2;
  bool right = true;
  for (int row = 0; row < kRows; ++row) {
    T expected = 0;
    for (int i = 0; i < kColumns; ++i) expected += in[row * kColumns + i];
    right = right && out[row] == expected;
  }
  return verdict(right, "wrong sums");
}

// Every warp function once; each lane writes 16 numbers.
__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x;
  int* mine = out + lane * 16;
  *mine++ = __shfl_sync(kAll, lane, 5);
  *mine++ = __shfl_sync(kAll, lane, 3, 8);
  *mine++ = __shfl_xor_sync(kAll, lane, 1);
  *mine++ = __shfl_xor_sync(kAll, lane, 16, 8);
  *mine++ = __shfl_down_sync(kAll, lane, 4);
  *mine++ = __shfl_up_sync(kAll, lane, 4);
  *mine++ = int(__shfl_sync(kAll, int64_t(lane) << 40, 7) >> 40);
  *mine++ = int(__shfl_sync(kAll, lane * 0.5, 6) * 2);
  *mine++ = int(__ballot_sync(kAll, lane % 2));
  *mine++ = __any_sync(kAll, lane == 9);
  *mine++ = __all_sync(kAll, lane < 31);
  *mine++ = __reduce_add_sync(kAll, lane);
  *mine++ = __reduce_max_sync(kAll, -lane);
  // Half warps may go their own ways.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  *mine++ = lane < 16 ? __shfl_sync(half, lane, 0) : __shfl_sync(half, lane, 31);
  *mine++ = int(__ballot_sync(half, 1));
  __syncwarp();
  *mine++ = lane;
}

int warps() {
  std::vector<int> out(32 * 16);
  if (run(warp_kernel, 1, 32, out.data()) != cudaSuccess) return 2;
  for (int lane = 0; lane < 32; ++lane) {
    const int below = lane < 4 ? lane : lane - 4, above = lane < 28 ? lane + 4 : lane;
    const int expected[16] = {5,
                              lane / 8 * 8 + 3,
                              lane ^ 1,
                              lane & 16 ? lane ^ 16 : lane,
                              above,
                              below,
                              7,
                              6,
                              int(0xaaaaaaaau),
                              1,
                              0,
                              496,
                              0,
                              lane < 16 ? 0 : 31,
                              lane < 16 ? 0xffff : int(0xffff0000u),
                              lane};
    for (int i = 0; i < 16; ++i)
      if (out[lane * 16 + i] != expected[i]) {
        std::printf("lane %d, number %d: expected %d, got %d\n", lane, i, expected[i], out[lane * 16 + i]);
        return 1;
      }
  }
  return verdict(true, "");
}

__global__ void index_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], block + 1);
}

int indices() {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(5, 3, 2), config.blockDim = dim3(8, 5, 3);
  std::vector<unsigned> out(30 * 120);
  if (cudaLaunchKernelEx(&config, index_kernel, out.data()) != cudaSuccess) return 2;
  bool right = true;
  for (size_t i = 0; i < out.size(); ++i) right = right && out[i] == i / 120 + 1;
  return verdict(right, "a thread ran twice or not at all");
}

int conversions() {
  bool right = __float2half_rn(65519.0f).x == 0x7bff && __float2half_rn(65520.0f).x == 0x7c00 &&
               __float2half_rn(-INFINITY).x == 0xfc00 && __float2half_rn(3e-8f).x == 1 &&
               __float2half_rn(2.9e-8f).x == 0 && __float2bfloat16_rn(1.0f + 0x1p-8f).x == 0x3f80 &&
               __float2bfloat16_rn(1.0f + 0x3p-8f).x == 0x3f82 && __float2bfloat16_rn(-3.4e38f).x == 0xff80 &&
               __byte_perm(0x33221100, 0x77665544, 0x7216) == 0x77221166 &&
               __byte_perm(0x80, 0, 0x0888) == 0x80ffffff && __funnelshift_r(0x44332211, 0x88776655, 8) == 0x55443322 &&
               __funnelshift_l(0x44332211, 0x88776655, 8) == 0x77665544 && min(1, int64_t(2)) == 1 &&
               max(NAN, 1.0f) == 1.0f && __float2uint_rn(2.5f) == 2 && __float2uint_rn(-1.0f) == 0 && __clz(0) == 32;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<unsigned short>(bits);
    const float of_half = __half2float({half}), of_bfloat16 = __bfloat162float({half});
    if (of_half == of_half) right = right && __float2half_rn(of_half).x == half;
    if (of_bfloat16 == of_bfloat16) right = right && __float2bfloat16_rn(of_bfloat16).x == half;
  }
  return verdict(right, "a conversion is wrong");
}

int named(const char* name) {
  const auto is = [name](const char* other) { return !std::strcmp(name, other); };
  static int out = 0;
  if (is("sums")) return sums<float>() + sums<double>() + sums<int>();
  if (is("warps")) return warps();
  if (is("indices")) return indices();
  if (is("conversions")) return conversions();
  if (is("barrier")) return race(reverse_kernel<true>, 256, reversed);
  if (is("two_barriers")) return race(rotate_kernel<true>, 64, rotated);
  if (is("syncwarp")) return race(exchange_kernel<true>, 32, exchanged);
  if (is("out_of_bounds")) return out_of_bounds(10, 11);
  if (is("written_out_of_bounds")) return out_of_bounds(11, 10);
  if (is("misaligned")) return misaligned(load_kernel);
  if (is("misaligned_hinted")) return misaligned(hinted_load_kernel);
  if (is("misaligned_store")) return misaligned(store_kernel);
  if (is("no_barrier")) return race(reverse_kernel<false>, 256, reversed);
  if (is("no_second_barrier")) return race(rotate_kernel<false>, 64, rotated);
  if (is("no_syncwarp")) return race(exchange_kernel<false>, 32, exchanged);
  if (is("block_order")) return chained();
  if (is("returns_early")) return faults(run(returns_early_kernel, 2, 64));
  if (is("different_barriers")) return faults(run(two_barriers_kernel, 1, 64));
  if (is("barrier_and_shuffle")) return faults(run(barrier_and_shuffle_kernel, 1, 32, &out));
  if (is("left_lane")) return faults(run(left_lane_kernel, 1, 32, &out));
  if (is("absent_lane")) return faults(run(left_lane_kernel, 1, 6, &out));
  if (is("foreign_mask")) return faults(run(foreign_mask_kernel, 1, 32, &out));
  if (is("outside_source")) return faults(run(outside_source_kernel, 1, 32, &out));
  if (is("different_masks")) return faults(run(different_masks_kernel, 1, 32, &out));
  if (is("shared_overrun")) return run(shared_overrun_kernel<int>, 1, 8, &out, 1), 0;
  if (is("unwritten_shared")) return unwritten_shared();
  if (is("integer_overflow")) return out = INT32_MAX, run(overflow_kernel, 1, 1, &out), 0;
  if (is("stack_overflow")) return run(recursing_kernel, 1, 2, &out), 0;
  if (is("too_many_threads")) return run(overflow_kernel, 1, 1025, &out) == cudaErrorInvalidConfiguration ? 3 : 0;
  if (is("no_blocks")) return run(overflow_kernel, 0, 32, &out) == cudaErrorInvalidConfiguration ? 3 : 0;
  std::printf("no toy is called %s\n", name);
  return 64;
}

}  // namespace

int main(int count, char** arguments) { return named(count > 1 ? arguments[1] : ""); }
