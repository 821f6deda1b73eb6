// Every launch in one place. The binding layer calls these and nothing else of the kernels.
#pragma once

#include <cstdint>

#include "params.h"

namespace vcrd::cpu {

// Each handles rows [begin, end), so that the caller spreads rows over its own thread pool.
struct Kernels {
  void (*row_statistics)(const StatisticsParams&, int64_t begin, int64_t end);
  void (*merge_statistics)(const MergeParams&, int64_t begin, int64_t end);
  void (*mixture_sums)(const MixtureParams&, int64_t begin, int64_t end);
  void (*gradient)(const GradientParams&, int64_t begin, int64_t end);
  const char* instruction_set;
};

// The same loops compiled for several instruction sets.
const Kernels& generic_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The best that this processor runs.
const Kernels& kernels();

}  // namespace vcrd::cpu
