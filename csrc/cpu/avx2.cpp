// The loops for processors with AVX2, FMA and F16C.
#if defined(__x86_64__) && !defined(__clang__)
// Standard headers first: their inline functions must not be compiled for this target.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c")
#define VCRD_INSTRUCTION_SET avx2
#define VCRD_REGISTER_BYTES 32
#include "loops.h"

#endif
