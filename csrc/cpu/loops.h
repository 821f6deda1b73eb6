// The CPU loops. Compiled once per instruction set: the including file defines VCRD_INSTRUCTION_SET and sets the
// compiler's target, and must have included the standard headers before that. Blocks of columns stay in the first-level
// cache: one sweep finds the block's maximum, a second takes the exponentials.
#include "../kernels.h"
#include "../math.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

constexpr int64_t kBlock = 512;

// float32 is used where it lies; the narrow types are widened into a buffer of one block.
inline const float* widen(const float* in, float*, int64_t) { return in; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline const float* widen(const BFloat16* in, float* buffer, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = bfloat16_to_float(in[i].bits);
  return buffer;
}

inline const float* widen(const Float16* in, float* buffer, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = float16_to_float(in[i].bits);
  return buffer;
}

inline void narrow(const float* in, float* out, int64_t n) { memcpy(out, in, n * sizeof(float)); }

inline void narrow(const float* in, BFloat16* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i].bits = float_to_bfloat16(in[i]);
}

inline void narrow(const float* in, Float16* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i].bits = float_to_float16(in[i]);
}

template <class T>
const T* row_of(const Logits& logits, int64_t row) {
  return static_cast<const T*>(logits.data) + row * logits.stride;
}

inline bool masked(const uint8_t* mask, int64_t row) { return mask && !mask[row]; }

// The sweep for the maximum waits for memory, the sweep of exponentials does not: so each block's exponentials are
// taken while the next block is on its way.
template <class T>
void prefetch(const T* row, int64_t begin, int64_t columns) {
  int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
  for (int64_t i = begin; i < end; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

inline float block_maximum(const float* x, int64_t n) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < n; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  return maximum;
}

inline int64_t first_index_of(const float* x, float value) {
  int64_t i = 0;
  while (x[i] != value) ++i;
  return i;
}

// One row's sums relative to the maxima so far. Blocks are summed in float32, rows in double.
struct RowSums {
  double student = 0, teacher = 0, student_moment = 0, teacher_moment = 0;
  double student_tempered = 0, teacher_tempered = 0, forward_cross = 0, reverse_cross = 0;

  // The student's maximum rises by `rise`: every u falls by it. The teacher's logit there is higher by `teacher_rise`.
  void raise_student(double rise, double teacher_rise, double inverse_temperature) {
    double scale = exp(-rise), tempered = exp(-rise * inverse_temperature);
    student_moment = scale * (student_moment - rise * student);
    student *= scale;
    reverse_cross = tempered * (reverse_cross + (teacher_rise - rise) * student_tempered);
    student_tempered *= tempered;
    forward_cross += rise * teacher_tempered;
  }

  void raise_teacher(double rise, double inverse_temperature) {
    double scale = exp(-rise), tempered = exp(-rise * inverse_temperature);
    teacher_moment = scale * (teacher_moment - rise * teacher);
    teacher *= scale;
    forward_cross = tempered * (forward_cross - rise * teacher_tempered);
    teacher_tempered *= tempered;
  }
};

template <bool kTempered>
void add_block(const float* s, const float* t, int64_t n, float student_max, float teacher_max,
               float teacher_at_student_action, float inverse_temperature, RowSums& sums) {
  float student = 0, teacher = 0, student_moment = 0, teacher_moment = 0;
  float student_tempered = 0, teacher_tempered = 0, forward_cross = 0, reverse_cross = 0;
#pragma omp simd reduction(+ : student, teacher, student_moment, teacher_moment, student_tempered, teacher_tempered, \
                               forward_cross, reverse_cross)
  for (int64_t i = 0; i < n; ++i) {
    float u = distance(s[i], student_max), v = distance(t[i], teacher_max);
    float eu = exponential(u), ev = exponential(v);
    student += eu;
    teacher += ev;
    student_moment += eu * u;
    teacher_moment += ev * v;
    if constexpr (kTempered) {
      eu = exponential(u * inverse_temperature);
      ev = exponential(v * inverse_temperature);
      student_tempered += eu;
      teacher_tempered += ev;
    }
    forward_cross += ev * (v - u);
    reverse_cross += eu * (u - distance(t[i], teacher_at_student_action));
  }
  sums.student += student;
  sums.teacher += teacher;
  sums.student_moment += student_moment;
  sums.teacher_moment += teacher_moment;
  sums.student_tempered += kTempered ? student_tempered : student;
  sums.teacher_tempered += kTempered ? teacher_tempered : teacher;
  sums.forward_cross += forward_cross;
  sums.reverse_cross += reverse_cross;
}

