// The first pass: the statistics of each row, and the merge of its shards. Part of loops.h.
#pragma once

#include "../merge.h"
#include "lanes.h"

namespace vcrd::cpu::VCRD_INSTRUCTION_SET {
namespace {

constexpr int64_t kFirstBlock = 256;  // short, because it only serves to find references and is then repeated
// Few blocks exceed the blocks before them by more. A larger headroom would cost digits: a mean distance from the
// maximum that is nearly 0 would be the difference of larger numbers.
constexpr float kHeadroom = 2.0f;

// The sums of one row, relative to References. Blocks are summed in float32, rows in double.
struct RowSums {
  double student = 0, teacher = 0, student_moment = 0, teacher_moment = 0;
  double student_tempered = 0, teacher_tempered = 0, forward_cross = 0, reverse_cross = 0;
  float teacher_without_student = -INFINITY, student_without_teacher = -INFINITY;

  // The student's reference rises by `rise`: every u falls by it.
  void raise_student(double rise, double inverse_temperature) {
    double scale = exp(-rise), tempered = exp(-rise * inverse_temperature);
    student_moment = scale * (student_moment - rise * student);
    student *= scale;
    reverse_cross = tempered * (reverse_cross - rise * student_tempered);
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

  void add(const RowSums& block) {
    student += block.student;
    teacher += block.teacher;
    student_moment += block.student_moment;
    teacher_moment += block.teacher_moment;
    student_tempered += block.student_tempered;
    teacher_tempered += block.teacher_tempered;
    forward_cross += block.forward_cross;
    reverse_cross += block.reverse_cross;
    teacher_without_student = larger_of(block.teacher_without_student, teacher_without_student);
    student_without_teacher = larger_of(block.student_without_teacher, student_without_teacher);
  }

  // Whether the sums need no repetition with care. False if a cross sum is NaN.
  bool ordinary() const {
    constexpr double kLargest = 1e25;
    return fabs(forward_cross) < kLargest && fabs(reverse_cross) < kLargest;
  }
};

// What the exponentials of a row are relative to: logits of the row that no other logit so far exceeds by more than the
// headroom; -inf before any finite logit. Exponentials of numbers slightly above 0 are as exact as others, so that a
// block with a slightly larger maximum need not be read again.
struct References {
  float student = -INFINITY, teacher = -INFINITY;
  float reverse = 0;  // reverse_reference()
};

// The sums and maxima of one block, lane by lane. Without default values: see loops.h.
struct BlockLanes {
  Floats student_max, teacher_max;
  Floats student, teacher, student_moment, teacher_moment;
  Floats student_tempered, teacher_tempered, forward_cross, reverse_cross;
  Floats teacher_without_student, student_without_teacher;
};

// A logit of -inf in only one model, or a logit below kLowestDistance, needs care. Without care it leaves a cross sum
// that is not finite, or larger than any ordinary one.
template <bool kTempered, bool kReverse, bool kCareful>
VCRD_LANES void add(Floats s, Floats t, const References& reference, float inverse_temperature, BlockLanes& sums) {
  sums.student_max = larger(s, sums.student_max);
  sums.teacher_max = larger(t, sums.teacher_max);
  Floats u = s - reference.student, v = t - reference.teacher, w = t - reference.reverse;
  if constexpr (kCareful) {
    const Floats none = all_lanes(-INFINITY);
    sums.teacher_without_student = larger(u < kLowestDistance ? t : none, sums.teacher_without_student);
    if constexpr (kReverse)
      sums.student_without_teacher = larger(v < kLowestDistance ? s : none, sums.student_without_teacher);
    u = at_least(kLowestDistance, u);
    w = at_least(kLowestDistance, w);
  }
  Floats clamped_u = at_least(kLowestExponent, u);
  // Where the exponential is 0, any finite distance will do. With a temperature it becomes 0 at a larger distance.
  v = at_least(kTempered ? kLowestDistance : kLowestExponent, v);
  Floats clamped_v = kTempered ? at_least(kLowestExponent, v) : v;
  Floats eu = exponentials_of_clamped(clamped_u), ev = exponentials_of_clamped(clamped_v);
  sums.student += eu;
  sums.teacher += ev;
  sums.student_moment += eu * clamped_u;
  sums.teacher_moment += ev * clamped_v;
  if constexpr (kTempered) {
    eu = exponentials(u * inverse_temperature);
    ev = exponentials(v * inverse_temperature);
    sums.student_tempered += eu;
    sums.teacher_tempered += ev;
  }
  sums.forward_cross += ev * (v - u);
  if constexpr (kReverse) sums.reverse_cross += eu * (u - w);
}

template <class S, class T, bool kTempered, bool kReverse, bool kCareful>
BlockLanes block_sums(const S* s, const T* t, int64_t n, References reference, float inverse_temperature) {
  constexpr bool kHalves = kInHalves<S, T>;
  // A distance from -inf does not exist.
  if (reference.student == -INFINITY) reference.student = 0;
  if (reference.teacher == -INFINITY) reference.teacher = 0;
  BlockLanes sums = {};
  sums.student_max = sums.teacher_max = all_lanes(-INFINITY);
  sums.teacher_without_student = sums.student_without_teacher = all_lanes(-INFINITY);
  auto add_pair = [&](auto careful, auto* student, auto* teacher) __attribute__((always_inline)) {
    Pair x = load_pair<kHalves>(student), y = load_pair<kHalves>(teacher);
    add<kTempered, kReverse, careful.value>(x.first, y.first, reference, inverse_temperature, sums);
    add<kTempered, kReverse, careful.value>(x.second, y.second, reference, inverse_temperature, sums);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    prefetch_ahead(s + i);
    prefetch_ahead(t + i);
    add_pair(std::bool_constant<kCareful>{}, s + i, t + i);
  }
  if (i < n) add_pair(std::true_type{}, Padded<S>(s + i, n - i).columns, Padded<T>(t + i, n - i).columns);
  return sums;
}

// The sums of one block. with_without: whether some of its columns were added with care.
template <bool kTempered>
RowSums sums_of(const BlockLanes& block, bool with_without) {
  RowSums out;
  out.student = sum(block.student);
  out.teacher = sum(block.teacher);
  out.student_moment = sum(block.student_moment);
  out.teacher_moment = sum(block.teacher_moment);
  out.student_tempered = kTempered ? sum(block.student_tempered) : out.student;
  out.teacher_tempered = kTempered ? sum(block.teacher_tempered) : out.teacher;
  out.forward_cross = sum(block.forward_cross);
  out.reverse_cross = sum(block.reverse_cross);
  if (with_without) {
    out.teacher_without_student = largest(block.teacher_without_student);
    out.student_without_teacher = largest(block.student_without_teacher);
  }
  return out;
}

// Makes the row's sums relative to its maxima so far.
inline void raise_references(References& reference, const RowPartial& row, double inverse_temperature, RowSums& sums) {
  const References before = reference;
  reference.student = larger_of(row.student_max, before.student);
  reference.teacher = larger_of(row.teacher_max, before.teacher);
  reference.reverse = reverse_reference(row.teacher_at_student_action, row.teacher_max);
  // Before any finite logit there are no sums to move. If a rise exceeds the reach of a distance, the columns so far
  // count as -inf.
  const double reach = -kLowestDistance;
  if (before.student != -INFINITY && reference.student > before.student) {
    const double rise = double(reference.student) - before.student;
    if (rise > reach) sums.teacher_without_student = larger_of(before.teacher, sums.teacher_without_student);
    sums.raise_student(rise < reach ? rise : reach, inverse_temperature);
  }
  if (before.teacher != -INFINITY && reference.teacher > before.teacher) {
    const double rise = double(reference.teacher) - before.teacher;
    if (rise > reach) sums.student_without_teacher = larger_of(before.student, sums.student_without_teacher);
    sums.raise_teacher(rise < reach ? rise : reach, inverse_temperature);
  }
  sums.reverse_cross += (double(reference.reverse) - before.reverse) * sums.student_tempered;
}

// Records the maxima of a block where they exceed the maxima so far.
template <class S, class T>
void note_maxima(const S* s, const T* t, int64_t n, float student_max, float teacher_max, int64_t first_id,
                 RowPartial& row) {
  if (student_max > row.student_max) {
    int64_t i = first_index_of(s, n, student_max);
    row.student_max = student_max;
    row.student_action = static_cast<int32_t>(first_id + i);
    row.teacher_at_student_action = widened(t, i);
  }
  if (teacher_max > row.teacher_max) {
    int64_t i = first_index_of(t, n, teacher_max);
    row.teacher_max = teacher_max;
    row.teacher_action = static_cast<int32_t>(first_id + i);
    row.student_at_teacher_action = widened(s, i);
  }
}

template <class S, class T, bool kTempered, bool kReverse>
RowPartial row_partial(const StatisticsParams& p, int64_t row) {
  const S* student = row_of<S>(p.student, row);
  const T* teacher = row_of<T>(p.teacher, row);
  const int64_t columns = p.tokens.columns;
  RowPartial out = {};
  out.student_max = out.teacher_max = -INFINITY;
  out.student_action = out.teacher_action = static_cast<int32_t>(p.tokens.first_column);
  int64_t label = p.tokens.labels && p.tokens.labels[row] >= 0 ? p.tokens.labels[row] - p.tokens.first_column : -1;
  if (label >= 0 && label < columns) {
    out.has_label = 1;
    out.student_label = widened(student, label);
    out.teacher_label = widened(teacher, label);
  }
  const float headroom = p.inverse_temperature > 1.0f ? kHeadroom / p.inverse_temperature : kHeadroom;
  References reference;
  RowSums sums;
  for (int64_t begin = 0, n = kFirstBlock; begin < columns; begin += n, n = kBlock) {
    if (n > columns - begin) n = columns - begin;
    const S* s = student + begin;
    const T* t = teacher + begin;
    BlockLanes block = block_sums<S, T, kTempered, kReverse, false>(s, t, n, reference, p.inverse_temperature);
    float student_max = largest(block.student_max), teacher_max = largest(block.teacher_max);
    note_maxima(s, t, n, student_max, teacher_max, p.tokens.first_column + begin, out);
    if (student_max - reference.student > headroom || teacher_max - reference.teacher > headroom) {
      raise_references(reference, out, p.inverse_temperature, sums);
      block = block_sums<S, T, kTempered, kReverse, false>(s, t, n, reference, p.inverse_temperature);
    }
    RowSums of_block = sums_of<kTempered>(block, n % (2 * kLanes) != 0);
    if (!of_block.ordinary()) {
      block = block_sums<S, T, kTempered, kReverse, true>(s, t, n, reference, p.inverse_temperature);
      of_block = sums_of<kTempered>(block, true);
    }
    sums.add(of_block);
  }
  raise_references(reference, out, p.inverse_temperature, sums);
  const float shift = shift_of(p.teacher, row);
  out.teacher_max += shift;
  out.teacher_at_student_action += shift;
  out.teacher_label += shift;
  out.teacher_without_student = sums.teacher_without_student + shift;
  out.student_without_teacher = sums.student_without_teacher;
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
