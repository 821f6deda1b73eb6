// The loops for any processor, and the choice among the instruction sets.
// Standard headers first: their inline functions must not be compiled for this target.
#include <cmath>
#include <cstdint>
#include <cstring>

#define VCRD_INSTRUCTION_SET generic
#include "loops.h"

namespace vcrd::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& best =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")
          ? avx512_kernels()
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_kernels()
                                                                        : generic_kernels();
  return best;
#else
  return generic_kernels();
#endif
}

}  // namespace vcrd::cpu
