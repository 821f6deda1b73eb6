// Plain structs that cross the boundary between the binding layer and the kernels. No torch header here or below.
#pragma once

#include <cstdint>

namespace vcrd {

// kSqrt8 is the teacher's 8-bit code. It stands for a logit kSqrt8Range (code / 255)^2 below the row's maximum.
enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kSqrt8 };
constexpr float kSqrt8Range = 24.0f;

// The formulas are in slope.h.
enum class Divergence : int32_t { kForwardKl, kReverseKl, kJeffreys, kJsd, kSkewKl, kSkewReverseKl };
// What Python calls them, in the same order.
constexpr const char* kDivergenceNames[] = {"forward_kl", "reverse_kl", "jeffreys",
                                            "jsd",        "skew_kl",    "skew_reverse_kl"};
constexpr int32_t kDivergences = sizeof(kDivergenceNames) / sizeof(*kDivergenceNames);

// Whether the divergence needs the sum for the reverse KL, which the statistics pass then adds up.
constexpr bool has_reverse(Divergence d) { return d == Divergence::kReverseKl || d == Divergence::kJeffreys; }
// Whether the divergence is against a mixture of both models. Then a second pass adds up its value.
constexpr bool has_mixture(Divergence d) {
  return d == Divergence::kJsd || d == Divergence::kSkewKl || d == Divergence::kSkewReverseKl;
}

// One model's shard of logits: `rows` tokens, `stride` elements apart, columns adjacent.
struct Logits {
  const void* data;
  int64_t stride;
  Dtype dtype;
  // [rows], added to the logits of a row: the maximum that distances were taken from. Null means 0. Null is right also
  // where one maximum holds for the whole row, because no statistic changes if all logits of a row are shifted.
  const float* shift = nullptr;
};

// What every pass is told: which tokens, and which columns of the vocabulary.
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
  Divergence divergence;    // the second pass computes the value of a mixture
  float* statistics;        // [kStatistics, rows]
  int64_t* actions;         // [2, rows]: student's, teacher's
  RowConstants* constants;  // [rows]
};

// The partials of a row's parts, to be merged into one.
struct CombineParams {
  const RowPartial* partials;  // [splits, rows]
  const uint8_t* mask;         // [rows] or null
  int64_t splits, rows;
  float inverse_temperature;
  RowPartial* out;  // [rows]
};

// Divergences against a mixture m = mixture_weight p + (1 - mixture_weight) q.
struct MixtureParams {
  Logits student, teacher;
  Tokens tokens;
  float inverse_temperature;
  Divergence divergence;
  float mixture_weight;
  const RowConstants* constants;
  float* sums;  // [rows, 2], this shard's part of the divergence and of the centre of its potential
};

struct GradientParams {
  Logits student, teacher;
  Tokens tokens;
  float inverse_temperature;
  Divergence divergence;
  float mixture_weight;
  const RowConstants* constants;
  const float* sums;                    // merged MixtureParams::sums; null for the others
  const float* divergence_gradient;     // [rows] or null for zero
  const float* cross_entropy_gradient;  // [rows] or null for zero
  void* gradient;                       // in the student's dtype; may be the memory of the student's logits
  int64_t gradient_stride;
  int64_t gradient_columns;  // columns of the shard including its padding, which gets zeros
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
  Dtype code;           // kFloat16: logit - maximum in [-65504, 0]; kSqrt8: the square-root code
  void* codes;          // [rows, columns]
};

// Adds one teacher to a mixture of several: mixture = log(exp(mixture) + exp(logits - subtracted)).
struct MixParams {
  Logits teacher;
  const float* subtracted;  // [rows], the teacher's log sum exp minus the log of its weight
  int64_t rows, columns;
  bool first;      // whether it is the first teacher: what the mixture holds is not read then
  float* mixture;  // [rows, columns]
};

}  // namespace vcrd
