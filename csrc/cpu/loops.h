// The CPU loops. Compiled once per instruction set: the including file first includes the standard headers, then sets
// the compiler's target and defines VCRD_INSTRUCTION_SET. The compiler does not apply that target to implicit
// constructors, so a type that holds registers may have neither default values nor a base.
#include "../dispatch.h"
#include "encode.h"
#include "gradient.h"
#include "mix.h"
#include "statistics.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

template <class Params, class F>
void with_dtypes(const Params& p, F f) {
  with_student<BFloat16, Float16>(
      p.student.dtype, [&](auto s) { with_teacher<BFloat16, Float16>(p.teacher.dtype, [&](auto t) { f(s, t); }); });
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
      if constexpr (has_mixture(divergence.value))
        mixture_sums<decltype(s), decltype(t), divergence.value>(p, begin, end);
    });
  });
}

void launch_gradient(const GradientParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    with_divergence(p.divergence, [&](auto divergence) {
      using S = decltype(s);
      using T = decltype(t);
      p.inverse_temperature == 1.0f ? gradient<S, T, divergence.value, false>(p, begin, end)
                                    : gradient<S, T, divergence.value, true>(p, begin, end);
    });
  });
}

void launch_row_maxima(const MaximumParams& p, int64_t begin, int64_t end) {
  with_student<BFloat16, Float16>(p.logits.dtype, [&](auto s) { row_maxima<decltype(s)>(p, begin, end); });
}

void launch_encode(const EncodeParams& p, int64_t begin, int64_t end) {
  with_student<BFloat16, Float16>(p.logits.dtype, [&](auto s) { encode<decltype(s)>(p, begin, end); });
}

void launch_mix(const MixParams& p, int64_t begin, int64_t end) {
  with_teacher<BFloat16, Float16>(p.teacher.dtype, [&](auto t) { mix<decltype(t)>(p, begin, end); });
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
  static const Kernels kernels = {
      launch_row_statistics, merge_statistics, launch_mixture_sums, launch_gradient,
      launch_row_maxima,     launch_encode,    launch_mix,          VCRD_STRING(VCRD_INSTRUCTION_SET)};
  return kernels;
}

}  // namespace vcrd::cpu
