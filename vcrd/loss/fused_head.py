"""The loss from the student's last hidden states and its output layer: a head that never builds all logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss.agreement import Facts, agree, refuse
from vcrd.loss.api import CalibratedLoss, require_labels
from vcrd.loss.checks import STUDENT_DTYPES
from vcrd.loss.divergence import DivergenceStats, Measured, settle
from vcrd.loss.fused_chunks import FusedHead, Rows, Task, part_of
from vcrd.loss.teacher_blocks import blocks_of
from vcrd.loss.validity import Estimator, check_weighting, validity_weights
from vcrd.teacher_logits import HiddenStates, TopKLogits

# Of float32 logits: [256, 131072]. Each chunk reads the weight, and reads and writes its float32 gradient, so it should
# be of many tokens: docs/performance.md has what smaller ones cost on CPU.
CHUNK_BYTES = 128 << 20


@torch.compiler.disable
def fused_validity_calibrated_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_logits: Tensor | TopKLogits | HiddenStates,
    labels: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    sequence_parallel: bool = False,
    accumulate_main_grad: bool = False,
    gradient_in_forward: bool = True,
    even_upstream: bool = False,
    found_uneven: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.1,
    beta: float = 0.5,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    teacher_max: Tensor | None = None,
    skip_invalid_teacher: bool = False,
    validity: str | Estimator = "label",
    sharpness: float = 4.0,
    floor: float = 0.1,
    ceiling: float = 1.9,
    steps: Tensor | None = None,
    steps_group: dist.ProcessGroup | None = None,
    student_validity: Tensor | None = None,
    teacher_validity: Tensor | None = None,
    normalization: str = "none",
    normalization_group: dist.ProcessGroup | None = None,
    ce_weight: float = 0.0,
) -> CalibratedLoss:
    """`validity_calibrated_kl` of logits = scale * hidden @ weight.T, then softcap * tanh(logits / softcap).

    The logits are float32 from the product's accumulator on, and exist for one chunk of tokens at a time. Gradients go
    to `hidden` and `weight`. Rows, [...] below, are the tokens of the whole sequence.

    Args:
        hidden: [..., hidden size], float32, bfloat16 or float16, after the final norm; the same on every rank of
            `group`. With `sequence_parallel` each rank's own part of the first dimension, in rank order.
        weight: [vocabulary shard, hidden size], any of these dtypes, the rows of this rank's columns. On CUDA a weight
            of the hidden states' own 16-bit dtype is multiplied as it is, with float32 sums, and so is the gradient of
            the logits, rounded to it. All else is multiplied in float32.
        scale, softcap: of the logits; None for no bound.
        sequence_parallel: `hidden` is gathered here, and its gradient reduced and scattered.
        accumulate_main_grad: the weight's gradient is added to `weight.main_grad` in backward, and
            `weight.grad_added_to_main_grad`, where there is one, is set, as Megatron does.
        gradient_in_forward: make gradients in forward, where the logits are at hand: three products with the weight in
            all. They are kept until backward: float32 of the shapes of `hidden` and `weight`. Right for any upstream
            gradient, but only without a fourth and fifth product where that of `loss` is even: the same for all tokens
            that count, up to the values of a floating `mask` (as it is for a masked sum or mean over tokens), and
            where nothing but `loss` is differentiated. To see whether it is even, backward waits for the device once.
            Otherwise, and always with `steps`, a callable `validity`, or the normalization "mean" beside a `ce_weight`,
            backward makes the logits again: four products, and nothing is kept but some numbers per token.
        even_upstream: a promise that the upstream gradient of `loss` is even. Backward then waits for nothing. Where
            it is not even, the gradient of `weight` is NaN. Without effect where backward makes the logits again.
        found_uneven: one float32 on the device of `hidden`, to which backward adds 1 where it looked at the upstream
            gradient of `loss`, or was promised an even one, and it was not. It does not wait for it.
        chunk_bytes: of float32 logits at a time, of the teacher's as well where they are made here. The same on every
            rank. A chunk costs one pass over `weight` and two over its float32 gradient.
        teacher_logits, and all arguments from `divergence` on: see `validity_calibrated_kl`. Tokens whose mask is 0 are
            not computed on CPU. A mask must be the same on every rank of `group`.

    Returns a `CalibratedLoss` with `loss`, `stats.divergence` and `stats.cross_entropy` differentiable, once.

    Collectives over `group`, none with one rank: forward one all-gather of 19 floats per token for each chunk
    (mixture divergences: one all-reduce of 2 floats per token more; `TopKLogits`: one all-gather of 3 floats per token
    more), so that a chunk is done with while it is in memory; backward one all-reduce of the gradient of `hidden`, in
    its dtype. With `sequence_parallel` one all-gather of `hidden` forward, and a reduce-scatter in the place of the
    all-reduce. Normalization "mean" adds its own.

    Breaks the graph under torch.compile.

    Raises TypeError or ValueError that names the argument, before any collective, alike on every rank.
    """
    try:
        _check_own(hidden, weight, scale, softcap, sequence_parallel, chunk_bytes, group)
        _check_found_uneven(found_uneven, hidden.device)
        require_labels(labels, validity, ce_weight)
        shards = 1 if group is None else dist.get_world_size(group)
        leading = hidden.shape[:-1]
        if sequence_parallel:
            leading = torch.Size((leading[0] * shards, *leading[1:]))
        # Of the shape, dtype and device that the logits would have, and of no size.
        logits = weight.detach().new_empty((), dtype=torch.float32).expand(*leading, weight.shape[0])
        check_weighting(
            *(logits[..., 0], validity, sharpness, floor, ceiling, steps),
            *(student_validity, teacher_validity, mask, normalization, steps_group),
        )
    except (TypeError, ValueError) as error:
        if group is not None:
            refuse(group, error)
        raise
    call = settle(
        *(logits, teacher_logits, teacher_max, labels, mask),
        *(divergence, temperature, alpha, beta, vocab_size, group, skip_invalid_teacher),
    )
    if group is not None:
        facts: Facts = {
            "hidden size": hidden.shape[-1],
            "hidden dtype": str(hidden.dtype),
            "sequence_parallel": bool(sequence_parallel),
            "scale": float(scale),
            "softcap": None if softcap is None else float(softcap),
            "chunk_bytes": chunk_bytes,
            "normalization": normalization,
        }
        agree(group, facts, _all_equal)
    rows = logits.shape[:-1].numel()
    scores = [
        None if score is None or score.shape != logits.shape[:-1] else score.reshape(rows)
        for score in (student_validity, teacher_validity)
    ]

    def weigh(measured: Measured, chunk: Rows | None, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        stats, label_validity = measured
        if chunk is not None:
            parts = [part_of(score, chunk) for score in scores]
            return validity_weights(
                *(stats, validity, sharpness, floor, ceiling, None, *parts, counted),
                label_validity=label_validity,
            )
        stats = DivergenceStats(*(field.view(leading) for field in stats))
        counted = None if counted is None else counted.view(leading)
        label_validity = None if label_validity is None else label_validity.view(leading)
        found = validity_weights(
            *(stats, validity, sharpness, floor, ceiling, steps, student_validity, teacher_validity),
            *(counted, normalization, normalization_group, steps_group, label_validity),
        )
        return tuple(field.reshape(rows) for field in found)

    mean = normalization == "mean"
    # What a token weighs must be known from its own statistics, but for one factor of the whole gradient.
    token_by_token = steps is None and not callable(validity) and not (mean and ce_weight != 0)
    form, tensors = blocks_of(teacher_logits, call.teacher_max, rows, *call.layout, chunk_bytes)
    task = Task(
        plan=call.plan,
        group=call.group,
        form=form,
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        ce_weight=float(ce_weight),
        chunk=_chunk_rows(chunk_bytes, call.layout.vocab_size, shards, isinstance(teacher_logits, Tensor)),
        weigh=weigh,
        in_forward=gradient_in_forward and token_by_token and torch.is_grad_enabled(),
        with_mean=mean,
        mean_group=normalization_group,
        main_grad=accumulate_main_grad,
        even_upstream=bool(even_upstream),
        found_uneven=found_uneven,
    )
    expected = None
    if mask is not None and mask.is_floating_point():
        expected = mask.detach().reshape(rows).float()
    if call.group is not None:
        hidden = _TensorParallelInput.apply(hidden, call.group, sequence_parallel)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, weights, rho, *stats = FusedHead.apply(
            *(hidden.reshape(rows, hidden.shape[-1]), weight, call.labels, call.mask, expected, task),
            *tensors,
        )
    stats = DivergenceStats(*(field.view(leading) for field in stats))
    return CalibratedLoss(*(field.view(leading) for field in (loss, weights, rho)), stats)


class _TensorParallelInput(torch.autograd.Function):
    """What each rank multiplies with its shard of the output layer; the shards' gradients are added up."""

    @staticmethod
    def forward(ctx, hidden, group, sequence_parallel):
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        if not sequence_parallel:
            return hidden.view_as(hidden)
        whole = hidden.new_empty((hidden.shape[0] * dist.get_world_size(group), *hidden.shape[1:]))
        # The same collective under the name that this torch does not warn about.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(whole, hidden.contiguous(), group=group)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        if not ctx.sequence_parallel:
            dist.all_reduce(gradient, group=ctx.group)
            return gradient, None, None
        part = gradient.new_empty((gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:]))
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(part, gradient, group=ctx.group)
        return part, None, None