template <class S, class T, bool kTempered>
RowPartial row_partial(const StatisticsParams& p, int64_t row) {
  const S* student = row_of<S>(p.student, row);
  const T* teacher = row_of<T>(p.teacher, row);
  alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock];
  RowPartial out = {};
  out.student_max = out.teacher_max = -INFINITY;
  out.student_action = out.teacher_action = static_cast<int32_t>(p.tokens.first_column);
  RowSums sums;
  int64_t label = p.tokens.labels && p.tokens.labels[row] >= 0 ? p.tokens.labels[row] - p.tokens.first_column : -1;
  for (int64_t begin = 0; begin < p.tokens.columns; begin += kBlock) {
    int64_t n = p.tokens.columns - begin < kBlock ? p.tokens.columns - begin : kBlock;
    const float* s = widen(student + begin, student_buffer, n);
    const float* t = widen(teacher + begin, teacher_buffer, n);
    float student_max = block_maximum(s, n), teacher_max = block_maximum(t, n);
    if (student_max > out.student_max) {
      int64_t i = first_index_of(s, student_max);
      float teacher_there = at_least_lowest(t[i]);
      if (out.student_max != -INFINITY)
        sums.raise_student(double(student_max) - out.student_max,
                           double(teacher_there) - out.teacher_at_student_action, p.inverse_temperature);
      out.student_max = student_max;
      out.student_action = static_cast<int32_t>(p.tokens.first_column + begin + i);
      out.teacher_at_student_action = teacher_there;
    }
    if (teacher_max > out.teacher_max) {
      if (out.teacher_max != -INFINITY)
        sums.raise_teacher(double(teacher_max) - out.teacher_max, p.inverse_temperature);
      int64_t i = first_index_of(t, teacher_max);
      out.teacher_max = teacher_max;
      out.teacher_action = static_cast<int32_t>(p.tokens.first_column + begin + i);
      out.student_at_teacher_action = s[i];
    }
    if (label >= begin && label < begin + n) {
      out.has_label = 1;
      out.student_label = s[label - begin];
      out.teacher_label = t[label - begin];
    }
    prefetch(student, begin + kBlock, p.tokens.columns);
    prefetch(teacher, begin + kBlock, p.tokens.columns);
    // Before any finite logit the maximum is -inf, from which there is no distance.
    add_block<kTempered>(s, t, n, out.student_max == -INFINITY ? 0.0f : out.student_max,
                         out.teacher_max == -INFINITY ? 0.0f : out.teacher_max, out.teacher_at_student_action,
                         p.inverse_temperature, sums);
  }
  out.student_sum = static_cast<float>(sums.student);
  out.teacher_sum = static_cast<float>(sums.teacher);
  out.student_moment = static_cast<float>(sums.student_moment);
  out.teacher_moment = static_cast<float>(sums.teacher_moment);
  out.student_tempered_sum = static_cast<float>(sums.student_tempered);
  out.teacher_tempered_sum = static_cast<float>(sums.teacher_tempered);
  out.forward_cross = static_cast<float>(sums.forward_cross);
  out.reverse_cross = static_cast<float>(sums.reverse_cross);
  return out;
}

template <class S, class T, bool kTempered>
void row_statistics(const StatisticsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    p.partials[row] = masked(p.tokens.mask, row) ? RowPartial{} : row_partial<S, T, kTempered>(p, row);
}

void merge_statistics(const MergeParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    MergedRow merged = {};
    bool labelled = p.labels && p.labels[row] >= 0;
    if (!masked(p.mask, row))
      merged = merge_row(p.partials + row, p.shards, p.rows, labelled, p.inverse_temperature, p.divergence);
    for (int32_t i = 0; i < kStatistics; ++i) p.statistics[i * p.rows + row] = merged.statistics[i];
    p.actions[row] = merged.student_action;
    p.actions[p.rows + row] = merged.teacher_action;
    p.constants[row] = merged.constants;
  }
}

