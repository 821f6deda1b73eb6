// First pass: the statistics of each row, and the merge of its shards. Part of loops.h.
#pragma once

#include "block.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

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

template <bool kTempered, bool kReverse>
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
    if constexpr (kReverse) reverse_cross += eu * (u - distance(t[i], teacher_at_student_action));
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

template <class S, class T, bool kTempered, bool kReverse>
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
        sums.raise_student(double(student_max) - out.student_max, double(teacher_there) - out.teacher_at_student_action,
                           p.inverse_temperature);
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
    add_block<kTempered, kReverse>(s, t, n, out.student_max == -INFINITY ? 0.0f : out.student_max,
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

template <class S, class T, bool kTempered, bool kReverse>
void row_statistics(const StatisticsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    p.partials[row] = masked(p.tokens.mask, row) ? RowPartial{} : row_partial<S, T, kTempered, kReverse>(p, row);
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

}  // namespace
}  // namespace vcrd::cpu::VCRD_INSTRUCTION_SET
