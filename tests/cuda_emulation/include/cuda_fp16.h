// Stands in for the CUDA toolkit's header: float16 storage and its conversions.
#pragma once

#include "emulation/intrinsics.h"

struct __half {
  unsigned short x;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const int exponent = value.x >> 10 & 31, mantissa = value.x & 1023;
  float magnitude = exponent == 0 ? ldexpf(float(mantissa), -24) : ldexpf(float(mantissa + 1024), exponent - 25);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return value.x & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even: the C library's rounding of the value in units of the result's last place.
inline __half __float2half_rn(float value) {
  const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
  const float magnitude = fabsf(value);
  unsigned bits;
  if (!(value == value)) {
    return {0x7fff};
  } else if (magnitude < ldexpf(1, -14)) {
    bits = unsigned(nearbyintf(ldexpf(magnitude, 24)));  // may round up to the smallest normal, whose bits follow
  } else if (magnitude < 65520) {
    int exponent;
    const float fraction = frexpf(magnitude, &exponent);  // in [1/2, 1)
    bits = unsigned(exponent + 13) * 1024 + unsigned(nearbyintf(ldexpf(fraction, 11)));
  } else {
    bits = 0x7c00;
  }
  return {static_cast<unsigned short>(bits | sign)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline unsigned short __half_as_ushort(__half value) { return value.x; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
