// Every launch in one place. The binding layer calls these and nothing else of the kernels.
#pragma once

#include <cstdint>

#include "params.h"

struct CUstream_st;

namespace vcrd::cpu {

// Each handles rows [begin, end), so that the caller spreads rows over its own thread pool.
struct Kernels {
  void (*row_statistics)(const StatisticsParams&, int64_t begin, int64_t end);
  void (*merge_statistics)(const MergeParams&, int64_t begin, int64_t end);
  void (*mixture_sums)(const MixtureParams&, int64_t begin, int64_t end);
  void (*gradient)(const GradientParams&, int64_t begin, int64_t end);
  void (*row_maxima)(const MaximumParams&, int64_t begin, int64_t end);
  void (*encode)(const EncodeParams&, int64_t begin, int64_t end);
  const char* instruction_set;
};

// The same loops compiled for several instruction sets.
const Kernels& generic_kernels();
// By GCC alone: clang ignores the pragmas that choose their targets.
#if defined(__x86_64__) && !defined(__clang__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The best that this processor runs.
const Kernels& kernels();

}  // namespace vcrd::cpu

namespace vcrd::cuda {

using Stream = ::CUstream_st*;  // cudaStream_t, without its header

// Each launcher returns null, or the CUDA runtime's sentence about what failed. None of them waits for the device.

// Into how many parts a row is cut, so that few long rows fill the chip; each part leaves a RowPartial of its own.
int64_t row_splits(int64_t rows, int64_t columns);
// Writes p.partials [splits, rows].
const char* row_statistics(const StatisticsParams& p, int64_t splits, Stream stream);
// Makes one partial of each row's `splits`: `partials` [splits, rows] -> `out` [rows].
const char* combine_partials(const CombineParams& p, Stream stream);
const char* merge_statistics(const MergeParams& p, Stream stream);
// Writes p.sums [splits, rows, 2].
const char* mixture_sums(const MixtureParams& p, int64_t splits, Stream stream);
const char* gradient(const GradientParams& p, Stream stream);
// Writes p.maxima [rows], over p.logits' columns.
const char* row_maxima(const MaximumParams& p, Stream stream);
// Writes p.codes [rows, columns], float16 or kDistance8, of logits - p.maxima.
const char* encode(const EncodeParams& p, Stream stream);

}  // namespace vcrd::cuda
