// Forward. Reads both rows once and computes the statistics of each token.
#pragma once

#include "../dispatch.h"
#include "row.cuh"
#include "warp_group.cuh"

namespace vcrd::cuda {

// A thread's sums are relative to a reference logit. It is raised only when the maximum exceeds it by this much: a
// raise costs exponentials, and with this slack it hardly ever happens after the first batch.
constexpr float kSlack = 4.0f;  // of tempered logits too, because their exponentials would overflow otherwise
constexpr int kNoVector = INT32_MAX;

// Sums over the columns of a thread, then of a warp, then of a warp group. u = student logit - student_reference, v
// likewise.
struct Sums {
  float student_reference = -INFINITY, teacher_reference = -INFINITY;  // -inf before any finite logit
  float action_reference = 0;  // reverse_reference() where student_reference was found
  float student = 0, teacher = 0, student_moment = 0, teacher_moment = 0;
  float student_tempered = 0, teacher_tempered = 0, forward_cross = 0, reverse_cross = 0;
  float teacher_without_student = -INFINITY, student_without_teacher = -INFINITY;  // see RowPartial
  float student_max = -INFINITY, teacher_max = -INFINITY;
  int student_vector = kNoVector, teacher_vector = kNoVector;  // the first that holds the maximum
};

// Moves the sums to references that are higher by `rise`; the caller then replaces the references. `action_rise` is the
// rise of action_reference. If a rise exceeds the reach of a distance, the columns so far count as -inf.
template <bool kTempered, bool kReverse>
__device__ __forceinline__ void raise(Sums& x, float student_rise, float teacher_rise, float action_rise,
                                      float inverse_temperature) {
  const float reach = -kLowestDistance;
  if (student_rise > reach) x.teacher_without_student = fmaxf(x.teacher_without_student, x.teacher_reference);
  student_rise = fminf(student_rise, reach);
  if constexpr (kReverse) {
    if (teacher_rise > reach) x.student_without_teacher = fmaxf(x.student_without_teacher, x.student_reference);
    action_rise = fmaxf(fminf(action_rise, reach), -reach);
  }
  teacher_rise = fminf(teacher_rise, reach);
  float student_scale = exponential(-student_rise), teacher_scale = exponential(-teacher_rise);
  float student_weight = kTempered ? exponential(-student_rise * inverse_temperature) : student_scale;
  float teacher_weight = kTempered ? exponential(-teacher_rise * inverse_temperature) : teacher_scale;
  float student_tempered = kTempered ? x.student_tempered : x.student;
  float teacher_tempered = kTempered ? x.teacher_tempered : x.teacher;
  x.forward_cross = teacher_weight * (x.forward_cross + (student_rise - teacher_rise) * teacher_tempered);
  if constexpr (kReverse)
    x.reverse_cross = student_weight * (x.reverse_cross + (action_rise - student_rise) * student_tempered);
  x.student_moment = student_scale * (x.student_moment - student_rise * x.student);
  x.teacher_moment = teacher_scale * (x.teacher_moment - teacher_rise * x.teacher);
  x.student *= student_scale;
  x.teacher *= teacher_scale;
  if constexpr (kTempered) {
    x.student_tempered *= student_weight;
    x.teacher_tempered *= teacher_weight;
  }
}

template <class Pair>
__device__ __forceinline__ float batch_maximum(const float (&x)[Pair::kBatch], int first_vector, int stride,
                                               float& maximum, int& vector) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < Pair::kVectors; ++i) {
    float of_vector = x[i * Pair::kColumns];
#pragma unroll
    for (int j = 1; j < Pair::kColumns; ++j) of_vector = fmaxf(of_vector, x[i * Pair::kColumns + j]);
    if (of_vector > maximum) maximum = of_vector, vector = first_vector + i * stride;
    largest = fmaxf(largest, of_vector);
  }
  return largest;
}

// Raises `without` to the largest `other` logit of the columns whose logit lies below `least`.
template <class Pair>
__device__ __forceinline__ void note_without(const float (&x)[Pair::kBatch], const float (&other)[Pair::kBatch],
                                             float least, float& without) {
  float smallest = x[0];
#pragma unroll
  for (int i = 1; i < Pair::kBatch; ++i) smallest = fminf(smallest, x[i]);
  if (!(smallest < least)) return;
#pragma unroll
  for (int i = 0; i < Pair::kBatch; ++i)
    if (x[i] < least) without = fmaxf(without, other[i]);
}

