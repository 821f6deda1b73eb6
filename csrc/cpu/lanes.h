// Registers of floats, and how logits are read into them and gradients written from them. They are the compiler's
// vector types: arithmetic and comparisons work as on numbers, so that one source serves every instruction set.
// Intrinsics are used only for what has no such expression. Part of loops.h, which says how it is compiled.
#pragma once

#include "block.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

constexpr int64_t kLanes = VCRD_REGISTER_BYTES / 4;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

#define VCRD_LANES inline __attribute__((always_inline))

template <class To, class From>
VCRD_LANES To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

VCRD_LANES Floats all_lanes(float x) { return x - Floats{}; }  // adding 0 would lose the sign of -0

// x > y ? x : y, so y where either is a NaN. The compiler needs two instructions for that expression.
VCRD_LANES Floats larger(Floats x, Floats y) {
#if VCRD_REGISTER_BYTES == 64
  return _mm512_max_ps(x, y);
#elif VCRD_REGISTER_BYTES == 32
  return _mm256_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

// x < y ? x : y; see larger().
VCRD_LANES Floats smaller(Floats x, Floats y) {
#if VCRD_REGISTER_BYTES == 64
  return _mm512_min_ps(x, y);
#elif VCRD_REGISTER_BYTES == 32
  return _mm256_min_ps(x, y);
#else
  return x < y ? x : y;
#endif
}

VCRD_LANES Floats at_least(float least, Floats x) { return larger(all_lanes(least), x); }  // a NaN stays

VCRD_LANES float sum(Floats x) {
#if VCRD_REGISTER_BYTES == 64
  return _mm512_reduce_add_ps(x);
#else
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
#endif
}

VCRD_LANES float largest(Floats x) {
#if VCRD_REGISTER_BYTES == 64
  return _mm512_reduce_max_ps(x);
#else
  float most = x[0];
  for (int64_t i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// exp(x) for x that is at least kLowestExponent or NaN; see exponential() in elementwise.h.
VCRD_LANES Floats exponentials_of_clamped(Floats x) {
#if VCRD_REGISTER_BYTES == 64
  // 2^(n/32) from a table that fills two registers, times 2^f with f in [-1/64, 1/64]. The polynomial is then shorter,
  // and the two multipliers of the processor limit the speed of these loops. The table's entries lack the exponent
  // bits, which the bits of n add.
  alignas(64) static constexpr uint32_t kPowers[32] = {
      0x00000000, 0xfffecd87, 0xfffdaac3, 0xfffc980f, 0xfffb95c2, 0xfffaa43a, 0xfff9c3d3, 0xfff8f4f0,
      0xfff837f0, 0xfff78d3a, 0xfff6f532, 0xfff67043, 0xfff5fed7, 0xfff5a15b, 0xfff5583f, 0xfff523f6,
      0xfff504f3, 0xfff4fbaf, 0xfff508a4, 0xfff52c4d, 0xfff5672a, 0xfff5b9be, 0xfff6248c, 0xfff6a81e,
      0xfff744fd, 0xfff7fbb8, 0xfff8ccdf, 0xfff9b907, 0xfffac0c7, 0xfffbe4ba, 0xfffd257d, 0xfffe83b3,
  };
  const float round_to_exponent = 12582912.0f / 32 + 127.0f;
  Floats shifted = x * 1.44269504f + round_to_exponent;
  Floats f = x * 1.44269504f - (shifted - round_to_exponent);
  Floats p = 2.40226507e-1f * f + 6.93157340e-1f;
  p = p * f + 1.0f;
  Bits n = (Bits)shifted;
  Bits fraction =
      (Bits)_mm512_permutex2var_epi32(_mm512_load_si512(kPowers), (__m512i)n, _mm512_load_si512(kPowers + 16));
  return p * (Floats)(fraction + (n << 18));
#else
  return vcrd::exponential_of_clamped<Bits>(x);
#endif
}

VCRD_LANES Floats exponentials(Floats x) { return exponentials_of_clamped(at_least(kLowestExponent, x)); }

// Two registers of neighbouring columns, in any order, if student, teacher and gradient have the same order.
struct Pair {
  Floats first, second;
};

VCRD_LANES Floats load(const float* in) {
  Floats x;
  memcpy(&x, in, sizeof x);
  return x;
}

VCRD_LANES Floats load(const BFloat16* in) {
  Halves half;
  memcpy(&half, in, sizeof half);
  return (Floats)(__builtin_convertvector(half, Bits) << 16);
}

VCRD_LANES Floats load(const Float16* in) {
#if VCRD_REGISTER_BYTES == 64
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#elif VCRD_REGISTER_BYTES == 32
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#else
  alignas(64) float x[kLanes];
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) x[i] = float16_to_float(in[i].bits);
  return load(x);
#endif
}

VCRD_LANES Floats load(const Sqrt8* in) {
  Bytes codes;
  memcpy(&codes, in, sizeof codes);
  Floats root = __builtin_convertvector(__builtin_convertvector(codes, Bits), Floats) * kSqrt8Step;
  return -root * root;
}

VCRD_LANES void store(Floats x, float* out) { memcpy(out, &x, sizeof x); }

VCRD_LANES void store(Floats x, BFloat16* out) {
  Halves half = __builtin_convertvector(rounded_to_bfloat16<Bits>(x) >> 16, Halves);
  memcpy(out, &half, sizeof half);
}

VCRD_LANES void store(Floats x, Float16* out) {
#if VCRD_REGISTER_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif VCRD_REGISTER_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) out[i].bits = float_to_float16(x[i]);
#endif
}

// If both models have bfloat16, the first register of a pair takes the even columns and the second one the odd columns.
// They are the halves of 32 bits, so that a shift and a mask replace widening and narrowing.
template <class S, class T>
constexpr bool kInHalves = std::is_same_v<S, BFloat16> && std::is_same_v<T, BFloat16>;

constexpr uint32_t kUpperHalf = 0xffff0000u;

template <bool kHalves, class T>
VCRD_LANES Pair load_pair(const T* in) {
  if constexpr (kHalves) {
    Bits both;
    memcpy(&both, in, sizeof both);
    return {(Floats)(both << 16), (Floats)(both & kUpperHalf)};
  } else {
    return {load(in), load(in + kLanes)};
  }
}

template <bool kHalves, class T>
VCRD_LANES void store_pair(Pair x, T* out) {
  if constexpr (kHalves) {
    Bits both = rounded_to_bfloat16<Bits>(x.first) >> 16 | (rounded_to_bfloat16<Bits>(x.second) & kUpperHalf);
    memcpy(out, &both, sizeof both);
  } else {
    store(x.first, out);
    store(x.second, out + kLanes);
  }
}

constexpr int64_t kAhead = 2048;  // bytes

// Far enough ahead to hide the latency of memory. A prefetch past the end of the row or of the memory does nothing.
VCRD_LANES void prefetch_ahead(const void* in) { __builtin_prefetch(static_cast<const char*>(in) + kAhead, 0, 2); }

// The last columns of a row, fewer than a pair, copied to where a whole pair can be read. The columns behind them get
// no probability (-inf), for which the 8-bit code has no number.
template <class T>
struct Padded {
  static constexpr bool kCoded = std::is_same_v<T, Sqrt8>;
  std::conditional_t<kCoded, float, T> columns[2 * kLanes];

  Padded(const T* in, int64_t n) {
    store_pair<false>({all_lanes(-INFINITY), all_lanes(-INFINITY)}, columns);
    if constexpr (kCoded) {
      for (int64_t i = 0; i < n; ++i) columns[i] = widened(in, i);
    } else {
      memcpy(static_cast<void*>(columns), in, n * sizeof(T));
    }
  }
};

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
