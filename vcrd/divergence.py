"""The one autograd function: vocabulary-parallel statistics, divergence and gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd import ops
from vcrd.layout import DIVERGENCES, settle_layout


class DivergenceStats(NamedTuple):
    """Per-token statistics, each [...], float32 (actions int64), equal on every rank of the group.

    Only `divergence` and `cross_entropy` carry a gradient. Logarithms are natural: nats. Everything but `divergence` is
    read at temperature 1. An action is the model's most probable next token. Rows whose mask is 0 hold zeros; without a
    label (or with a negative one) `cross_entropy` and both label log-probabilities are 0.
    """

    divergence: Tensor
    cross_entropy: Tensor
    student_label_logprob: Tensor
    teacher_label_logprob: Tensor
    student_logprob_of_student_action: Tensor
    student_logprob_of_teacher_action: Tensor
    teacher_logprob_of_student_action: Tensor
    teacher_logprob_of_teacher_action: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_action: Tensor
    teacher_action: Tensor


class _Plan(NamedTuple):
    """Everything but tensors that the passes need."""

    divergence: str
    temperature: float
    teacher_share: float  # weight of the teacher in the mixture, for the divergences that have one
    columns: int
    first_column: int

    @property
    def code(self) -> int:
        return DIVERGENCES.index(self.divergence)

    @property
    def has_mixture(self) -> bool:
        return self.divergence in ("jsd", "skew_kl", "skew_reverse_kl")


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.1,
    beta: float = 0.5,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    inplace_gradient: bool = False,
    teacher_max: Tensor | None = None,
) -> DivergenceStats:
    """Divergence of the student from the teacher at each token, and what validity estimators need, in one pass.

    With p = softmax(teacher logits / T) and q = softmax(student logits / T), without the factor T^2:

    - forward_kl KL(p||q), reverse_kl KL(q||p), jeffreys half of each;
    - jsd: beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649);
    - skew_kl KL(p || alpha p + (1 - alpha) q), skew_reverse_kl KL(q || alpha q + (1 - alpha) p)
      (DistiLLM, arXiv 2402.03898).

    Args:
        student_logits: [..., vocabulary shard], float32, bfloat16 or float16. Each rank of `group` holds its own
            contiguous shard, in rank order. The last dimension should be adjacent in memory; otherwise it is copied.
        teacher_logits: [..., vocabulary shard], any of these dtypes, or uint8: the square-root code, which stands for
            the logit -24 (code / 255)^2 below the row's maximum and is decoded in registers. Must begin at the same
            column as the student's shard and hold its true columns; padding may differ. Never receives a gradient.
        labels: [...], integers, ids of the whole vocabulary; negative for none.
        vocab_size: the true vocabulary. Columns at and past it are padding: no probability, zero gradient.
            Default: all.
        mask: [...], any dtype. Rows where it is 0 are not read; their loss and gradient are 0 even where they hold NaN.
        group: the tensor-parallel group; None means one shard.
        inplace_gradient: let backward overwrite the student's logits with their gradient, which saves a buffer of their
            size. Backward then runs once. Without effect under torch.compile, which plans its own buffers, and on
            logits whose rows are not evenly spaced. On CPU, where fresh pages cost more than the arithmetic, the
            buffer of the last large gradient is otherwise kept for the next one.
        teacher_max: [...], float32, added to a row's teacher logits: the maxima that codes, or float16 distances, were
            taken from. Only needed where these differ between the shards of a row, since a shift of the whole row
            changes nothing.

    Accumulates in float32. Inputs are never modified, unless `inplace_gradient` says so.

    Collectives: forward one all-gather of 17 floats per token; `jsd` and the skewed ones one all-reduce of 2 floats per
    token more; backward none. With one rank, none.

    Raises TypeError or ValueError, on every rank and before any collective, that names the argument. A label at or past
    `vocab_size` is a ValueError on CPU; on other devices, where reading it would stall, that token's loss is NaN.
    """
    layout = settle_layout(
        student_logits,
        teacher_logits,
        teacher_max,
        labels,
        mask,
        divergence,
        temperature,
        alpha,
        beta,
        vocab_size,
        group,
    )
    leading, rows = student_logits.shape[:-1], student_logits.shape[:-1].numel()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(rows).contiguous().view(torch.uint8)
    if teacher_max is not None:
        teacher_max = teacher_max.reshape(rows).contiguous()
    if labels is not None:
        labels = labels.to(torch.int64).reshape(rows).contiguous()
        _check_labels(labels, mask, layout.vocab_size)
    if alpha == 0 and divergence.startswith("skew"):
        divergence = "forward_kl" if divergence == "skew_kl" else "reverse_kl"
    share = {"jsd": beta, "skew_kl": alpha, "skew_reverse_kl": 1 - alpha}.get(divergence, 0.0)
    plan = _Plan(divergence, float(temperature), float(share), layout.columns, layout.first_column)
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    inplace_gradient = inplace_gradient and not torch.compiler.is_compiling()
    fields = _VocabParallelDivergence.apply(
        _as_rows(student_logits, rows),
        _as_rows(teacher_logits, rows),
        teacher_max,
        labels,
        mask,
        plan,
        group,
        inplace_gradient,
    )
    return DivergenceStats(*(field.view(leading) for field in fields))


def _as_rows(logits: Tensor, rows: int) -> Tensor:
    """[..., columns] as [rows, columns] with adjacent columns; a view where the strides allow one."""
    matrix = logits.reshape(rows, logits.shape[-1])
    return matrix if matrix.shape[-1] <= 1 or matrix.stride(-1) == 1 else matrix.contiguous()


def _check_labels(labels: Tensor, mask: Tensor | None, vocab_size: int) -> None:
    # Reading values would stall other devices' queues and break a graph under compilation.
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = labels >= vocab_size
    if mask is not None:
        outside &= mask != 0
    if outside.any():
        raise ValueError(f"labels: expected ids below vocab_size {vocab_size}, got {int(labels[outside][0])}")


class _VocabParallelDivergence(torch.autograd.Function):
    """Rows in, the fields of DivergenceStats out, each [rows]."""

    @staticmethod
    def forward(ctx, student, teacher, teacher_max, labels, mask, plan, group, inplace_gradient):
        partials = ops.row_statistics(
            *(student, teacher, teacher_max, labels, mask),
            *(plan.temperature, plan.columns, plan.first_column, plan.code),
        )
        partials = _gather_shards(partials, group)
        statistics, actions, constants = ops.merge_statistics(
            partials, labels, mask, plan.temperature, plan.code
        )
        divergence, *rest = statistics.unbind(0)
        sums = None
        if plan.has_mixture:
            sums = ops.mixture_sums(
                *(student, teacher, teacher_max, mask, constants),
                *(plan.temperature, plan.columns, plan.code, plan.teacher_share),
            )
            if group is not None and sums.shape[0]:
                dist.all_reduce(sums, group=group)
            divergence = sums[:, 0].clamp(min=0)  # rounding may leave a hair below
        cross_entropy, *rest = rest
        ctx.save_for_backward(student, teacher, teacher_max, labels, mask, constants, sums)
        ctx.plan, ctx.inplace_gradient, ctx.overwritten = plan, inplace_gradient, False
        ctx.set_materialize_grads(False)
        fields = (divergence, cross_entropy, *rest, *actions.unbind(0))
        ctx.mark_non_differentiable(*fields[2:])
        return fields

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, divergence_gradient, cross_entropy_gradient, *_):
        if ctx.overwritten:
            raise RuntimeError(
                "inplace_gradient: expected one backward, got a second; the first overwrote the student's logits"
            )
        student, teacher, teacher_max, labels, mask, constants, sums = ctx.saved_tensors
        plan = ctx.plan
        arguments = (
            *(teacher, teacher_max, labels, mask, constants, sums),
            *(None if g is None else g.contiguous() for g in (divergence_gradient, cross_entropy_gradient)),
            *(plan.temperature, plan.columns, plan.first_column, plan.code, plan.teacher_share),
        )
        if ctx.inplace_gradient:
            ctx.overwritten = True
            gradient = student.detach()
            ops.gradient_(gradient, *arguments)
        else:
            gradient = ops.gradient(student, *arguments)
        return gradient, *[None] * 7


def _gather_shards(partials: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, n] of this shard -> [shards, rows, n] of all, in rank order."""
    if group is None or partials.shape[0] == 0:
        return partials.unsqueeze(0)
    shards = dist.get_world_size(group)
    gathered = partials.new_empty((shards * partials.shape[0], partials.shape[1]))
    # The same collective under the name that this torch does not warn about.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, partials, group=group)
    return gathered.view(shards, *partials.shape)