// Raises the references where the batch requires it. Divergences that need the reverse sum get no slack, because that
// sum keeps its digits only relative to the student's action.
template <class Pair, bool kTempered, bool kReverse>
__device__ __forceinline__ void follow(Sums& x, float student, float teacher, const float (&s)[Pair::kBatch],
                                       const float (&t)[Pair::kBatch], float inverse_temperature) {
  const float slack = kTempered ? kSlack * fminf(1.0f, 1.0f / inverse_temperature) : kSlack;
  bool raise_student = student > x.student_reference + (kReverse ? 0.0f : slack);
  bool raise_teacher = teacher > x.teacher_reference + slack;
  if (!raise_student && !raise_teacher) return;
  float student_rise = raise_student && x.student_reference != -INFINITY ? student - x.student_reference : 0.0f;
  float teacher_rise = raise_teacher && x.teacher_reference != -INFINITY ? teacher - x.teacher_reference : 0.0f;
  float action_rise = 0;
  if constexpr (kReverse) {
    float there = x.action_reference;
    if (raise_student) {
#pragma unroll
      for (int i = Pair::kBatch - 1; i >= 0; --i) there = s[i] == student ? t[i] : there;
    }
    there = reverse_reference(there, raise_teacher ? teacher : x.teacher_reference);
    action_rise = there - x.action_reference;
    x.action_reference = there;
  }
  raise<kTempered, kReverse>(x, student_rise, teacher_rise, action_rise, inverse_temperature);
  if (raise_student) x.student_reference = student;
  if (raise_teacher) x.teacher_reference = teacher;
}

template <class Pair, bool kTempered, bool kReverse>
__device__ __forceinline__ void add_batch(Sums& x, const float (&s)[Pair::kBatch], const float (&t)[Pair::kBatch],
                                          float inverse_temperature) {
  // A distance from -inf does not exist.
  float student_reference = x.student_reference == -INFINITY ? 0.0f : x.student_reference;
  float teacher_reference = x.teacher_reference == -INFINITY ? 0.0f : x.teacher_reference;
  note_without<Pair>(s, t, student_reference + kLowestDistance, x.teacher_without_student);
  if constexpr (kReverse) note_without<Pair>(t, s, teacher_reference + kLowestDistance, x.student_without_teacher);
#pragma unroll
  for (int i = 0; i < Pair::kBatch; ++i) {
    float u = s[i] - student_reference, v = t[i] - teacher_reference;
    float eu = exponential(u), ev = exponential(v);
    // fmaxf drops a NaN, but the exponentials carry the NaN into every sum.
    u = fmaxf(u, kLowestDistance), v = fmaxf(v, kLowestDistance);
    x.student += eu;
    x.teacher += ev;
    x.student_moment += eu * u;
    x.teacher_moment += ev * v;
    if constexpr (kTempered) {
      eu = exponential(u * inverse_temperature);
      ev = exponential(v * inverse_temperature);
      x.student_tempered += eu;
      x.teacher_tempered += ev;
    }
    x.forward_cross += ev * (v - u);
    if constexpr (kReverse) x.reverse_cross += eu * (u - fmaxf(t[i] - x.action_reference, kLowestDistance));
  }
}

template <int kLanes>
__device__ __forceinline__ void warp_first_maximum(float& maximum, int& vector) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2) {
    float other = __shfl_xor_sync(kAllLanes, maximum, lanes);
    int other_vector = __shfl_xor_sync(kAllLanes, vector, lanes);
    if (other > maximum || (other == maximum && other_vector < vector)) maximum = other, vector = other_vector;
  }
}

