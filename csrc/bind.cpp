// The binding layer: tensors in, tensors out. It checks what the kernels rely on, allocates the outputs and calls the
// kernels. Python checks the user's arguments and explains what is wrong; the checks here only guard memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cstddef>
#include <iterator>
#include <string>
#include <tuple>

#include "gradient_memory.h"
#include "kernels.h"

#ifdef VCRD_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#ifndef VCRD_CUDA_DEVICE  // a test that emulates CUDA names the CPU here
#define VCRD_CUDA_DEVICE at::kCUDA
#endif
#endif

namespace vcrd {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifndef VCRD_CUDA_ARCHITECTURES  // a build without CUDA, or without setup.py
#define VCRD_CUDA_ARCHITECTURES ""
#endif
#ifdef VCRD_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Runs `on_gpu(stream)` on the tensor's device and torch's current stream, or `on_cpu()`. `on_gpu` takes its stream as
// `auto`, so that without CUDA it is never compiled.
template <class OnGpu, class OnCpu>
void on_device(const Tensor& t, OnGpu on_gpu, OnCpu on_cpu) {
#ifdef VCRD_CUDA
  if (t.device().type() == VCRD_CUDA_DEVICE) {
    c10::cuda::CUDAGuard guard(t.device());
    const char* error = on_gpu(c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(!error, "vcrd's CUDA kernels on ", t.device(), ": ", error);
    return;
  }
#endif
  on_cpu();
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kByte:
      return Dtype::kSqrt8;
    default:
      TORCH_CHECK_TYPE(false, "vcrd kernels read float32, bfloat16, float16 or uint8 codes, got ", t.scalar_type());
  }
}

template <class T>
const T* pointer(const OptionalTensor& t, at::ScalarType dtype, int64_t elements) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == dtype && t->is_contiguous() && t->numel() == elements,
              "vcrd kernels need a contiguous ", dtype, " tensor of ", elements, " elements, got ", t->scalar_type(),
              " of ", t->numel());
  return static_cast<const T*>(t->const_data_ptr());
}

Logits logits_of(const Tensor& t, const OptionalTensor& shift = std::nullopt) {
  TORCH_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), "vcrd kernels need rows with adjacent columns");
  return {t.const_data_ptr(), t.stride(0), dtype_of(t), pointer<float>(shift, at::kFloat, t.size(0))};
}

Logits student_of(const Tensor& t) {
  Logits logits = logits_of(t);
  TORCH_CHECK_TYPE(logits.dtype != Dtype::kSqrt8, "vcrd kernels take codes from the teacher alone");
  return logits;
}