template <class S, class T, Divergence kDivergence>
void mixture_sums(const MixtureParams& p, int64_t begin, int64_t end) {
  alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    double divergence = 0, centre = 0;
    if (!masked(p.tokens.mask, row)) {
      const RowConstants c = p.constants[row];
      const float anchor = mixture_anchor<kDivergence>(c, p.inverse_temperature, p.teacher_share);
      for (int64_t block = 0; block < p.tokens.columns; block += kBlock) {
        int64_t n = p.tokens.columns - block < kBlock ? p.tokens.columns - block : kBlock;
        const float* s = widen(row_of<S>(p.student, row) + block, student_buffer, n);
        const float* t = widen(row_of<T>(p.teacher, row) + block, teacher_buffer, n);
        float block_divergence = 0, block_centre = 0;
#pragma omp simd reduction(+ : block_divergence, block_centre)
        for (int64_t i = 0; i < n; ++i) {
          float u = distance(s[i], c.student_max) * p.inverse_temperature;
          float v = distance(t[i], c.teacher_max) * p.inverse_temperature;
          float student = exponential(u) * c.student_tempered_inverse_sum;
          float teacher = exponential(v) * c.teacher_tempered_inverse_sum;
          MixtureElement e =
              mixture_element<kDivergence>(teacher, student, u - v - c.log_sum_difference, p.teacher_share);
          block_divergence += e.term;
          block_centre += student * (e.potential - anchor);
        }
        divergence += block_divergence;
        centre += block_centre;
      }
    }
    p.sums[2 * row] = static_cast<float>(divergence);
    p.sums[2 * row + 1] = static_cast<float>(centre);
  }
}

// What one row's gradient needs besides its logits. `centre` and `anchor`: see MixtureElement.
struct RowGradient {
  RowConstants constants;
  float inverse_temperature, teacher_share;
  float anchor, centre;
  float divergence_scale, cross_entropy_scale;
};

// out[i] = divergence_scale * slope(i) + cross_entropy_scale * q(i) at temperature 1; the label is the caller's.
template <Divergence kDivergence, bool kTempered>
void gradient_block(const float* s, const float* t, int64_t n, const RowGradient& row, float* out) {
  const RowConstants c = row.constants;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float distance_u = distance(s[i], c.student_max), distance_v = distance(t[i], c.teacher_max);
    float u = kTempered ? distance_u * row.inverse_temperature : distance_u;
    float v = kTempered ? distance_v * row.inverse_temperature : distance_v;
    float q = exponential(u) * c.student_tempered_inverse_sum;
    float slope;
    if constexpr (kDivergence == Divergence::kReverseKl) {
      slope = q * (reverse_potential(u, t[i], c, row.inverse_temperature) - row.centre);
    } else {
      float p = exponential(v) * c.teacher_tempered_inverse_sum;
      if constexpr (kDivergence == Divergence::kForwardKl) {
        slope = q - p;
      } else if constexpr (kDivergence == Divergence::kJeffreys) {
        slope = 0.5f * ((q - p) + q * (reverse_potential(u, t[i], c, row.inverse_temperature) - row.centre));
      } else {
        MixtureElement e = mixture_element<kDivergence>(p, q, u - v - c.log_sum_difference, row.teacher_share);
        slope = q * ((e.potential - row.anchor) - row.centre);
      }
    }
    float untempered = kTempered ? exponential(distance_u) * c.student_inverse_sum : q;
    out[i] = row.divergence_scale * slope + row.cross_entropy_scale * untempered;
  }
}

