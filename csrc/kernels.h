// Every launch in one place. The binding layer calls nothing else of the kernels.
#pragma once

#include <cstdint>

#include "params.h"

struct CUstream_st;

namespace vcrd::cpu {

// Each function handles rows [begin, end); the caller spreads the rows over its own thread pool.
struct Kernels {
  void (*row_statistics)(const StatisticsParams&, int64_t begin, int64_t end);
  void (*merge_statistics)(const MergeParams&, int64_t begin, int64_t end);
  void (*mixture_sums)(const MixtureParams&, int64_t begin, int64_t end);
  void (*gradient)(const GradientParams&, int64_t begin, int64_t end);
  void (*row_maxima)(const MaximumParams&, int64_t begin, int64_t end);
  void (*encode)(const EncodeParams&, int64_t begin, int64_t end);
  void (*mix)(const MixParams&, int64_t begin, int64_t end);
  const char* instruction_set;
};

// The same loops compiled for several instruction sets.
const Kernels& generic_kernels();
// Compiled by GCC only: clang ignores the pragmas that choose the instruction set.
#if defined(__x86_64__) && !defined(__clang__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The best ones that this processor can run.
const Kernels& kernels();

}  // namespace vcrd::cpu

namespace vcrd::cuda {

using Stream = ::CUstream_st*;  // cudaStream_t, without its header

// Each launcher returns null, or the error message of the CUDA runtime. None of them waits for the device.

// The number of parts that a row is divided into, so that few long rows occupy the whole GPU. Each part has its own
// RowPartial.
int64_t row_splits(int64_t rows, int64_t columns);
// Writes p.partials [splits, rows].
const char* row_statistics(const StatisticsParams& p, int64_t splits, Stream stream);
// Merges the `splits` partials of each row into one: `partials` [splits, rows] -> `out` [rows].
const char* combine_partials(const CombineParams& p, Stream stream);
const char* merge_statistics(const MergeParams& p, Stream stream);
// Writes p.sums [splits, rows, 2].
const char* mixture_sums(const MixtureParams& p, int64_t splits, Stream stream);
const char* gradient(const GradientParams& p, Stream stream);
// Writes p.maxima [rows], over p.logits' columns.
const char* row_maxima(const MaximumParams& p, Stream stream);
// Writes p.codes [rows, columns], float16 or kSqrt8, of logits - p.maxima.
const char* encode(const EncodeParams& p, Stream stream);
// Changes p.mixture [rows, columns].
const char* mix(const MixParams& p, Stream stream);

}  // namespace vcrd::cuda
