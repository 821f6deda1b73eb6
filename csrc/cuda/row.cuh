// How a row of logits is read: in packs of columns that fill one load of 16 bytes, whatever the row's alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../elementwise.h"
#include "../kernels.h"

namespace vcrd::cuda {

// The teacher's 8-bit code; see Dtype::kDistance8.
struct Distance8 {
  uint8_t code;
};

template <int kWords>
struct Words {
  uint32_t at[kWords];
};

template <int kWords>
__device__ __forceinline__ Words<kWords> load_words(const char* aligned) {
  if constexpr (kWords == 4) {
    uint4 v = *reinterpret_cast<const uint4*>(aligned);
    return {v.x, v.y, v.z, v.w};
  } else if constexpr (kWords == 2) {
    uint2 v = *reinterpret_cast<const uint2*>(aligned);
    return {v.x, v.y};
  } else {
    return {*reinterpret_cast<const uint32_t*>(aligned)};
  }
}

// By intrinsics, since a plain assignment the compiler takes apart into words; streaming, since what is written here
// exceeds the cache long before it is read.
template <int kWords>
__device__ __forceinline__ void store_words(char* aligned, const Words<kWords>& w) {
  if constexpr (kWords == 4)
    __stcs(reinterpret_cast<uint4*>(aligned), make_uint4(w.at[0], w.at[1], w.at[2], w.at[3]));
  else if constexpr (kWords == 2)
    __stcs(reinterpret_cast<uint2*>(aligned), make_uint2(w.at[0], w.at[1]));
  else
    __stcs(reinterpret_cast<unsigned int*>(aligned), w.at[0]);
}

// Words that begin `past` bytes after `aligned`, from the two aligned groups that hold them.
template <int kWords>
__device__ __forceinline__ Words<kWords> load_realigned(const char* aligned, uint32_t past) {
  Words<kWords> low = load_words<kWords>(aligned), high = load_words<kWords>(aligned + 4 * kWords);
  uint32_t both[2 * kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) both[i] = low.at[i], both[kWords + i] = high.at[i];
  // Shifts by two words and by one, so that registers are never indexed by a number known at run time alone.
#pragma unroll
  for (int step = kWords / 2; step; step /= 2) {
    bool shift = past & (4 * step);
#pragma unroll
    for (int i = 0; i + step < 2 * kWords; ++i) both[i] = shift ? both[i + step] : both[i];
  }
  Words<kWords> out;
#pragma unroll
  for (int i = 0; i < kWords; ++i) out.at[i] = __funnelshift_r(both[i], both[i + 1], past % 4 * 8);
  return out;
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, int kColumns, int kWords>
__device__ __forceinline__ void unpack(const Words<kWords>& words, float* out) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    uint32_t w = words.at[i];
    if constexpr (std::is_same_v<T, float>) {
      out[i] = from_bits(w);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      out[2 * i] = from_bits(w << 16);
      out[2 * i + 1] = from_bits(w & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, __half>) {
      float2 both = __half22float2(bits_as<__half2>(w));
      out[2 * i] = both.x;
      out[2 * i + 1] = both.y;
    } else {
      // A byte in the low mantissa bits of 2^23, less 2^23: two fast operations where a conversion is a slow one.
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[4 * i + j] = distance8_to_float(from_bits(__byte_perm(w, 0x4b000000u, 0x7650 + j)) - 8388608.0f);
    }
  }
}

template <class T, int kWords>
__device__ __forceinline__ Words<kWords> pack(const float* in) {
  Words<kWords> words;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (std::is_same_v<T, float>)
      words.at[i] = to_bits(in[i]);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
      words.at[i] = bits_as<uint32_t>(__floats2bfloat162_rn(in[2 * i], in[2 * i + 1]));
    else
      words.at[i] = bits_as<uint32_t>(__floats2half2_rn(in[2 * i], in[2 * i + 1]));
  }
  return words;
}

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(Distance8 x) { return distance8_to_float(x.code); }