def _chunk_rows(chunk_bytes: int, vocab_size: int, shards: int, dense: bool) -> int:
    """Tokens of a chunk: the same on every rank, whatever the width of its shard, for ranks meet at each chunk."""
    columns = -(-vocab_size // shards)
    return max(1, chunk_bytes // (4 * columns * (1 if dense else 2)))


def _check_own(hidden, weight, scale, softcap, sequence_parallel, chunk_bytes, group) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in STUDENT_DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    least = 2 if sequence_parallel else 1
    if hidden.dim() < least:
        shape = "[sequence / ranks, ..., hidden size]" if sequence_parallel else "[..., hidden size]"
        raise ValueError(f"hidden: expected shape {shape}, got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [vocabulary shard, {hidden.shape[-1]}], got {list(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight: expected device {hidden.device} of hidden, got {weight.device}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is None and name == "softcap":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel: expected a group to gather the hidden states over, got none")
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected an integer of at least 1, got {chunk_bytes!r}")


def _check_found_uneven(found: Tensor | None, device: torch.device) -> None:
    if found is None:
        return
    if not isinstance(found, Tensor):
        raise TypeError(f"found_uneven: expected a tensor or None, got {type(found).__name__}")
    if found.numel() != 1 or found.dtype != torch.float32 or found.device != device:
        raise ValueError(
            f"found_uneven: expected one float32 on {device}, got {list(found.shape)} {found.dtype} on {found.device}"
        )


def _all_equal(ranks: list[Facts]) -> None:
    for rank, facts in enumerate(ranks):
        for name, value in facts.items():
            if value != ranks[0][name]:
                raise ValueError(
                    f"{name}: expected equal on every rank, got {ranks[0][name]} on rank 0, {value} on rank {rank}"
                )