Tokens tokens_of(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& mask,
                 int64_t columns, int64_t first_column) {
  int64_t rows = student.size(0);
  TORCH_CHECK(teacher.device() == student.device(), "vcrd kernels need both logits on one device");
  TORCH_CHECK(teacher.size(0) == rows && columns >= 0 && columns <= student.size(1) && columns <= teacher.size(1),
              "vcrd kernels need equal rows and no more true columns than the logits have");
  return {pointer<int64_t>(labels, at::kLong, rows), pointer<uint8_t>(mask, at::kByte, rows), rows, columns,
          first_column};
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Divergence divergence_of(int64_t value) {
  TORCH_CHECK(value >= 0 && value < kDivergences, "unknown divergence ", value);
  return static_cast<Divergence>(value);
}

// Spreads rows over torch's thread pool, in pieces that are worth waking a thread.
template <class Kernel, class Params>
void over_rows(Kernel kernel, const Params& params, int64_t rows, int64_t columns) {
  int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

Tensor row_statistics(const Tensor& student, const Tensor& teacher, const OptionalTensor& teacher_max,
                      const OptionalTensor& labels, const OptionalTensor& mask, double temperature, int64_t columns,
                      int64_t first_column, int64_t divergence) {
  StatisticsParams p{student_of(student),
                     logits_of(teacher, teacher_max),
                     tokens_of(student, teacher, labels, mask, columns, first_column),
                     float(1.0 / temperature),
                     has_reverse(divergence_of(divergence)),
                     nullptr};
  const int64_t rows = p.tokens.rows;
  auto partials_of = [&](int64_t parts) {
    return at::empty({parts * rows, kPartialFloats}, student.options().dtype(at::kFloat));
  };
  Tensor partials = partials_of(1);
  p.partials = data<RowPartial>(partials);
  on_device(
      student,
      [&](auto stream) -> const char* {
        const int64_t splits = cuda::row_splits(rows, columns);
        if (splits == 1) return cuda::row_statistics(p, 1, stream);
        Tensor parts = partials_of(splits);
        CombineParams combine{data<RowPartial>(parts), p.tokens.mask, splits, rows, p.inverse_temperature, p.partials};
        p.partials = data<RowPartial>(parts);
        const char* error = cuda::row_statistics(p, splits, stream);
        return error ? error : cuda::combine_partials(combine, stream);
      },
      [&] { over_rows(cpu::kernels().row_statistics, p, rows, columns); });
  return partials;
}

std::tuple<Tensor, Tensor, Tensor> merge_statistics(const Tensor& partials, const OptionalTensor& labels,
                                                    const OptionalTensor& mask, double temperature,
                                                    int64_t divergence) {
  TORCH_CHECK(partials.dim() == 3 && partials.size(2) == kPartialFloats && partials.scalar_type() == at::kFloat &&
                  partials.is_contiguous(),
              "vcrd.merge_statistics needs contiguous float32 partials [shards, rows, ", kPartialFloats, "]");
  int64_t shards = partials.size(0), rows = partials.size(1);
  Tensor statistics = at::empty({kStatistics, rows}, partials.options());
  Tensor actions = at::empty({2, rows}, partials.options().dtype(at::kLong));
  Tensor constants = at::empty({rows, kConstantFloats}, partials.options());
  MergeParams p{static_cast<const RowPartial*>(partials.const_data_ptr()),
                pointer<int64_t>(labels, at::kLong, rows),
                pointer<uint8_t>(mask, at::kByte, rows),
                shards,
                rows,
                float(1.0 / temperature),
                divergence_of(divergence),
                statistics.mutable_data_ptr<float>(),
                actions.mutable_data_ptr<int64_t>(),
                data<RowConstants>(constants)};
  on_device(
      partials, [&](auto stream) { return cuda::merge_statistics(p, stream); },
      [&] { over_rows(cpu::kernels().merge_statistics, p, rows, 64 * shards); });
  return {statistics, actions, constants};
}

Tensor mixture_sums(const Tensor& student, const Tensor& teacher, const OptionalTensor& teacher_max,
                    const OptionalTensor& mask, const Tensor& constants, double temperature, int64_t columns,
                    int64_t divergence, double mixture_weight) {
  Tokens tokens = tokens_of(student, teacher, std::nullopt, mask, columns, 0);
  Tensor sums = at::empty({tokens.rows, 2}, constants.options());
  MixtureParams p{
      student_of(student),
      logits_of(teacher, teacher_max),
      tokens,
      float(1.0 / temperature),
      divergence_of(divergence),
      float(mixture_weight),
      reinterpret_cast<const RowConstants*>(pointer<float>(constants, at::kFloat, tokens.rows * kConstantFloats)),
      sums.mutable_data_ptr<float>()};
  on_device(
      student,
      [&](auto stream) {
        const int64_t splits = cuda::row_splits(tokens.rows, columns);
        if (splits > 1) sums = at::empty({splits, tokens.rows, 2}, constants.options());
        p.sums = sums.mutable_data_ptr<float>();
        const char* error = cuda::mixture_sums(p, splits, stream);
        if (splits > 1) sums = sums.sum(0);
        return error;
      },
      [&] { over_rows(cpu::kernels().mixture_sums, p, tokens.rows, columns); });
  return sums;
}

void write_gradient(Tensor& gradient, const Tensor& student, const Tensor& teacher, const OptionalTensor& teacher_max,
                    const OptionalTensor& labels, const OptionalTensor& mask, const Tensor& constants,
                    const OptionalTensor& sums, const OptionalTensor& divergence_gradient,
                    const OptionalTensor& cross_entropy_gradient, double temperature, int64_t columns,
                    int64_t first_column, int64_t divergence, double mixture_weight) {
  Tokens tokens = tokens_of(student, teacher, labels, mask, columns, first_column);
  GradientParams p{
      student_of(student),
      logits_of(teacher, teacher_max),
      tokens,
      float(1.0 / temperature),
      divergence_of(divergence),
      float(mixture_weight),
      reinterpret_cast<const RowConstants*>(pointer<float>(constants, at::kFloat, tokens.rows * kConstantFloats)),
      pointer<float>(sums, at::kFloat, tokens.rows * 2),
      pointer<float>(divergence_gradient, at::kFloat, tokens.rows),
      pointer<float>(cross_entropy_gradient, at::kFloat, tokens.rows),
      gradient.mutable_data_ptr(),
      gradient.stride(0),
      gradient.size(1)};
  TORCH_CHECK(!has_mixture(p.divergence) || sums.has_value(), "the mixture divergences need their merged sums");
  on_device(
      student, [&](auto stream) { return cuda::gradient(p, stream); },
      [&] { over_rows(cpu::kernels().gradient, p, tokens.rows, columns); });
}

Tensor new_gradient(const Tensor& student) {
  using Memory = cpu::GradientMemory;
  const size_t bytes = student.numel() * student.element_size();
  if (!student.is_cpu() || bytes < Memory::kSmallest) return at::empty(student.sizes(), student.options());
  void* block = Memory::instance().take(bytes);
  TORCH_CHECK(block, "no memory for a gradient of ", bytes, " bytes");
  auto give_back = [bytes](void* p) { Memory::instance().keep(p, bytes); };
  return at::from_blob(block, student.sizes(), give_back, student.options().requires_grad(false));
}

Tensor gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& teacher_max,
                const OptionalTensor& labels, const OptionalTensor& mask, const Tensor& constants,
                const OptionalTensor& sums, const OptionalTensor& divergence_gradient,
                const OptionalTensor& cross_entropy_gradient, double temperature, int64_t columns, int64_t first_column,
                int64_t divergence, double mixture_weight) {
  Tensor out = new_gradient(student);
  write_gradient(out, student, teacher, teacher_max, labels, mask, constants, sums, divergence_gradient,
                 cross_entropy_gradient, temperature, columns, first_column, divergence, mixture_weight);
  return out;
}

void gradient_(Tensor& student, const Tensor& teacher, const OptionalTensor& teacher_max, const OptionalTensor& labels,
               const OptionalTensor& mask, const Tensor& constants, const OptionalTensor& sums,
               const OptionalTensor& divergence_gradient, const OptionalTensor& cross_entropy_gradient,
               double temperature, int64_t columns, int64_t first_column, int64_t divergence, double mixture_weight) {
  write_gradient(student, student, teacher, teacher_max, labels, mask, constants, sums, divergence_gradient,
                 cross_entropy_gradient, temperature, columns, first_column, divergence, mixture_weight);
}

// Row maxima [rows] of logits [rows, columns].
Tensor row_maxima(const Tensor& logits) {
  Tensor maxima = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
  MaximumParams p{student_of(logits), logits.size(0), logits.size(1), maxima.mutable_data_ptr<float>()};
  on_device(
      logits, [&](auto stream) { return cuda::row_maxima(p, stream); },
      [&] { over_rows(cpu::kernels().row_maxima, p, p.rows, p.columns); });
  return maxima;
}

// Logits as distances below `maxima`, into `codes` [rows, columns]: float16, or uint8 for the 8-bit square-root code.
void encode(const Tensor& logits, const Tensor& maxima, Tensor& codes) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const Dtype code = dtype_of(codes);
  TORCH_CHECK(code == Dtype::kFloat16 || code == Dtype::kSqrt8, "codes are float16 or uint8, not ",
              codes.scalar_type());
  TORCH_CHECK(codes.is_contiguous() && codes.sizes() == logits.sizes() && codes.device() == logits.device(),
              "vcrd.encode needs contiguous codes of the logits' shape and device");
  EncodeParams p{student_of(logits),      rows, columns, pointer<float>(maxima, at::kFloat, rows), code,
                 codes.mutable_data_ptr()};
  on_device(
      logits, [&](auto stream) { return cuda::encode(p, stream); },
      [&] { over_rows(cpu::kernels().encode, p, rows, columns); });
}

