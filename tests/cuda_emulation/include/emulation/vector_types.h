// CUDA's vector types, with CUDA's alignment: UndefinedBehaviorSanitizer then sees a misaligned load.
#pragma once

#define VCRD_EMULATION_VECTORS(type, name, one, two, four)                                              \
  struct name##1 { type x; };                                                                           \
  struct alignas(two) name##2 { type x, y; };                                                           \
  struct name##3 { type x, y, z; };                                                                     \
  struct alignas(four) name##4 { type x, y, z, w; };                                                    \
  static_assert(sizeof(type) == (one) && sizeof(name##2) == 2 * (one) && sizeof(name##4) == 4 * (one)); \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                      \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                           \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

VCRD_EMULATION_VECTORS(signed char, char, 1, 2, 4)
VCRD_EMULATION_VECTORS(unsigned char, uchar, 1, 2, 4)
VCRD_EMULATION_VECTORS(short, short, 2, 4, 8)
VCRD_EMULATION_VECTORS(unsigned short, ushort, 2, 4, 8)
VCRD_EMULATION_VECTORS(int, int, 4, 8, 16)
VCRD_EMULATION_VECTORS(unsigned, uint, 4, 8, 16)
VCRD_EMULATION_VECTORS(long long, longlong, 8, 16, 16)
VCRD_EMULATION_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
VCRD_EMULATION_VECTORS(float, float, 4, 8, 16)
VCRD_EMULATION_VECTORS(double, double, 8, 16, 16)
#undef VCRD_EMULATION_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
