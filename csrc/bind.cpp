// The binding layer: tensors in, tensors out. It checks what the kernels rely on, allocates the outputs, dispatches.
// Everything a user can get wrong is checked in Python with a sentence of its own; the checks here guard memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "kernels.h"

namespace vcrd {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "vcrd kernels read float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

Logits logits_of(const Tensor& t) {
  TORCH_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), "vcrd kernels need rows with adjacent columns");
  return {t.const_data_ptr(), t.stride(0), dtype_of(t)};
}

template <class T>
const T* pointer(const OptionalTensor& t, at::ScalarType dtype, int64_t elements) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == dtype && t->is_contiguous() && t->numel() == elements,
              "vcrd kernels need a contiguous ", dtype, " tensor of ", elements, " elements, got ", t->scalar_type(),
              " of ", t->numel());
  return static_cast<const T*>(t->const_data_ptr());
}

Tokens tokens_of(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& mask,
                 int64_t columns, int64_t first_column) {
  int64_t rows = student.size(0);
  TORCH_CHECK(teacher.size(0) == rows && columns >= 0 && columns <= student.size(1) && columns <= teacher.size(1),
              "vcrd kernels need equal rows and no more true columns than the logits have");
  return {pointer<int64_t>(labels, at::kLong, rows), pointer<uint8_t>(mask, at::kByte, rows), rows, columns,
          first_column};
}

Divergence divergence_of(int64_t value) {
  TORCH_CHECK(value >= 0 && value <= int64_t(Divergence::kSkewReverseKl), "unknown divergence ", value);
  return static_cast<Divergence>(value);
}

// Spreads rows over torch's thread pool, in pieces worth a thread's wake-up.
template <class Kernel, class Params>
void over_rows(Kernel kernel, const Params& params, int64_t rows, int64_t columns) {
  int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

// Memory of the last large gradient, kept for the next one. The pages of a fresh buffer cost more than the arithmetic:
// the kernel maps and clears each of them anew, since the C library returns large blocks to it at once. One buffer is
// kept, never more; the gradient that is alive does not count twice.
class GradientMemory {
 public:
  static GradientMemory& instance() {
    static auto* memory = new GradientMemory;  // never destroyed: a gradient may outlive static destruction
    return *memory;
  }

  Tensor tensor(const Tensor& like) {
    size_t bytes = like.numel() * like.element_size();
    if (bytes < kSmallest) return at::empty(like.sizes(), like.options());
    void* block = take(bytes);
    auto give_back = [bytes](void* p) { instance().keep(p, bytes); };
    return at::from_blob(block, like.sizes(), give_back, like.options().requires_grad(false));
  }

 private:
  static constexpr size_t kSmallest = size_t(4) << 20;
  static constexpr size_t kAlignment = 4096;

  void* take(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (kept_ && kept_bytes_ == bytes) return std::exchange(kept_, nullptr);
    }
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, kAlignment, bytes) == 0, "no memory for a gradient of ", bytes, " bytes");
    return block;
  }

  void keep(void* block, size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      std::swap(block, kept_);
      kept_bytes_ = bytes;
    }
    free(block);  // what was kept before
  }

  std::mutex mutex_;
  void* kept_ = nullptr;
  size_t kept_bytes_ = 0;
};

Tensor row_statistics(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                      const OptionalTensor& mask, double temperature, int64_t columns, int64_t first_column,
                      int64_t divergence) {
  Divergence needed = divergence_of(divergence);
  StatisticsParams p{logits_of(student),
                     logits_of(teacher),
                     tokens_of(student, teacher, labels, mask, columns, first_column),
                     float(1.0 / temperature),
                     needed == Divergence::kReverseKl || needed == Divergence::kJeffreys,
                     nullptr};
  Tensor partials = at::empty({p.tokens.rows, kPartialFloats}, student.options().dtype(at::kFloat));
  p.partials = static_cast<RowPartial*>(partials.mutable_data_ptr());
  over_rows(cpu::kernels().row_statistics, p, p.tokens.rows, columns);
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
                static_cast<RowConstants*>(constants.mutable_data_ptr())};
  over_rows(cpu::kernels().merge_statistics, p, rows, 64 * shards);
  return {statistics, actions, constants};
}

Tensor mixture_sums(const Tensor& student, const Tensor& teacher, const OptionalTensor& mask, const Tensor& constants,
                    double temperature, int64_t columns, int64_t divergence, double teacher_share) {
  Tokens tokens = tokens_of(student, teacher, std::nullopt, mask, columns, 0);
  Tensor sums = at::empty({tokens.rows, 2}, constants.options());
  MixtureParams p{
      logits_of(student),
      logits_of(teacher),
      tokens,
      float(1.0 / temperature),
      divergence_of(divergence),
      float(teacher_share),
      reinterpret_cast<const RowConstants*>(pointer<float>(constants, at::kFloat, tokens.rows * kConstantFloats)),
      sums.mutable_data_ptr<float>()};
  over_rows(cpu::kernels().mixture_sums, p, tokens.rows, columns);
  return sums;
}

