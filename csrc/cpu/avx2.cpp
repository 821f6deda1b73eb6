// The loops for processors with AVX2 and FMA.
#if defined(__x86_64__)
// Standard headers first: their inline functions must not be compiled for this target.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2,fma")
#define VCRD_INSTRUCTION_SET avx2
#include "loops.h"

#endif
