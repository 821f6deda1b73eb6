// Merges the partial statistics of a row and computes the row's results, for the CPU loops and the CUDA kernels alike.
// In double precision: for a few operations per row the normalisers become exact.
#pragma once

#include "slope.h"

namespace vcrd {

// A RowPartial in double precision: the sum of several.
struct RowTotals {
  double student_max = -INFINITY, teacher_max = -INFINITY;
  double student_sum = 0, teacher_sum = 0, student_moment = 0, teacher_moment = 0;
  double student_tempered_sum = 0, teacher_tempered_sum = 0, forward_cross = 0, reverse_cross = 0;
  float teacher_at_student_action = 0, student_at_teacher_action = 0;
  float student_label = 0, teacher_label = 0;
  float teacher_without_student = -INFINITY, student_without_teacher = -INFINITY;
  int32_t student_action = 0, teacher_action = 0;
  bool has_label = false;
};

// The part's maximum minus the row's maximum. Below kLowestDistance the part's columns count as -inf; then the largest
// logit of the other model in this part has no counterpart.
VCRD_FUNCTION double shift_of_part(float part_max, double row_max, float other_max, float& other_without) {
  if (part_max == -INFINITY) return 0.0;  // only padding or -inf: nothing to move, and -inf would give NaN
  double shift = part_max - row_max;
  if (shift >= kLowestDistance) return shift;
  other_without = fmaxf(other_without, other_max);
  return kLowestDistance;
}

// Adds up the parts of a row, which lie `stride` partials apart in the order of their columns. Of equal maxima the
// first one is the action.
VCRD_FUNCTION RowTotals add_partials(const RowPartial* partials, int64_t parts, int64_t stride,
                                     double inverse_temperature) {
  RowTotals row;
  int64_t student_part = 0, teacher_part = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const RowPartial& part = partials[i * stride];
    if (part.student_max > row.student_max) row.student_max = part.student_max, student_part = i;
    if (part.teacher_max > row.teacher_max) row.teacher_max = part.teacher_max, teacher_part = i;
  }
  const RowPartial& student = partials[student_part * stride];
  const RowPartial& teacher = partials[teacher_part * stride];
  row.teacher_at_student_action = student.teacher_at_student_action;
  row.student_at_teacher_action = teacher.student_at_teacher_action;
  row.student_action = student.student_action;
  row.teacher_action = teacher.teacher_action;
  const double reference = reverse_reference(row.teacher_at_student_action, static_cast<float>(row.teacher_max));
  for (int64_t i = 0; i < parts; ++i) {
    const RowPartial& part = partials[i * stride];
    double student_shift =
        shift_of_part(part.student_max, row.student_max, part.teacher_max, row.teacher_without_student);
    double teacher_shift =
        shift_of_part(part.teacher_max, row.teacher_max, part.student_max, row.student_without_teacher);
    double action_shift = reverse_reference(part.teacher_at_student_action, part.teacher_max) - reference;
    double student_scale = exp(student_shift), teacher_scale = exp(teacher_shift);
    double student_weight = inverse_temperature == 1 ? student_scale : exp(student_shift * inverse_temperature);
    double teacher_weight = inverse_temperature == 1 ? teacher_scale : exp(teacher_shift * inverse_temperature);
    row.student_sum += student_scale * part.student_sum;
    row.teacher_sum += teacher_scale * part.teacher_sum;
    row.student_moment += student_scale * (part.student_moment + student_shift * part.student_sum);
    row.teacher_moment += teacher_scale * (part.teacher_moment + teacher_shift * part.teacher_sum);
    row.student_tempered_sum += student_weight * part.student_tempered_sum;
    row.teacher_tempered_sum += teacher_weight * part.teacher_tempered_sum;
    row.forward_cross +=
        teacher_weight * (part.forward_cross + (teacher_shift - student_shift) * part.teacher_tempered_sum);
    row.reverse_cross +=
        student_weight * (part.reverse_cross + (student_shift - action_shift) * part.student_tempered_sum);
    row.teacher_without_student = fmaxf(row.teacher_without_student, part.teacher_without_student);
    row.student_without_teacher = fmaxf(row.student_without_teacher, part.student_without_teacher);
    if (part.has_label) {
      row.has_label = true;
      row.student_label = part.student_label;
      row.teacher_label = part.teacher_label;
    }
  }
  return row;
}

VCRD_FUNCTION RowPartial partial_of(const RowTotals& row) {
  return {static_cast<float>(row.student_max),
          static_cast<float>(row.teacher_max),
          static_cast<float>(row.student_sum),
          static_cast<float>(row.teacher_sum),
          static_cast<float>(row.student_moment),
          static_cast<float>(row.teacher_moment),
          static_cast<float>(row.student_tempered_sum),
          static_cast<float>(row.teacher_tempered_sum),
          static_cast<float>(row.forward_cross),
          static_cast<float>(row.reverse_cross),
          row.teacher_at_student_action,
          row.student_at_teacher_action,
          row.student_label,
          row.teacher_label,
          row.teacher_without_student,
          row.student_without_teacher,
          row.student_action,
          row.teacher_action,
          row.has_label};
}

