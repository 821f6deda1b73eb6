// How a row of logits is read: in vectors of columns that one load of 16 bytes fetches, whatever the row's alignment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../elementwise.h"
#include "../kernels.h"

namespace vcrd::cuda {

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

// Intrinsics, because the compiler splits a plain assignment into words. Streaming stores, because the output exceeds
// the cache long before anything reads it.
template <int kWords>
__device__ __forceinline__ void store_words(char* aligned, const Words<kWords>& w) {
  if constexpr (kWords == 4)
    __stcs(reinterpret_cast<uint4*>(aligned), make_uint4(w.at[0], w.at[1], w.at[2], w.at[3]));
  else if constexpr (kWords == 2)
    __stcs(reinterpret_cast<uint2*>(aligned), make_uint2(w.at[0], w.at[1]));
  else
    __stcs(reinterpret_cast<unsigned int*>(aligned), w.at[0]);
}

// The words that begin `past` bytes after `aligned`, from the two aligned vectors that hold them.
template <int kWords>
__device__ __forceinline__ Words<kWords> load_realigned(const char* aligned, uint32_t past) {
  Words<kWords> low = load_words<kWords>(aligned), high = load_words<kWords>(aligned + 4 * kWords);
  uint32_t both[2 * kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) both[i] = low.at[i], both[kWords + i] = high.at[i];
  // Shifts by two words and by one: an index that is known at run time only would move the registers to local memory.
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
__device__ __forceinline__ void to_floats(const Words<kWords>& words, float* out) {
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
      // Puts the byte into the low mantissa bits of 2^23 and subtracts 2^23: two fast operations in place of a slow
      // conversion.
#pragma unroll
      for (int j = 0; j < 4; ++j)
        out[4 * i + j] = sqrt8_to_float(from_bits(__byte_perm(w, 0x4b000000u, 0x7650 + j)) - 8388608.0f);
    }
  }
}

template <class T, int kWords>
__device__ __forceinline__ Words<kWords> to_words(const float* in) {
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
__device__ __forceinline__ float widened(Sqrt8 x) { return sqrt8_to_float(x.code); }

template <class T>
__device__ __forceinline__ T narrowed(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// How a row is divided into vectors of kColumns. The first vector begins `misalignment` columns before the row.
struct Tiling {
  int columns;  // of the row
  int misalignment;
  int vectors;

  __device__ int first_column(int vector, int vector_columns) const { return vector * vector_columns - misalignment; }
};

// The tiling whose vectors are aligned for a row that begins at `align`.
template <class T, int kColumns>
__device__ __forceinline__ Tiling tiling_at(const T* align, int columns) {
  constexpr int kBytes = kColumns * sizeof(T);
  int misalignment = static_cast<int>(reinterpret_cast<uintptr_t>(align) % kBytes / sizeof(T));
  return {columns, misalignment, (columns + misalignment + kColumns - 1) / kColumns};
}

// Reads vectors of one row of one tensor. It holds little, to save registers: what only the ends of a row need is
// computed there.
template <class T, int kColumns>
class Reader {
 public:
  static constexpr int kBytes = kColumns * sizeof(T);
  static constexpr int kWords = kBytes / 4;
  static_assert(kBytes % 4 == 0 && kBytes <= 16);

  __device__ Reader(const T* row, const Tiling& tiling)
      : first_(reinterpret_cast<const char*>(row) - tiling.misalignment * sizeof(T)), tiling_(tiling) {}

  __device__ bool aligned() const { return past() == 0; }

  // A vector inside the row. The reader must be aligned.
  __device__ Words<kWords> aligned_vector(int vector) const { return load_words<kWords>(address(vector)); }

  // Any vector. Columns outside the row get the value `outside`.
  __device__ void any_vector(int vector, float outside, float* out) const {
    // Realignment reads up to one vector beyond either end of this one.
    const uint32_t past_alignment = past();
    const int margin = past_alignment ? kColumns : 0, column = tiling_.first_column(vector, kColumns);
    if (column >= margin && column + kColumns + margin <= tiling_.columns) {
      const char* at = address(vector) - past_alignment;
      to_floats<T, kColumns>(past_alignment ? load_realigned<kWords>(at, past_alignment) : load_words<kWords>(at), out);
      return;
    }
    const T* row = reinterpret_cast<const T*>(first_) + tiling_.misalignment;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      out[i] = column + i >= 0 && column + i < tiling_.columns ? widened(row[column + i]) : outside;
  }

 private:
  __device__ const char* address(int vector) const { return first_ + int64_t(vector) * kBytes; }
  __device__ uint32_t past() const { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first_) % kBytes); }

  const char* first_;  // where vector 0 begins
  Tiling tiling_;
};

// Reads vectors of student and teacher side by side. A thread reads a batch of two at a time, so that up to 64 bytes
// are in flight.
template <class S, class T>
class RowPair {
 public:
  static constexpr int kColumns = 16 / (sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));  // in a vector
  static constexpr int kVectors = 2;                                                     // in a batch
  static constexpr int kBatch = kVectors * kColumns;

  __device__ RowPair(const S* student, const T* teacher, const Tiling& tiling)
      : student_(student, tiling), teacher_(teacher, tiling) {
    begin_ = tiling.misalignment ? 1 : 0;
    end_ = student_.aligned() && teacher_.aligned() ? (tiling.columns + tiling.misalignment) / kColumns : 0;
  }

  // Reads the vectors first, first + stride, ... below `end`, with -inf where there is no column. Returns whether every
  // column exists.
  __device__ __forceinline__ bool read(int first, int stride, int end, float (&s)[kBatch], float (&t)[kBatch]) const {
    int last = first + (kVectors - 1) * stride;
    if (first >= begin_ && last < min(end, end_)) {
      // Issues all loads before it uses the first.
      Words<Reader<S, kColumns>::kWords> student[kVectors];
      Words<Reader<T, kColumns>::kWords> teacher[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        student[i] = student_.aligned_vector(first + i * stride);
        teacher[i] = teacher_.aligned_vector(first + i * stride);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        to_floats<S, kColumns>(student[i], s + i * kColumns);
        to_floats<T, kColumns>(teacher[i], t + i * kColumns);
      }
      return true;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      int vector = first + i * stride;
      if (vector < end) {
        student_.any_vector(vector, -INFINITY, s + i * kColumns);
        teacher_.any_vector(vector, -INFINITY, t + i * kColumns);
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
  int begin_, end_;  // the range of the vectors that are complete and aligned in both tensors
};

}  // namespace vcrd::cuda