// Adds a teacher to a mixture of several, [rows, columns] float32.
void mix_(Tensor& mixture, const Tensor& teacher, const OptionalTensor& teacher_max, const Tensor& subtracted,
          bool first) {
  const int64_t rows = mixture.size(0), columns = mixture.size(1);
  TORCH_CHECK(mixture.is_contiguous() && mixture.scalar_type() == at::kFloat && mixture.device() == teacher.device() &&
                  teacher.size(0) == rows && teacher.size(1) >= columns,
              "vcrd.mix_ needs a contiguous float32 mixture of the teacher's rows and device, and no more columns");
  MixParams p{logits_of(teacher, teacher_max),  pointer<float>(subtracted, at::kFloat, rows), rows, columns, first,
              mixture.mutable_data_ptr<float>()};
  on_device(
      mixture, [&](auto stream) { return cuda::mix(p, stream); },
      [&] { over_rows(cpu::kernels().mix, p, rows, columns); });
}

}  // namespace

TORCH_LIBRARY(vcrd, library) {
  library.def(
      "row_statistics(Tensor student, Tensor teacher, Tensor? teacher_max, Tensor? labels, Tensor? mask, float "
      "temperature, SymInt columns, "
      "SymInt first_column, int divergence) -> Tensor");
  library.def(
      "merge_statistics(Tensor partials, Tensor? labels, Tensor? mask, float temperature, int divergence) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "mixture_sums(Tensor student, Tensor teacher, Tensor? teacher_max, Tensor? mask, Tensor constants, float "
      "temperature, SymInt columns, "
      "int divergence, float mixture_weight) -> Tensor");
  library.def(
      "gradient(Tensor student, Tensor teacher, Tensor? teacher_max, Tensor? labels, Tensor? mask, Tensor constants, "
      "Tensor? sums, "
      "Tensor? divergence_gradient, Tensor? cross_entropy_gradient, float temperature, SymInt columns, "
      "SymInt first_column, int divergence, float mixture_weight) -> Tensor");
  library.def(
      "gradient_(Tensor(a!) student, Tensor teacher, Tensor? teacher_max, Tensor? labels, Tensor? mask, Tensor "
      "constants, Tensor? sums, "
      "Tensor? divergence_gradient, Tensor? cross_entropy_gradient, float temperature, SymInt columns, "
      "SymInt first_column, int divergence, float mixture_weight) -> ()");
  library.def("row_maxima(Tensor logits) -> Tensor");
  library.def("encode(Tensor logits, Tensor maxima, Tensor(a!) codes) -> ()");
  library.def("mix_(Tensor(a!) mixture, Tensor teacher, Tensor? teacher_max, Tensor subtracted, bool first) -> ()");
}

void implement(torch::Library& library) {
  library.impl("row_statistics", row_statistics);
  library.impl("merge_statistics", merge_statistics);
  library.impl("mixture_sums", mixture_sums);
  library.impl("gradient", gradient);
  library.impl("gradient_", gradient_);
  library.impl("row_maxima", row_maxima);
  library.impl("encode", encode);
  library.impl("mix_", mix_);
}

TORCH_LIBRARY_IMPL(vcrd, CPU, library) { implement(library); }
#ifdef VCRD_CUDA
TORCH_LIBRARY_IMPL(vcrd, CUDA, library) { implement(library); }
#endif

// The names of the merged statistics, in the order of params.h: Python finds a row by its name.
constexpr const char* kStatisticNames[] = {
    "divergence",
    "cross_entropy",
    "student_label_logprob",
    "teacher_label_logprob",
    "student_logprob_of_student_action",
    "student_logprob_of_teacher_action",
    "teacher_logprob_of_student_action",
    "teacher_logprob_of_teacher_action",
    "student_entropy",
    "teacher_entropy",
};
static_assert(std::size(kStatisticNames) == static_cast<size_t>(kStatistics));

template <size_t kCount>
pybind11::tuple tuple_of(const char* const (&names)[kCount]) {
  pybind11::tuple out(kCount);
  for (size_t i = 0; i < kCount; ++i) out[i] = names[i];
  return out;
}

#define VCRD_PLACE(Struct, field) pybind11::arg(#field) = offsetof(Struct, field) / sizeof(float)

PYBIND11_MODULE(_C, module) {
  module.doc() = "vcrd's compiled kernels, registered as torch.ops.vcrd.*";
  module.attr("cpu_instruction_set") = std::string(cpu::kernels().instruction_set);
#ifdef _OPENMP
  module.attr("threaded") = true;
#else
  module.attr("threaded") = false;  // at::parallel_for is then a plain loop
#endif
  module.attr("with_cuda") = kWithCuda;
  module.attr("cuda_architectures") = std::string(VCRD_CUDA_ARCHITECTURES);  // "8.0;9.0a"
  module.attr("torch_version") = std::string(VCRD_TORCH_VERSION);
  module.attr("partial_floats") = kPartialFloats;
  module.attr("constant_floats") = kConstantFloats;
  module.attr("divergences") = tuple_of(kDivergenceNames);
  module.attr("statistics") = tuple_of(kStatisticNames);
  module.attr("partial_columns") =
      pybind11::dict(VCRD_PLACE(RowPartial, teacher_max), VCRD_PLACE(RowPartial, teacher_sum));
  module.attr("constant_columns") = pybind11::dict(VCRD_PLACE(RowConstants, student_max));
}

}  // namespace vcrd
