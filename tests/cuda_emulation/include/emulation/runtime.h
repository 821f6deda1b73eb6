// The host's side: launches, errors, a device with few multiprocessors.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "block.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout
};

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
union cudaLaunchAttributeValue {
  char pad[64];
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace vcrd_emulation {

constexpr int kMultiprocessors = 4;  // few, so that small inputs already cut rows into parts

inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local std::string last_sentence;

inline cudaError_t failed(cudaError_t error, std::string sentence) {
  last_sentence = std::move(sentence);
  std::fprintf(stderr, "%s\n", last_sentence.c_str());
  return last_error = error;
}

// The limits of every GPU since 2012.
inline bool is_valid(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
         threads >= 1 && threads <= kMostThreads && block.z <= 64;
}

// Which kernels were launched: each once, as its place in the module, in the file that VCRD_EMULATION_LAUNCHES names.
inline void note_launch(void* kernel) {
  static const char* path = std::getenv("VCRD_EMULATION_LAUNCHES");
  if (!path) return;
  static std::mutex mutex;
  static std::set<void*> known;
  const std::lock_guard<std::mutex> lock(mutex);
  Dl_info module;
  if (!known.insert(kernel).second || !dladdr(kernel, &module)) return;
  if (std::FILE* file = std::fopen(path, "a")) {
    std::fprintf(file, "%zx\n", size_t(static_cast<char*>(kernel) - static_cast<char*>(module.dli_fbase)));
    std::fclose(file);
  }
}

}  // namespace vcrd_emulation

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  using namespace vcrd_emulation;
  if (!is_valid(*config))
    return failed(cudaErrorInvalidConfiguration, "emulated CUDA: invalid configuration of a launch");
  if (config->dynamicSmemBytes)
    return failed(cudaErrorInvalidValue, "emulated CUDA: dynamic shared memory is not emulated");
  note_launch(reinterpret_cast<void*>(kernel));
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<Expected...> arguments;
    static void run(void* self) {  // each thread with its own copy of the arguments
      auto* call = static_cast<Call*>(self);
      std::apply(call->kernel, call->arguments);
    }
  } call{kernel, {std::forward<Given>(given)...}};
  std::string fault = Machine::instance().launch(config->gridDim, config->blockDim, &Call::run, &call);
  return fault.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure, std::move(fault));
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : vcrd_emulation::last_sentence.c_str();
}
inline cudaError_t cudaPeekAtLastError() { return vcrd_emulation::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(vcrd_emulation::last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = vcrd_emulation::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = vcrd_emulation::kMostThreads;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
  }
  return vcrd_emulation::failed(cudaErrorInvalidValue, "emulated CUDA: an attribute that the emulation does not know");
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t) {
  *blocks = 2048 / threads;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t = nullptr) {
  memset(memory, byte, bytes);
  return cudaSuccess;
}

// Programmatic dependent launch: launches follow each other here.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