template <class T>
__device__ __forceinline__ T narrowed(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// A row cut into packs of kColumns, the first of which may begin `lead` columns before the row.
struct Cut {
  int columns;  // of the row
  int lead;
  int packs;

  __device__ int first_column(int pack, int pack_columns) const { return pack * pack_columns - lead; }
};

// Packs begin where `align` is a multiple of the pack's size.
template <class T, int kColumns>
__device__ __forceinline__ Cut cut_at(const T* align, int columns) {
  constexpr int kBytes = kColumns * sizeof(T);
  int lead = static_cast<int>(reinterpret_cast<uintptr_t>(align) % kBytes / sizeof(T));
  return {columns, lead, (columns + lead + kColumns - 1) / kColumns};
}

// Reads packs of one row of one tensor. Holds as little as it can: what only the row's ends need is worked out there.
template <class T, int kColumns>
class Reader {
 public:
  static constexpr int kBytes = kColumns * sizeof(T);
  static constexpr int kWords = kBytes / 4;
  static_assert(kBytes % 4 == 0 && kBytes <= 16);

  __device__ Reader(const T* row, const Cut& cut)
      : first_(reinterpret_cast<const char*>(row) - cut.lead * sizeof(T)), cut_(cut) {}

  __device__ bool aligned() const { return past() == 0; }

  // A pack inside the row, of an aligned reader.
  __device__ Words<kWords> aligned_pack(int pack) const { return load_words<kWords>(address(pack)); }

  // Any pack; `outside` where the row has no column.
  __device__ void any_pack(int pack, float outside, float* out) const {
    // A realigned pack touches up to a pack's size beyond either end of it.
    const uint32_t past_alignment = past();
    const int margin = past_alignment ? kColumns : 0, column = cut_.first_column(pack, kColumns);
    if (column >= margin && column + kColumns + margin <= cut_.columns) {
      const char* at = address(pack) - past_alignment;
      unpack<T, kColumns>(past_alignment ? load_realigned<kWords>(at, past_alignment) : load_words<kWords>(at), out);
      return;
    }
    const T* row = reinterpret_cast<const T*>(first_) + cut_.lead;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      out[i] = column + i >= 0 && column + i < cut_.columns ? widened(row[column + i]) : outside;
  }

 private:
  __device__ const char* address(int pack) const { return first_ + int64_t(pack) * kBytes; }
  __device__ uint32_t past() const { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first_) % kBytes); }

  const char* first_;  // where pack 0 begins
  Cut cut_;
};

// Reads packs of student and teacher side by side, a batch of two per thread at a time: up to 64 bytes on their way.
template <class S, class T>
class RowPair {
 public:
  static constexpr int kColumns = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));  // of a pack
  static constexpr int kPacks = 2;                                                       // of a batch
  static constexpr int kBatch = kPacks * kColumns;

  __device__ RowPair(const S* student, const T* teacher, const Cut& cut)
      : student_(student, cut), teacher_(teacher, cut) {
    begin_ = cut.lead ? 1 : 0;
    end_ = student_.aligned() && teacher_.aligned() ? (cut.columns + cut.lead) / kColumns : 0;
  }

  // Packs first, first + stride, ... below `end`; -inf where there is no column. True when every column exists.
  __device__ __forceinline__ bool read(int first, int stride, int end, float (&s)[kBatch], float (&t)[kBatch]) const {
    int last = first + (kPacks - 1) * stride;
    if (first >= begin_ && last < min(end, end_)) {
      // All loads are on their way before the first is used.
      Words<Reader<S, kColumns>::kWords> student[kPacks];
      Words<Reader<T, kColumns>::kWords> teacher[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        student[i] = student_.aligned_pack(first + i * stride);
        teacher[i] = teacher_.aligned_pack(first + i * stride);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        unpack<S, kColumns>(student[i], s + i * kColumns);
        unpack<T, kColumns>(teacher[i], t + i * kColumns);
      }
      return true;
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      int pack = first + i * stride;
      if (pack < end) {
        student_.any_pack(pack, -INFINITY, s + i * kColumns);
        teacher_.any_pack(pack, -INFINITY, t + i * kColumns);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) s[i * kColumns + j] = t[i * kColumns + j] = -INFINITY;
      }
    }
    return false;
  }

 private:
  Reader<S, kColumns> student_;
  Reader<T, kColumns> teacher_;
  int begin_, end_;  // packs that are whole, and aligned in both
};

}  // namespace vcrd::cuda
