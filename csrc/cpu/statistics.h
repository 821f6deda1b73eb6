// First pass: the statistics of each row, and the merge of its shards. Part of loops.h.
#pragma once

#include "../merge.h"
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

// A block ready for its exponentials: float32, and its maxima known.
struct Block {
  const float* student;
  const float* teacher;
  float student_max, teacher_max;
};

// The block that follows, still where the logits lie.
template <class S, class T>
struct Following {
  const S* student;
  const T* teacher;
  float* student_buffer;
  float* teacher_buffer;
};

template <class T>
const float* where(const T* in, float* buffer) {
  if constexpr (std::is_same_v<T, float>)
    return in;
  else
    return buffer;
}

template <class S, class T>
Block prepare(const Following<S, T>& from, int64_t n) {
  return {where(from.student, from.student_buffer), where(from.teacher, from.teacher_buffer),
          widen_and_maximum(from.student, from.student_buffer, n),
          widen_and_maximum(from.teacher, from.teacher_buffer, n)};
}

// Adds the block's sums. With kPrepare it also prepares the following block, of equal length, in the same loop: looking
// for maxima waits for memory, exponentials do not, and so each is done while the other waits. For float32 alone: with
// lanes of two widths the narrow types lose more than they gain, and prefetch the following block instead.
template <class S, class T, bool kTempered, bool kReverse, bool kPrepare>
Block add_block(const Block& block, int64_t n, float student_max, float teacher_max, float teacher_at_student_action,
                float inverse_temperature, const Following<S, T>& following, RowSums& sums) {
  const float *s = block.student, *t = block.teacher;
  const S* next_student = following.student;
  const T* next_teacher = following.teacher;
  float student = 0, teacher = 0, student_moment = 0, teacher_moment = 0;
  float student_tempered = 0, teacher_tempered = 0, forward_cross = 0, reverse_cross = 0;
  float next_student_max = -INFINITY, next_teacher_max = -INFINITY;
#pragma omp simd reduction(+ : student, teacher, student_moment, teacher_moment, student_tempered, teacher_tempered, \
                               forward_cross, reverse_cross) reduction(max : next_student_max, next_teacher_max)
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kPrepare) {
      float x = next_student[i], y = next_teacher[i];
      next_student_max = x > next_student_max ? x : next_student_max;
      next_teacher_max = y > next_teacher_max ? y : next_teacher_max;
    }
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
  return {where(next_student, following.student_buffer), where(next_teacher, following.teacher_buffer),
          next_student_max, next_teacher_max};
}

// Takes note of the block's maxima where they exceed those so far, and moves the sums to them.
inline void raise_maxima(const Block& block, int64_t first_id, float inverse_temperature, RowPartial& out,
                         RowSums& sums) {
  if (block.student_max > out.student_max) {
    int64_t i = first_index_of(block.student, block.student_max);
    float teacher_there = at_least_lowest(block.teacher[i]);
    if (out.student_max != -INFINITY)
      sums.raise_student(double(block.student_max) - out.student_max,
                         double(teacher_there) - out.teacher_at_student_action, inverse_temperature);
    out.student_max = block.student_max;
    out.student_action = static_cast<int32_t>(first_id + i);
    out.teacher_at_student_action = teacher_there;
  }
  if (block.teacher_max > out.teacher_max) {
    if (out.teacher_max != -INFINITY)
      sums.raise_teacher(double(block.teacher_max) - out.teacher_max, inverse_temperature);
    int64_t i = first_index_of(block.teacher, block.teacher_max);
    out.teacher_max = block.teacher_max;
    out.teacher_action = static_cast<int32_t>(first_id + i);
    out.student_at_teacher_action = block.student[i];
  }
}

template <class S, class T, bool kTempered, bool kReverse>
RowPartial row_partial(const StatisticsParams& p, int64_t row) {
  const S* student = row_of<S>(p.student, row);
  const T* teacher = row_of<T>(p.teacher, row);
  alignas(64) float student_buffers[2][kBlock], teacher_buffers[2][kBlock];
  const int64_t columns = p.tokens.columns;
  auto length = [&](int64_t begin) { return columns - begin < kBlock ? columns - begin : kBlock; };
  auto block_at = [&](int64_t begin) {
    int64_t parity = begin / kBlock % 2;
    return Following<S, T>{student + begin, teacher + begin, student_buffers[parity], teacher_buffers[parity]};
  };
  RowPartial out = {};
  out.student_max = out.teacher_max = -INFINITY;
  out.student_action = out.teacher_action = static_cast<int32_t>(p.tokens.first_column);
  RowSums sums;
  int64_t label = p.tokens.labels && p.tokens.labels[row] >= 0 ? p.tokens.labels[row] - p.tokens.first_column : -1;
  if (label >= 0 && label < columns) {
    out.has_label = 1;
    out.student_label = widened(student, label);
    out.teacher_label = widened(teacher, label);
  }
  Block block = columns ? prepare(block_at(0), length(0)) : Block{};
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    raise_maxima(block, p.tokens.first_column + begin, p.inverse_temperature, out, sums);
    // Before any finite logit the maximum is -inf, from which there is no distance.
    float student_max = out.student_max == -INFINITY ? 0.0f : out.student_max;
    float teacher_max = out.teacher_max == -INFINITY ? 0.0f : out.teacher_max;
    const int64_t next = begin + kBlock;
    const Following<S, T> following = block_at(next);
    constexpr bool kPrepare = std::is_same_v<S, float> && std::is_same_v<T, float>;
    if (kPrepare && length(next) == kBlock) {
      block = add_block<S, T, kTempered, kReverse, kPrepare>(block, kBlock, student_max, teacher_max,
                                                             out.teacher_at_student_action, p.inverse_temperature,
                                                             following, sums);
    } else {
      if (next < columns) {
        prefetch(following.student, length(next));
        prefetch(following.teacher, length(next));
      }
      add_block<S, T, kTempered, kReverse, false>(block, length(begin), student_max, teacher_max,
                                                  out.teacher_at_student_action, p.inverse_temperature, following,
                                                  sums);
      if (next < columns) block = prepare(following, length(next));
    }
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
