// What the toys share: their launch and their verdict.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class... Parameters, class... Arguments>
cudaError_t run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

int verdict(bool right, const char* what) {
  std::puts(right ? "right" : what);
  return right ? 0 : 1;
}

}  // namespace
