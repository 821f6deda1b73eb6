// The loops for processors with AVX-512.
#if defined(__x86_64__)
// Standard headers first: their inline functions must not be compiled for this target.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VCRD_INSTRUCTION_SET avx512
#include "loops.h"

#endif
