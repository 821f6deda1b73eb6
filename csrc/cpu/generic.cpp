// The loops for any processor, and the choice of the instruction set.
// Standard headers first: their inline functions must not be compiled for this target.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define VCRD_INSTRUCTION_SET generic
#define VCRD_REGISTER_BYTES 16
#include "loops.h"

namespace vcrd::cpu {
namespace {

const Kernels& best_kernels() {
#if defined(__x86_64__) && !defined(__clang__)
  // For tests and for debugging: a lower instruction set than the best. An unknown name is ignored.
  const char* named = std::getenv("VCRD_CPU_INSTRUCTION_SET");
  bool generic = named && !std::strcmp(named, "generic"), avx2 = named && !std::strcmp(named, "avx2");
  if (generic || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return generic_kernels();
  if (avx2 || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return avx2_kernels();
  return avx512_kernels();
#else
  return generic_kernels();
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& best = best_kernels();
  return best;
}

}  // namespace vcrd::cpu