// One row of merged statistics, before it is written to the output arrays.
struct MergedRow {
  float statistics[kStatistics];
  int32_t student_action, teacher_action;
  RowConstants constants;
};

// Whether a token of this logit has any probability in the float64 reference.
VCRD_FUNCTION bool has_probability(float logit, double maximum, double tempered_sum, double inverse_temperature) {
  if (logit == -INFINITY) return false;
  return (logit - maximum) * inverse_temperature - log(tempered_sum) >= kLowestLogProbability;
}

// A label that no shard holds is outside the vocabulary. Its statistics are NaN: zeros would hide the error.
VCRD_FUNCTION MergedRow merge_row(const RowPartial* partials, int64_t shards, int64_t stride, bool labelled,
                                  double inverse_temperature, Divergence divergence) {
  RowTotals totals = add_partials(partials, shards, stride, inverse_temperature);
  // A row of only -inf has no distribution. Its statistics are NaN, as those of torch's softmax are.
  if (totals.student_sum == 0) totals.student_sum = totals.student_tempered_sum = NAN;
  if (totals.teacher_sum == 0) totals.teacher_sum = totals.teacher_tempered_sum = NAN;
  double student_log_sum = log(totals.student_sum), teacher_log_sum = log(totals.teacher_sum);
  double log_sum_difference = log(totals.student_tempered_sum / totals.teacher_tempered_sum);
  double student_log_normalizer = totals.student_max + student_log_sum;
  double teacher_log_normalizer = totals.teacher_max + teacher_log_sum;
  double forward_kl = totals.forward_cross / totals.teacher_tempered_sum * inverse_temperature + log_sum_difference;
  double reverse_centre = totals.reverse_cross / totals.student_tempered_sum * inverse_temperature;
  const float reference = reverse_reference(totals.teacher_at_student_action, static_cast<float>(totals.teacher_max));
  double reverse_kl = reverse_centre - (reference - totals.teacher_max) * inverse_temperature - log_sum_difference;
  // Rounding may give a value slightly below zero. A NaN must stay.
  forward_kl = forward_kl < 0 ? 0 : forward_kl;
  reverse_kl = reverse_kl < 0 ? 0 : reverse_kl;
  // Infinity is added, not assigned, so that a NaN stays here too.
  if (has_probability(totals.teacher_without_student, totals.teacher_max, totals.teacher_tempered_sum,
                      inverse_temperature))
    forward_kl += INFINITY;
  if (reference != totals.teacher_at_student_action ||
      has_probability(totals.student_without_teacher, totals.student_max, totals.student_tempered_sum,
                      inverse_temperature))
    reverse_kl += INFINITY, reverse_centre += INFINITY;
  double student_label_logprob = !labelled          ? 0.0
                                 : totals.has_label ? totals.student_label - student_log_normalizer
                                                    : NAN;
  double teacher_label_logprob = !labelled          ? 0.0
                                 : totals.has_label ? totals.teacher_label - teacher_log_normalizer
                                                    : NAN;

  MergedRow row;
  float* out = row.statistics;
  out[kDivergence] = static_cast<float>(value_of(divergence, forward_kl, reverse_kl));
  out[kCrossEntropy] = static_cast<float>(labelled ? -student_label_logprob : 0.0);
  out[kStudentLabelLogprob] = static_cast<float>(student_label_logprob);
  out[kTeacherLabelLogprob] = static_cast<float>(teacher_label_logprob);
  out[kStudentLogprobOfStudentAction] = static_cast<float>(-student_log_sum);
  out[kStudentLogprobOfTeacherAction] = static_cast<float>(totals.student_at_teacher_action - student_log_normalizer);
  out[kTeacherLogprobOfStudentAction] = static_cast<float>(totals.teacher_at_student_action - teacher_log_normalizer);
  out[kTeacherLogprobOfTeacherAction] = static_cast<float>(-teacher_log_sum);
  out[kStudentEntropy] = static_cast<float>(student_log_sum - totals.student_moment / totals.student_sum);
  out[kTeacherEntropy] = static_cast<float>(teacher_log_sum - totals.teacher_moment / totals.teacher_sum);
  row.student_action = totals.student_action;
  row.teacher_action = totals.teacher_action;
  row.constants.student_max = static_cast<float>(totals.student_max);
  row.constants.teacher_max = static_cast<float>(totals.teacher_max);
  row.constants.teacher_at_student_action = totals.teacher_at_student_action;
  row.constants.student_inverse_sum = static_cast<float>(1.0 / totals.student_sum);
  row.constants.student_tempered_inverse_sum = static_cast<float>(1.0 / totals.student_tempered_sum);
  row.constants.teacher_tempered_inverse_sum = static_cast<float>(1.0 / totals.teacher_tempered_sum);
  row.constants.log_sum_difference = static_cast<float>(log_sum_difference);
  row.constants.reverse_centre = static_cast<float>(reverse_centre);
  return row;
}

}  // namespace vcrd