// After this every lane holds the sums over its group of kLanes neighbouring lanes.
template <int kLanes, bool kTempered, bool kReverse>
__device__ __forceinline__ void merge_lanes(Sums& x, float inverse_temperature) {
  float student_reference = warp_max<kLanes>(x.student_reference),
        teacher_reference = warp_max<kLanes>(x.teacher_reference);
  float action_rise = 0;
  if constexpr (kReverse) {
    const unsigned first_lane = threadIdx.x % 32 / kLanes * kLanes;
    unsigned holders = __ballot_sync(kAllLanes, x.student_reference == student_reference) >> first_lane;
    float there = __shfl_sync(kAllLanes, x.action_reference, first_lane + __ffs(holders) - 1);
    there = reverse_reference(there, teacher_reference);
    action_rise = there - x.action_reference;
    x.action_reference = there;
  }
  // A lane without a finite logit has nothing to move, and a distance from -inf does not exist.
  float student_rise = x.student_reference == -INFINITY ? 0.0f : student_reference - x.student_reference;
  float teacher_rise = x.teacher_reference == -INFINITY ? 0.0f : teacher_reference - x.teacher_reference;
  raise<kTempered, kReverse>(x, student_rise, teacher_rise, action_rise, inverse_temperature);
  x.student_reference = student_reference;
  x.teacher_reference = teacher_reference;
  x.student = warp_sum<kLanes>(x.student);
  x.teacher = warp_sum<kLanes>(x.teacher);
  x.student_moment = warp_sum<kLanes>(x.student_moment);
  x.teacher_moment = warp_sum<kLanes>(x.teacher_moment);
  if constexpr (kTempered) {
    x.student_tempered = warp_sum<kLanes>(x.student_tempered);
    x.teacher_tempered = warp_sum<kLanes>(x.teacher_tempered);
  }
  x.forward_cross = warp_sum<kLanes>(x.forward_cross);
  x.teacher_without_student = warp_max<kLanes>(x.teacher_without_student);
  if constexpr (kReverse) {
    x.reverse_cross = warp_sum<kLanes>(x.reverse_cross);
    x.student_without_teacher = warp_max<kLanes>(x.student_without_teacher);
  }
  warp_first_maximum<kLanes>(x.student_max, x.student_vector);
  warp_first_maximum<kLanes>(x.teacher_max, x.teacher_vector);
}

// The first column of `vector` that holds `maximum`. The whole warp searches. Column 0 if no logit is finite.
template <class T, int kColumns>
__device__ __forceinline__ int column_of(const T* row, const Tiling& tiling, float maximum, int vector, int lane) {
  if (vector == kNoVector) return 0;
  int column = tiling.first_column(vector, kColumns) + lane;
  bool inside = lane < kColumns && column >= 0 && column < tiling.columns;
  unsigned holders = __ballot_sync(kAllLanes, inside && widened(row[inside ? column : 0]) == maximum);
  return tiling.first_column(vector, kColumns) + __ffs(holders) - 1;
}

// One lane of the group's first warp writes the group's result.
template <class S, class T, bool kTempered, bool kReverse>
__device__ __forceinline__ void write_partial(const StatisticsParams& p, const WarpGroup& group, const S* student,
                                              const T* teacher, const Tiling& tiling, int begin, int end, Sums& x) {
  constexpr int kColumns = RowPair<S, T>::kColumns;
  int student_column = column_of<S, kColumns>(student, tiling, x.student_max, x.student_vector, group.lane());
  int teacher_column = column_of<T, kColumns>(teacher, tiling, x.teacher_max, x.teacher_vector, group.lane());
  if (group.lane() != 0) return;
  const float shift = shift_of(p.teacher, group.row);
  // Makes the sums relative to the maxima themselves.
  float student_rise = x.student_vector == kNoVector ? 0.0f : x.student_max - x.student_reference;
  float teacher_rise = x.teacher_vector == kNoVector ? 0.0f : x.teacher_max - x.teacher_reference;
  const float teacher_there = x.student_vector == kNoVector ? 0.0f : widened(teacher[student_column]);
  // Of equal maxima the action is the first one in the row, but the reference is the first one of its lane.
  const float action_rise = reverse_reference(teacher_there, x.teacher_max) - x.action_reference;
  raise<kTempered, kReverse>(x, student_rise, teacher_rise, action_rise, p.inverse_temperature);
  RowPartial out = {};
  out.student_max = x.student_max;
  out.teacher_max = x.teacher_max + shift;
  out.student_sum = x.student;
  out.teacher_sum = x.teacher;
  out.student_moment = x.student_moment;
  out.teacher_moment = x.teacher_moment;
  out.student_tempered_sum = kTempered ? x.student_tempered : x.student;
  out.teacher_tempered_sum = kTempered ? x.teacher_tempered : x.teacher;
  out.forward_cross = x.forward_cross;
  out.reverse_cross = x.reverse_cross;
  out.teacher_without_student = x.teacher_without_student + shift;
  out.student_without_teacher = x.student_without_teacher;
  if (x.student_vector != kNoVector) out.teacher_at_student_action = teacher_there + shift;
  if (x.teacher_vector != kNoVector) out.student_at_teacher_action = widened(student[teacher_column]);
  out.student_action = static_cast<int32_t>(p.tokens.first_column + student_column);
  out.teacher_action = static_cast<int32_t>(p.tokens.first_column + teacher_column);
  int64_t label = p.tokens.labels ? p.tokens.labels[group.row] : -1;
  int64_t column = label < 0 ? -1 : label - p.tokens.first_column;
  if (column >= 0 && column < tiling.columns) {
    int vector = static_cast<int>((column + tiling.misalignment) / kColumns);
    if (vector >= begin && vector < end) {
      out.has_label = 1;
      out.student_label = widened(student[column]);
      out.teacher_label = widened(teacher[column]) + shift;
    }
  }
  p.partials[group.split * p.tokens.rows + group.row] = out;
}