template <class S, class T, Divergence kDivergence, bool kTempered>
void gradient(const GradientParams& p, int64_t begin, int64_t end) {
  alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock], gradient_buffer[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    S* out = static_cast<S*>(p.gradient) + row * p.gradient_stride;
    float divergence_scale = p.divergence_gradient ? p.divergence_gradient[row] * p.inverse_temperature : 0.0f;
    float cross_entropy_scale = p.cross_entropy_gradient ? p.cross_entropy_gradient[row] : 0.0f;
    int64_t label = p.tokens.labels ? p.tokens.labels[row] : -1;
    if (label < 0) cross_entropy_scale = 0.0f;
    if (masked(p.tokens.mask, row) || (divergence_scale == 0.0f && cross_entropy_scale == 0.0f)) {
      memset(static_cast<void*>(out), 0, p.gradient_columns * sizeof(S));
      continue;
    }
    RowGradient g{p.constants[row], p.inverse_temperature, p.teacher_share, 0.0f, p.constants[row].reverse_centre,
                  divergence_scale, cross_entropy_scale};
    if constexpr (kDivergence >= Divergence::kJsd) {
      g.anchor = mixture_anchor<kDivergence>(g.constants, p.inverse_temperature, p.teacher_share);
      g.centre = p.sums[2 * row + 1];
    }
    label -= p.tokens.first_column;
    for (int64_t block = 0; block < p.tokens.columns; block += kBlock) {
      int64_t n = p.tokens.columns - block < kBlock ? p.tokens.columns - block : kBlock;
      const float* s = widen(row_of<S>(p.student, row) + block, student_buffer, n);
      const float* t = widen(row_of<T>(p.teacher, row) + block, teacher_buffer, n);
      // Through a buffer also for float32: the compiler need not fear that `out` is `s`.
      gradient_block<kDivergence, kTempered>(s, t, n, g, gradient_buffer);
      if (label >= block && label < block + n) gradient_buffer[label - block] -= cross_entropy_scale;
      narrow(gradient_buffer, out + block, n);
    }
    memset(static_cast<void*>(out + p.tokens.columns), 0, (p.gradient_columns - p.tokens.columns) * sizeof(S));
  }
}

// Turns run-time choices into template arguments, one at a time.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat16: return f(Float16{});
  }
}

template <Divergence kValue>
struct DivergenceTag {
  static constexpr Divergence value = kValue;
};

template <class F>
void with_divergence(Divergence divergence, F f) {
  switch (divergence) {
    case Divergence::kForwardKl: return f(DivergenceTag<Divergence::kForwardKl>{});
    case Divergence::kReverseKl: return f(DivergenceTag<Divergence::kReverseKl>{});
    case Divergence::kJeffreys: return f(DivergenceTag<Divergence::kJeffreys>{});
    case Divergence::kJsd: return f(DivergenceTag<Divergence::kJsd>{});
    case Divergence::kSkewKl: return f(DivergenceTag<Divergence::kSkewKl>{});
    case Divergence::kSkewReverseKl: return f(DivergenceTag<Divergence::kSkewReverseKl>{});
  }
}

template <class Params, class F>
void with_dtypes(const Params& p, F f) {
  with_dtype(p.student.dtype, [&](auto s) { with_dtype(p.teacher.dtype, [&](auto t) { f(s, t); }); });
}

void launch_row_statistics(const StatisticsParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    p.inverse_temperature == 1.0f ? row_statistics<S, T, false>(p, begin, end)
                                  : row_statistics<S, T, true>(p, begin, end);
  });
}

void launch_mixture_sums(const MixtureParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    with_divergence(p.divergence, [&](auto divergence) {
      if constexpr (decltype(divergence)::value >= Divergence::kJsd)
        mixture_sums<decltype(s), decltype(t), decltype(divergence)::value>(p, begin, end);
    });
  });
}

void launch_gradient(const GradientParams& p, int64_t begin, int64_t end) {
  with_dtypes(p, [&](auto s, auto t) {
    with_divergence(p.divergence, [&](auto divergence) {
      using S = decltype(s);
      using T = decltype(t);
      constexpr Divergence kDivergence = decltype(divergence)::value;
      p.inverse_temperature == 1.0f ? gradient<S, T, kDivergence, false>(p, begin, end)
                                    : gradient<S, T, kDivergence, true>(p, begin, end);
    });
  });
}

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET

namespace vcrd::cpu {

#define VCRD_STRING_(x) #x
#define VCRD_STRING(x) VCRD_STRING_(x)
#define VCRD_JOIN_(a, b) a##b
#define VCRD_JOIN(a, b) VCRD_JOIN_(a, b)

const Kernels& VCRD_JOIN(VCRD_INSTRUCTION_SET, _kernels)() {
  using namespace VCRD_INSTRUCTION_SET;
  static const Kernels kernels = {launch_row_statistics, merge_statistics, launch_mixture_sums, launch_gradient,
                                  VCRD_STRING(VCRD_INSTRUCTION_SET)};
  return kernels;
}

}  // namespace vcrd::cpu
