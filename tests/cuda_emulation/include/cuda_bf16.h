// Stands in for the CUDA toolkit's header: bfloat16 storage and its conversions.
#pragma once

#include "emulation/intrinsics.h"

struct __nv_bfloat16 {
  unsigned short x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.x) << 16); }

// To nearest, ties to even, by choosing between the two neighbours.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (!(value == value)) return {0x7fff};
  const unsigned bits = __float_as_uint(value), below = bits >> 16, rest = bits & 0xffff;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (below & 1));
  return {static_cast<unsigned short>(below + up)};  // carries into the exponent, and to infinity, as it should
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
