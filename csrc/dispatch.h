// Turns what is known at run time into template arguments, for the CPU loops and the CUDA launchers alike. Each
// function calls f with a value of the chosen type, or with an integral_constant, and returns what f returns. The
// functions have internal linkage for the reason given in elementwise.h.
#pragma once

#include <type_traits>

#include "elementwise.h"

namespace vcrd {

// BFloat16 and Float16: the types of 16-bit numbers, which differ between CPU and CUDA.
template <class BFloat16, class Float16, class F>
static inline auto with_student(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kSqrt8:
      break;
  }
  __builtin_trap();  // the binding layer refuses a student in 8-bit codes
}

template <class BFloat16, class Float16, class F>
static inline auto with_teacher(Dtype dtype, F f) {
  return dtype == Dtype::kSqrt8 ? f(Sqrt8{}) : with_student<BFloat16, Float16>(dtype, f);
}

// Compares with one divergence after another, from number kFirst on. The binding layer refuses unknown numbers.
template <int32_t kFirst = 0, class F>
static inline auto with_divergence(Divergence divergence, F f) {
  constexpr auto kThis = static_cast<Divergence>(kFirst);
  if constexpr (kFirst + 1 < kDivergences) {
    if (divergence != kThis) return with_divergence<kFirst + 1>(divergence, f);
  }
  return f(std::integral_constant<Divergence, kThis>{});
}

// The same for two conditions.
template <class F>
static inline auto with_bools(bool a, bool b, F f) {
  using True = std::true_type;
  using False = std::false_type;
  return a ? (b ? f(True{}, True{}) : f(True{}, False{})) : (b ? f(False{}, True{}) : f(False{}, False{}));
}

}  // namespace vcrd