template <class S, class T, bool kTempered, bool kReverse>
__global__ void __launch_bounds__(kThreads, kTempered&& kReverse ? 2 : 3)
    row_statistics_kernel(StatisticsParams p, Grid grid) {
  using Pair = RowPair<S, T>;
  __shared__ Sums of_warps[kWarps];
  const WarpGroup group(grid);
  const bool read = group.present && !(p.tokens.mask && !p.tokens.mask[group.row]);
  const S* student = static_cast<const S*>(p.student.data) + (read ? group.row * p.student.stride : 0);
  const T* teacher = static_cast<const T*>(p.teacher.data) + (read ? group.row * p.teacher.stride : 0);
  const Tiling tiling = tiling_at<S, Pair::kColumns>(student, static_cast<int>(p.tokens.columns));
  int begin = 0, end = 0;
  if (read) group.range(tiling.vectors, grid.splits, &begin, &end);
  Sums x;
  const Pair pair(student, teacher, tiling);
  for (int first = begin + group.thread; first < end; first += Pair::kVectors * group.threads) {
    float s[Pair::kBatch], t[Pair::kBatch];
    pair.read(first, group.threads, end, s, t);
    float largest = batch_maximum<Pair>(s, first, group.threads, x.student_max, x.student_vector);
    float largest_teacher = batch_maximum<Pair>(t, first, group.threads, x.teacher_max, x.teacher_vector);
    follow<Pair, kTempered, kReverse>(x, largest, largest_teacher, s, t, p.inverse_temperature);
    add_batch<Pair, kTempered, kReverse>(x, s, t, p.inverse_temperature);
  }
  merge_lanes<32, kTempered, kReverse>(x, p.inverse_temperature);
  if (grid.warps_log2 > 0) {
    if (group.lane() == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (group.warp() != 0) return;
    // Every kWarps lanes do the same work, so that all lanes of the warp get the result.
    const int from = group.lane() % kWarps;
    x = from < grid.warps() ? of_warps[threadIdx.x / 32 + from] : Sums();
    merge_lanes<kWarps, kTempered, kReverse>(x, p.inverse_temperature);
  }
  if (read)
    write_partial<S, T, kTempered, kReverse>(p, group, student, teacher, tiling, begin, end, x);
  else if (group.present && group.lane() == 0)
    p.partials[group.split * p.tokens.rows + group.row] = RowPartial{};
}

// Chooses the instance for one type of student; each type has a file of its own, to be compiled side by side.
template <class S>
const char* launch_row_statistics(const StatisticsParams& p, int64_t splits, cudaStream_t stream) {
  const Grid grid = grid_of(p.tokens.rows, p.tokens.columns, splits);
  return with_teacher<__nv_bfloat16, __half>(p.teacher.dtype, [&](auto teacher) {
    using T = decltype(teacher);
    return with_bools(p.inverse_temperature != 1.0f, p.with_reverse, [&](auto tempered, auto reverse) {
      auto kernel = row_statistics_kernel<S, T, tempered.value, reverse.value>;
      return launch(kernel, grid.blocks(), kThreads, stream, p, grid);
    });
  });
}

}  // namespace vcrd::cuda
