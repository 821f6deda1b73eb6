// Plain structs that cross the boundary between the binding layer and the kernels. No torch header here or below.
#pragma once

#include <cstdint>

namespace vcrd {

// kDistance8 is the teacher's 8-bit code: d = kDistance8Range (code / 255)^2 below the row's maximum.
enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kDistance8 };
constexpr float kDistance8Range = 24.0f;

// The last is kJsd with a teacher_share of 1/2: never asked for, but what the CUDA launchers then choose.
enum class Divergence : int32_t { kForwardKl, kReverseKl, kJeffreys, kJsd, kSkewKl, kSkewReverseKl, kEvenJsd };

// One model's shard of logits: `rows` tokens, `stride` elements apart, columns adjacent.
struct Logits {
  const void* data;
  int64_t stride;
  Dtype dtype;
  // [rows], what is to be added to a row's logits: the maximum that distances were taken from. Null for 0, which serves
  // also where one maximum holds for the whole row, since no statistic sees a shift of all its logits.
  const float* shift = nullptr;
};

// What is asked of every pass: which tokens, which columns of the vocabulary.
struct Tokens {
  const int64_t* labels;  // [rows], ids of the whole vocabulary, negative for none; null without labels
  const uint8_t* mask;    // [rows], 0 = do not read this row; null reads every row
  int64_t rows;
  int64_t columns;       // true (unpadded) columns of this shard
  int64_t first_column;  // id of this shard's first column
};

// Statistics of one row over one shard, relative to the shard's own maxima. u = student logit - student_max,
// v = teacher logit - teacher_max; "tempered" sums use exp(u / temperature). All fields are four bytes wide, so that a
// row of partials travels as one row of a float32 tensor.
struct RowPartial {
  float student_max, teacher_max;
  float student_sum, teacher_sum;        // sum exp(u), sum exp(v)
  float student_moment, teacher_moment;  // sum exp(u) u, sum exp(v) v: the entropies
  float student_tempered_sum, teacher_tempered_sum;
  float forward_cross;  // sum exp(v/T) (v - u): KL(p || q)
  float reverse_cross;  // sum exp(u/T) (u - w): KL(q || p); w = teacher logit - reverse_reference()
  float teacher_at_student_action, student_at_teacher_action;
  float student_label, teacher_label;
  // The largest logit in columns where the other model has -inf, -inf for none: KL(p || q) and KL(q || p) are infinite
  // where it has probability. The latter only where reverse_cross is needed.
  float teacher_without_student, student_without_teacher;
  int32_t student_action, teacher_action;  // ids of the whole vocabulary; ties go to the lowest id
  int32_t has_label;                       // 1 where the label lies in this shard
};
constexpr int64_t kPartialFloats = sizeof(RowPartial) / sizeof(float);

// What the second pass and backward need of a merged row.
struct RowConstants {
  float student_max, teacher_max;
  float teacher_at_student_action;  // its logit
  float student_inverse_sum;        // 1 / sum exp(u), at temperature 1
  float student_tempered_inverse_sum, teacher_tempered_inverse_sum;
  float log_sum_difference;  // log of the student's tempered sum minus log of the teacher's
  float reverse_centre;  // mean over q of log(q/p), minus log(q/p) at the student's action; inf where it is infinite
};
constexpr int64_t kConstantFloats = sizeof(RowConstants) / sizeof(float);

// Rows of the merged float32 statistics, [kStatistics, rows]. The order is that of DivergenceStats in Python.
enum Statistic : int32_t {
  kDivergence,
  kCrossEntropy,
  kStudentLabelLogprob,
  kTeacherLabelLogprob,
  kStudentLogprobOfStudentAction,
  kStudentLogprobOfTeacherAction,
  kTeacherLogprobOfStudentAction,
  kTeacherLogprobOfTeacherAction,
  kStudentEntropy,
  kTeacherEntropy,
  kStatistics,
};

struct StatisticsParams {
  Logits student, teacher;
  Tokens tokens;
  float inverse_temperature;
  bool with_reverse;     // whether reverse_cross is needed
  RowPartial* partials;  // [rows]
};

struct MergeParams {
  const RowPartial* partials;  // [shards, rows]
  const int64_t* labels;
  const uint8_t* mask;
  int64_t shards, rows;
  float inverse_temperature;
  Divergence divergence;    // the mixtures' own divergence is left to the second pass
  float* statistics;        // [kStatistics, rows]
  int64_t* actions;         // [2, rows]: student's, teacher's
  RowConstants* constants;  // [rows]
};

// Partials of a row's parts, to be made one.
struct CombineParams {
  const RowPartial* partials;  // [splits, rows]
  const uint8_t* mask;         // [rows] or null
  int64_t splits, rows;
  float inverse_temperature;
  RowPartial* out;  // [rows]
};

// Divergences against a mixture m = teacher_share p + (1 - teacher_share) q.
struct MixtureParams {
  Logits student, teacher;
  Tokens tokens;
  float inverse_temperature;
  Divergence divergence;
  float teacher_share;
  const RowConstants* constants;
  float* sums;  // [rows, 2], this shard's share of the divergence and of the centre of its potential
};

struct GradientParams {
  Logits student, teacher;
  Tokens tokens;
  float inverse_temperature;
  Divergence divergence;
  float teacher_share;
  const RowConstants* constants;
  const float* sums;                    // merged MixtureParams::sums; null for the others
  const float* divergence_gradient;     // [rows] or null for zero
  const float* cross_entropy_gradient;  // [rows] or null for zero
  void* gradient;                       // student's dtype; may be the student's logits themselves
  int64_t gradient_stride;
  int64_t gradient_columns;  // columns of the shard with its padding, which gets zeros
};

struct MaximumParams {
  Logits logits;
  int64_t rows, columns;
  float* maxima;  // [rows]
};

// Logits as distances below a maximum, in 16 or 8 bits.
struct EncodeParams {
  Logits logits;
  int64_t rows, columns;
  const float* maxima;  // [rows], of the whole vocabulary
  Dtype code;           // kFloat16: logit - maximum in [-65504, 0]; kDistance8: the square-root code
  void* codes;          // [rows, columns]
};

}  // namespace vcrd
