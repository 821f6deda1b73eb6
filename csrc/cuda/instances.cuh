// From what is known at run time to the kernel that was compiled for it.
#pragma once

#include "group.cuh"
#include "row.cuh"

namespace vcrd::cuda {

// A student has no codes.
template <class F>
const char* with_student(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(__nv_bfloat16{});
    case Dtype::kFloat16:
      return f(__half{});
    case Dtype::kDistance8:
      break;
  }
  return "unknown type of logits";
}

template <class F>
const char* with_teacher(Dtype dtype, F f) {
  return dtype == Dtype::kDistance8 ? f(Distance8{}) : with_student(dtype, f);
}

template <Divergence kValue>
struct DivergenceTag {
  static constexpr Divergence value = kValue;
};

// Params: of the mixture or of the gradient.
template <class Params, class F>
const char* with_divergence(const Params& p, F f) {
  if (p.divergence == Divergence::kJsd && p.teacher_share == 0.5f) return f(DivergenceTag<Divergence::kEvenJsd>{});
  switch (p.divergence) {
    case Divergence::kForwardKl:
      return f(DivergenceTag<Divergence::kForwardKl>{});
    case Divergence::kReverseKl:
      return f(DivergenceTag<Divergence::kReverseKl>{});
    case Divergence::kJeffreys:
      return f(DivergenceTag<Divergence::kJeffreys>{});
    case Divergence::kJsd:
      return f(DivergenceTag<Divergence::kJsd>{});
    case Divergence::kSkewKl:
      return f(DivergenceTag<Divergence::kSkewKl>{});
    case Divergence::kSkewReverseKl:
      return f(DivergenceTag<Divergence::kSkewReverseKl>{});
    case Divergence::kEvenJsd:
      break;
  }
  return "unknown divergence";
}

// Whether one launch can take these rows: within a row, columns are counted in 32 bits.
inline const char* too_large(int64_t columns) {
  return columns > (int64_t(1) << 30) ? "more than 2^30 columns in one shard" : nullptr;
}

}  // namespace vcrd::cuda
