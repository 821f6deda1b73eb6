// Stands in for torch's header in the emulated build: one stream, and launches follow each other.
#pragma once

namespace c10::cuda {

struct CUDAStream {
  struct CUstream_st* stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(int = -1) { return {}; }

}  // namespace c10::cuda
