// The CPU loops. Compiled once per instruction set: the including file defines VCRD_INSTRUCTION_SET and sets the
// compiler's target, and must have included the standard headers before that. Implicit constructors are not given that
// target: no type with a default value or a base may hold registers.
#include "encode.h"
#include "gradient.h"
#include "statistics.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

// Turns run-time choices into template arguments, one at a time.
template <class F>
void with_logits(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kDistance8:
      return;  // the binding layer takes codes from teachers alone
  }
}

template <class F>
void with_logits_or_codes(Dtype dtype, F f) {
  dtype == Dtype::kDistance8 ? f(Distance8{}) : with_logits(dtype, f);
}

template <class F>
void with_bools(bool a, bool b, F f) {
  using True = std::true_type;
  using False = std::false_type;
  a ? (b ? f(True{}, True{}) : f(True{}, False{})) : (b ? f(False{}, True{}) : f(False{}, False{}));
}

template <Divergence kValue>
struct DivergenceTag {
  static constexpr Divergence value = kValue;
};

template <class F>
void with_divergence(Divergence divergence, F f) {
  switch (divergence) {
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
  }
}

template <class Params, class F>
void with_dtypes(const Params& p, F f) {
  with_logits(p.student.dtype, [&](auto s) { with_logits_or_codes(p.teacher.dtype, [&](auto t) { f(s, t); }); });
}

void launch_row_statistics(const StatisticsParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    with_bools(p.inverse_temperature != 1.0f, p.with_reverse, [&](auto tempered, auto reverse) {
      row_statistics<decltype(s), decltype(t), tempered.value, reverse.value>(p, begin, end);
    });
  });
}

void launch_mixture_sums(const MixtureParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    with_divergence(p.divergence, [&](auto divergence) {
      if constexpr (decltype(divergence)::value >= Divergence::kJsd)
        mixture_sums<decltype(s), decltype(t), decltype(divergence)::value>(p, begin, end);
    });
  });
}

void launch_gradient(const GradientParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    with_divergence(p.divergence, [&](auto divergence) {
      using S = decltype(s);
      using T = decltype(t);
      constexpr Divergence kDivergence = decltype(divergence)::value;
      p.inverse_temperature == 1.0f ? gradient<S, T, kDivergence, false>(p, begin, end)
                                    : gradient<S, T, kDivergence, true>(p, begin, end);
    });
  });
}

void launch_row_maxima(const MaximumParams& p, int64_t begin, int64_t end) {
  with_logits(p.logits.dtype, [&](auto s) { row_maxima<decltype(s)>(p, begin, end); });
}

void launch_encode(const EncodeParams& p, int64_t begin, int64_t end) {
  with_logits(p.logits.dtype, [&](auto s) { encode<decltype(s)>(p, begin, end); });
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET

namespace vcrd::cpu {

#define VCRD_STRING_(x) #x
#define VCRD_STRING(x) VCRD_STRING_(x)
#define VCRD_JOIN_(a, b) a##b
#define VCRD_JOIN(a, b) VCRD_JOIN_(a, b)

const Kernels& VCRD_JOIN(VCRD_INSTRUCTION_SET, _kernels)() {
  using namespace VCRD_INSTRUCTION_SET;
  static const Kernels kernels = {launch_row_statistics,
                                  merge_statistics,
                                  launch_mixture_sums,
                                  launch_gradient,
                                  launch_row_maxima,
                                  launch_encode,
                                  VCRD_STRING(VCRD_INSTRUCTION_SET)};
  return kernels;
}

}  // namespace vcrd::cpu