void write_gradient(Tensor& gradient, const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                    const OptionalTensor& mask, const Tensor& constants, const OptionalTensor& sums,
                    const OptionalTensor& divergence_gradient, const OptionalTensor& cross_entropy_gradient,
                    double temperature, int64_t columns, int64_t first_column, int64_t divergence,
                    double teacher_share) {
  Tokens tokens = tokens_of(student, teacher, labels, mask, columns, first_column);
  GradientParams p{
      logits_of(student),
      logits_of(teacher),
      tokens,
      float(1.0 / temperature),
      divergence_of(divergence),
      float(teacher_share),
      reinterpret_cast<const RowConstants*>(pointer<float>(constants, at::kFloat, tokens.rows * kConstantFloats)),
      pointer<float>(sums, at::kFloat, tokens.rows * 2),
      pointer<float>(divergence_gradient, at::kFloat, tokens.rows),
      pointer<float>(cross_entropy_gradient, at::kFloat, tokens.rows),
      gradient.mutable_data_ptr(),
      gradient.stride(0),
      gradient.size(1)};
  TORCH_CHECK(p.divergence < Divergence::kJsd || sums.has_value(), "the mixture divergences need their merged sums");
  over_rows(cpu::kernels().gradient, p, tokens.rows, columns);
}

Tensor gradient(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& mask,
                const Tensor& constants, const OptionalTensor& sums, const OptionalTensor& divergence_gradient,
                const OptionalTensor& cross_entropy_gradient, double temperature, int64_t columns, int64_t first_column,
                int64_t divergence, double teacher_share) {
  Tensor out = GradientMemory::instance().tensor(student);
  write_gradient(out, student, teacher, labels, mask, constants, sums, divergence_gradient, cross_entropy_gradient,
                 temperature, columns, first_column, divergence, teacher_share);
  return out;
}

void gradient_(Tensor& student, const Tensor& teacher, const OptionalTensor& labels, const OptionalTensor& mask,
               const Tensor& constants, const OptionalTensor& sums, const OptionalTensor& divergence_gradient,
               const OptionalTensor& cross_entropy_gradient, double temperature, int64_t columns, int64_t first_column,
               int64_t divergence, double teacher_share) {
  write_gradient(student, student, teacher, labels, mask, constants, sums, divergence_gradient, cross_entropy_gradient,
                 temperature, columns, first_column, divergence, teacher_share);
}

}  // namespace

TORCH_LIBRARY(vcrd, library) {
  library.def(
      "row_statistics(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, float temperature, SymInt columns, "
      "SymInt first_column, int divergence) -> Tensor");
  library.def(
      "merge_statistics(Tensor partials, Tensor? labels, Tensor? mask, float temperature, int divergence) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "mixture_sums(Tensor student, Tensor teacher, Tensor? mask, Tensor constants, float temperature, SymInt columns, "
      "int divergence, float teacher_share) -> Tensor");
  library.def(
      "gradient(Tensor student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor constants, Tensor? sums, "
      "Tensor? divergence_gradient, Tensor? cross_entropy_gradient, float temperature, SymInt columns, "
      "SymInt first_column, int divergence, float teacher_share) -> Tensor");
  library.def(
      "gradient_(Tensor(a!) student, Tensor teacher, Tensor? labels, Tensor? mask, Tensor constants, Tensor? sums, "
      "Tensor? divergence_gradient, Tensor? cross_entropy_gradient, float temperature, SymInt columns, "
      "SymInt first_column, int divergence, float teacher_share) -> ()");
}

TORCH_LIBRARY_IMPL(vcrd, CPU, library) {
  library.impl("row_statistics", row_statistics);
  library.impl("merge_statistics", merge_statistics);
  library.impl("mixture_sums", mixture_sums);
  library.impl("gradient", gradient);
  library.impl("gradient_", gradient_);
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "vcrd's compiled kernels, registered as torch.ops.vcrd.*";
  module.attr("cpu_instruction_set") = std::string(cpu::kernels().instruction_set);
#ifdef _OPENMP
  module.attr("threaded") = true;
#else
  module.attr("threaded") = false;  // at::parallel_for is then a plain loop
#endif
  module.attr("torch_version") = std::string(VCRD_TORCH_VERSION);
  module.attr("partial_floats") = kPartialFloats;
  module.attr("constant_floats") = kConstantFloats;
  module.attr("statistics") = int64_t(kStatistics);
}

}  // namespace vcrd
