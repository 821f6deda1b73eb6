// The loops for processors with AVX-512.
#if defined(__x86_64__) && !defined(__clang__)
// The compiler warns about the header's placeholders for undefined registers wherever an intrinsic is used.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
// Standard headers first: their inline functions must not be compiled for this target.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define VCRD_INSTRUCTION_SET avx512
#define VCRD_REGISTER_BYTES 64
#include "loops.h"

#endif
