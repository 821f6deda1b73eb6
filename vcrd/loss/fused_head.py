"""The loss from the student's last hidden states and its output layer: a head that never builds all logits.

A chunk's logits are made, measured, turned into their own gradient and multiplied back while they are in memory: three
products, as many as with all logits stored. That needs each token's upstream gradient before backward has brought it.
The gradient of the hidden states is linear in it, token by token, and so can wait for it as a factor. That of the
weight is a sum over tokens: it is made for the upstream gradient that a masked sum or mean over tokens has, and is
right up to one factor where backward brings that. Where it brings another one, it is made again from new logits; to
see which it is waits for the device, unless the caller has promised it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss import ops
from vcrd.loss.api import CalibratedLoss
from vcrd.loss.checks import (
    STUDENT_DTYPES,
    RankFacts,
    agree,
    check_dtype,
    check_weight_shape,
    refuse,
    require_equal,
)
from vcrd.loss.config import HeadConfig, LossConfig, fused_configs
from vcrd.loss.divergence import (
    DivergenceStats,
    Measured,
    PassSettings,
    SettledCall,
    kernel_arguments,
    measured_of,
    settle,
    statistics_pass,
)
from vcrd.loss.judge import Verdicts, judged_actions, require_judge, settle_judge
from vcrd.loss.teacher_blocks import (
    DenseBlocks,
    TeacherBlocks,
    TopKBlocks,
    blocks_of,
    padded_columns,
)
from vcrd.loss.validity import check_weighting, require_labels, validity_weights, weight_divisor, weighted
from vcrd.teacher_logits import DenseLogits, TeacherLogits, factor_of

Rows = slice | Tensor  # of all tokens: from .. to, or their indices
Weigh = Callable[[Measured, "Rows | None", "Tensor | None"], tuple[Tensor, Tensor]]
# By which upstream gradients may differ from a common multiple of those expected: rounding, and nothing more.
_ROUNDING = 4e-7


@torch.compiler.disable
def fused_validity_calibrated_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_logits: Tensor | TeacherLogits,
    labels: Tensor | None = None,
    *,
    head: HeadConfig | None = None,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    steps: Tensor | None = None,
    student_validity: Tensor | None = None,
    teacher_validity: Tensor | None = None,
    judge: Tensor | TeacherLogits | None = None,
    **options: Any,
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
        teacher_logits, labels, config, mask, group, steps, student_validity, teacher_validity, judge: see
            `validity_calibrated_kl`. Tokens whose mask is 0 are not computed on CPU. A mask must be the same on every
            rank of `group`.
        head: the settings of the output layer: see `HeadConfig`. Default: `HeadConfig()`.
        options: fields of `LossConfig` and `HeadConfig`, which count before those of `config` and `head`.

    Returns a `CalibratedLoss` with `loss`, `stats.divergence` and `stats.cross_entropy` differentiable, once.

    Collectives over `group`, none with one rank: forward one all-gather of 19 floats per token for each chunk
    (mixture divergences: one all-reduce of 2 floats per token more; `TopKLogits`: one all-gather of 3 floats per token
    more), so that a chunk is done with while it is in memory; backward one all-reduce of the gradient of `hidden`, in
    its dtype. With `sequence_parallel` one all-gather of `hidden` forward, and a reduce-scatter in the place of the
    all-reduce. The weights add those of `validity_weights`, and a `judge` its own, once for all chunks.

    Breaks the graph under torch.compile.

    Raises TypeError or ValueError that names the argument, before any collective, alike on every rank.
    """
    try:
        head, config = fused_configs(head, config, options)
        _check_own(hidden, weight, head, group)
        require_labels(labels, config)
        require_judge(judge, teacher_logits, config)
        shards = 1 if group is None else dist.get_world_size(group)
        leading = hidden.shape[:-1]
        if head.sequence_parallel:
            leading = torch.Size((leading[0] * shards, *leading[1:]))
        # Of the shape, dtype and device that the logits would have, and of no size.
        logits = weight.detach().new_empty((), dtype=torch.float32).expand(*leading, weight.shape[0])
        check_weighting(logits[..., 0], config, mask, steps, student_validity, teacher_validity)
    except (TypeError, ValueError) as error:
        refuse(group, error)
        raise
    settled = settle(logits, teacher_logits, labels, mask, config, group)
    judging = None if judge is None else _Judging(settle_judge(logits, judge, mask, config, group))
    if group is not None:
        agree(group, _facts(hidden, head, config), require_equal)
    rows = leading.numel()
    # What a token weighs must be known from its own statistics, but for one factor of the whole gradient.
    divided_beside_ce = config.normalization != "none" and config.ce_weight != 0
    afterwards = callable(config.validity) or judging is not None or config.weighting == "gap"
    token_by_token = steps is None and not afterwards and not divided_beside_ce
    form, tensors = blocks_of(settled.teacher, rows, settled.shard, head.chunk_bytes, settled.group)
    dense = isinstance(settled.teacher, DenseLogits)
    call = ChunkedCall(
        head=head,
        config=config,
        settings=settled.settings,
        group=settled.group,
        form=form,
        chunk=_chunk_rows(head.chunk_bytes, settled.shard.vocab_size, shards, dense),
        weigh=_weighing(config, leading, steps, student_validity, teacher_validity, judging),
        in_forward=head.upstream != "uneven" and token_by_token and torch.is_grad_enabled(),
    )
    expected_upstream = None
    if mask is not None and mask.is_floating_point():
        expected_upstream = mask.detach().reshape(rows).float()
    if settled.group is not None:
        hidden = _TensorParallelInput.apply(hidden, settled.group, head.sequence_parallel)
    hidden = hidden.reshape(rows, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        loss, weights, rho, *fields = FusedLoss.apply(
            hidden, weight, settled.labels, settled.mask, expected_upstream, call, *tensors
        )
    loss, stats = loss.view(leading), DivergenceStats(*(field.view(leading) for field in fields))
    if judging is not None and config.skip_invalid_teacher:
        loss, stats = torch.where(judging.invalid, 0.0, loss), stats.skipping(judging.invalid)
    return CalibratedLoss(loss, weights.view(leading), rho.view(leading), stats)


class _Judging:
    """The judge of one call. invalid: bool [...], rows in which it is no distribution, known once it has judged."""

    def __init__(self, call: SettledCall) -> None:
        self._call = call
        self.invalid: Tensor | None = None

    def __call__(self, stats: DivergenceStats) -> Verdicts:
        found = judged_actions(self._call, stats)
        self.invalid = found.invalid
        return found


def _weighing(
    config: LossConfig,
    leading: torch.Size,
    steps: Tensor | None,
    student_validity: Tensor | None,
    teacher_validity: Tensor | None,
    judging: _Judging | None,
) -> Weigh:
    """What makes weights of statistics: of a chunk's, token by token, or of those of all tokens [...]."""
    rows = leading.numel()
    by_chunk = replace(config, normalization="none") if config.normalization != "none" else config
    scores = [
        None if score is None or score.shape != leading else score.reshape(rows)
        for score in (student_validity, teacher_validity)
    ]

    def weigh(measured: Measured, chunk: Rows | None, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        if chunk is not None:
            student, teacher = (part_of(score, chunk) for score in scores)
            return validity_weights(
                measured.stats,
                config=by_chunk,
                mask=counted,
                student_validity=student,
                teacher_validity=teacher,
                label_validity=measured.label_validity,
            )
        label_validity = measured.label_validity
        stats = DivergenceStats(*(field.view(leading) for field in measured.stats))
        judged = None if judging is None else judging(stats)
        counted = None if counted is None else counted.view(leading)
        if judged is not None and config.skip_invalid_teacher:  # which makes `counted` be there
            counted = (counted != 0) & ~judged.invalid
        weight, rho = validity_weights(
            stats,
            config=config,
            mask=counted,
            steps=steps,
            student_validity=student_validity,
            teacher_validity=teacher_validity,
            label_validity=None if label_validity is None else label_validity.view(leading),
            judged=judged,
        )
        return weight.reshape(rows), rho.reshape(rows)

    return weigh


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


def _facts(hidden: Tensor, head: HeadConfig, config: LossConfig) -> RankFacts:
    return {
        "hidden size": hidden.shape[-1],
        "hidden dtype": str(hidden.dtype),
        "sequence_parallel": head.sequence_parallel,
        "scale": float(head.scale),
        "softcap": None if head.softcap is None else float(head.softcap),
        "chunk_bytes": head.chunk_bytes,
        "weighting": config.weighting,
        "normalization": config.normalization,
    }


def _check_own(hidden: Tensor, weight: Tensor, head: HeadConfig, group: dist.ProcessGroup | None) -> None:
    check_dtype("hidden", hidden, STUDENT_DTYPES)
    check_dtype("weight", weight, STUDENT_DTYPES)
    if hidden.dim() < (2 if head.sequence_parallel else 1):
        shape = "[sequence / ranks, ..., hidden size]" if head.sequence_parallel else "[..., hidden size]"
        raise expected("hidden", f"shape {shape}", list(hidden.shape))
    check_weight_shape("weight", weight, hidden.shape[-1])
    if weight.device != hidden.device:
        raise expected("weight", f"device {hidden.device} of hidden", weight.device)
    if head.sequence_parallel and group is None:
        raise expected("sequence_parallel", "a group to gather the hidden states over", "none")
    if head.found_uneven is not None and head.found_uneven.device != hidden.device:
        raise expected("found_uneven", f"device {hidden.device} of hidden", head.found_uneven.device)


class ChunkedCall(NamedTuple):
    """Everything but tensors that autograd follows.

    weigh(measured, rows, mask): weight and relative validity of these tokens, not normalised; of all tokens, and final,
        for rows None.
    """

    head: HeadConfig
    config: LossConfig
    settings: PassSettings
    group: dist.ProcessGroup | None
    form: TeacherBlocks
    chunk: int  # tokens of the largest chunk
    weigh: Weigh
    in_forward: bool  # whether forward makes gradients; it divides by the normalization at the end


class LayerProducts:
    """The products with the output layer's true rows, in float32, or in 16 bits with float32 sums where a GPU can."""

    def __init__(self, states: Tensor, weight: Tensor, call: ChunkedCall, chunk: int) -> None:
        columns = call.settings.columns
        self.factor = factor_of(weight, states.dtype)[:columns]
        self.narrow = self.factor.dtype != torch.float32
        self._scale, self._softcap = call.head.scale, call.head.softcap
        # One buffer for all chunks: fresh pages would cost more than what is written to them.
        self._buffer = states.new_empty((chunk, columns), dtype=torch.float32)
        self.teacher_memory = None  # for the teacher's logits, where they are made here
        if not isinstance(call.form, DenseBlocks):
            self.teacher_memory = states.new_empty(chunk * padded_columns(columns), dtype=torch.float32)

    def states(self, states: Tensor) -> Tensor:
        return states if self.narrow else states.float()

    def logits(self, states: Tensor) -> Tensor:
        """float32 [tokens, columns], valid until the next call."""
        out = self._buffer[: len(states)]
        if self.narrow:
            torch.mm(states, self.factor.t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(states, self.factor.t(), out=out)
        if self._scale != 1:
            out.mul_(self._scale)
        if self._softcap is not None:
            out.div_(self._softcap).tanh_().mul_(self._softcap)
        return out

    def states_gradient(self, gradient: Tensor) -> Tensor:
        """float32 [tokens, hidden size] of a gradient as `cast` gives it."""
        if self.narrow:
            return torch.mm(gradient, self.factor, out_dtype=torch.float32)
        return torch.mm(gradient, self.factor)

    def add_weight_gradient(self, total: Tensor, gradient: Tensor, states: Tensor) -> None:
        """Adds this chunk's to `total`, float32 [columns, hidden size]."""
        if self.narrow:
            torch.addmm(total, gradient.t(), states, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(gradient.t(), states)

    def cast(self, gradient: Tensor) -> Tensor:
        return gradient.to(self.factor.dtype)


class _Found:
    """What the chunks find, collected for all tokens: tokens of no chunk hold zeros."""

    def __init__(self, rows: int, like: Tensor, call: ChunkedCall, mask: Tensor | None) -> None:
        self._floats = like.new_zeros((len(ops.STATISTICS), rows), dtype=torch.float32)
        self._actions = like.new_zeros((2, rows), dtype=torch.int64)
        self._skipped = like.new_zeros(rows, dtype=torch.bool)
        self._skips = call.config.skip_invalid_teacher
        self.label_validity = None  # where the teacher's form has one
        if isinstance(call.form, TopKBlocks):
            self.label_validity = torch.zeros_like(self._floats[0])
        self.keep = None  # uint8, which tokens count; None for all
        if mask is not None or self._skips:
            self.keep = torch.zeros_like(self._actions[0], dtype=torch.uint8)

    def put(self, chunk: Rows, measured: Measured, counted: Tensor | None) -> None:
        stats, floats = measured.stats, len(ops.STATISTICS)
        self._floats[:, chunk] = torch.stack(stats[:floats])
        self._actions[:, chunk] = torch.stack(stats[floats : floats + 2])
        if self._skips:
            self._skipped[chunk] = stats.skipped
        if self.label_validity is not None:
            self.label_validity[chunk] = measured.label_validity
        if self.keep is not None:
            self.keep[chunk] = 1 if counted is None else counted

    def stats(self) -> DivergenceStats:
        return DivergenceStats(*self._floats.unbind(0), *self._actions.unbind(0), self._skipped)


class FusedLoss(torch.autograd.Function):
    """hidden [tokens, size] and weight [width, size] -> loss, weight, rho and the fields of DivergenceStats, [tokens].

    Loss, divergence and cross-entropy may be differentiated. `expected` [tokens] or None for ones: what the loss's
    upstream gradient is likely to be a multiple of.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, mask, expected, call, *teacher):
        rows = hidden.shape[0]
        chunks, chunk_mask = chunks_of(mask, rows, call.chunk)
        layer = LayerProducts(hidden, weight, call, _largest(chunks))
        need_hidden, need_weight = (call.in_forward and need for need in ctx.needs_input_grad[:2])
        hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        found = _Found(rows, hidden, call, mask)
        weights = hidden.new_zeros((2, rows), dtype=torch.float32)
        ctx.kept = []
        for chunk in chunks:
            states = layer.states(hidden[chunk])
            logits = layer.logits(states)
            label, counted = part_of(labels, chunk), part_of(chunk_mask, chunk)
            blocks = call.form.part(teacher, chunk)
            blocks, restate = call.form.prepare(blocks, logits, counted, call.group)
            dense = call.form.logits(blocks, logits, 0, len(logits), layer.teacher_memory)
            fields, (constants, sums, _, counted) = statistics_pass(
                logits, label, counted, call.settings, DenseBlocks(), call.group, dense, restate
            )
            prepared = blocks if isinstance(call.form, TopKBlocks) else None
            measured = (label, counted, constants, sums)
            ctx.kept.append((chunk, measured, prepared))
            measurement = measured_of(fields)
            found.put(chunk, measurement, counted)
            if not call.in_forward:
                continue
            weights[:, chunk] = torch.stack(call.weigh(measurement, chunk, counted))
            if not (need_hidden or need_weight):
                continue
            upstream = (weights[0, chunk], torch.full_like(fields[0], call.config.ce_weight))
            gradient = _gradient(call, layer, logits, dense, measured, upstream)
            if need_hidden:
                hidden_gradient[chunk] = layer.states_gradient(gradient)
            if need_weight:
                expected_here = part_of(expected, chunk)
                if expected_here is not None:
                    states = (states * expected_here[:, None]).to(states.dtype)
                layer.add_weight_gradient(weight_gradient[: call.settings.columns], gradient, states)
        stats = found.stats()
        ctx.divisor = None
        if not call.in_forward:
            weights = torch.stack(call.weigh(Measured(stats, found.label_validity), None, found.keep))
        elif call.config.normalization != "none":
            keep = None if found.keep is None else found.keep != 0
            ctx.divisor = weight_divisor(weights[0], stats.divergence, keep, call.config)
            weights[0] /= ctx.divisor
        loss = weighted(weights[0], stats.divergence)
        if call.config.ce_weight != 0:
            loss = loss + call.config.ce_weight * stats.cross_entropy
        ctx.save_for_backward(hidden, weight, mask, expected, weights, *teacher)
        ctx.parameter, ctx.call = weight, call
        ctx.hidden_gradient, ctx.weight_gradient = hidden_gradient, weight_gradient
        ctx.set_materialize_grads(False)
        out = (loss, *weights.unbind(0), *stats)
        ctx.mark_non_differentiable(*out[1:3], *out[5:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss, _weight, _rho, of_divergence, of_cross_entropy, *_):
        hidden, weight, mask, expected, weights, *teacher = ctx.saved_tensors
        call: ChunkedCall = ctx.call
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        unused = [None] * (len(ctx.needs_input_grad) - 2)
        hidden_gradient = weight_gradient = None
        if call.in_forward and of_divergence is None and of_cross_entropy is None:
            # where, not a product: a row that is not counted may bring anything.
            of_loss = of_loss if mask is None else torch.where(mask != 0, of_loss, 0.0)
            factor = of_loss if ctx.divisor is None else of_loss / ctx.divisor
            if need_hidden:
                hidden_gradient = ctx.hidden_gradient * factor[:, None]
            made, ctx.weight_gradient = ctx.weight_gradient, None  # a second backward makes its own
            if made is not None:
                multiple, uneven = common_multiple(of_loss, expected, mask)
                if call.head.found_uneven is not None:
                    call.head.found_uneven.add_(uneven)
                if call.head.upstream == "even" or not uneven:  # only the latter waits for the device
                    multiple = torch.where(uneven, torch.nan, multiple)
                    weight_gradient = made.mul_(multiple if ctx.divisor is None else multiple / ctx.divisor)
        missing = (need_hidden and hidden_gradient is None, need_weight and weight_gradient is None)
        into = main_grad_of(ctx.parameter) if need_weight and call.head.accumulate_main_grad else None
        if any(missing):
            total = _upstream(call.config.ce_weight, weights[0], of_loss, of_divergence, of_cross_entropy)
            straight = into is not None and into.dtype == torch.float32
            if missing[0]:
                hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32)
            if missing[1]:
                weight_gradient = into if straight else torch.zeros_like(weight, dtype=torch.float32)
            _again(ctx, hidden, weight, teacher, total, missing, hidden_gradient, weight_gradient)
        if need_hidden:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        if need_weight and into is not None:
            if weight_gradient is not into:
                into.add_(weight_gradient)
            weight_gradient = announced(ctx.parameter)
        elif need_weight:
            weight_gradient = weight_gradient.to(weight.dtype)
        return hidden_gradient, weight_gradient, *unused


def _again(ctx, hidden, weight, teacher, upstream, wanted, hidden_gradient, weight_gradient) -> None:
    """Adds the wanted gradients for this upstream gradient of (divergence, cross-entropy), from new logits."""
    call: ChunkedCall = ctx.call
    layer = LayerProducts(hidden, weight, call, _largest([chunk for chunk, *_ in ctx.kept]))
    for chunk, measured, blocks in ctx.kept:
        states = layer.states(hidden[chunk])
        logits = layer.logits(states)
        blocks = call.form.part(teacher, chunk) if blocks is None else blocks
        dense = call.form.logits(blocks, logits, 0, len(logits), layer.teacher_memory)
        here = tuple(part_of(tensor, chunk) for tensor in upstream)
        gradient = _gradient(call, layer, logits, dense, measured, here)
        if wanted[0]:
            hidden_gradient[chunk] = layer.states_gradient(gradient)
        if wanted[1]:
            layer.add_weight_gradient(weight_gradient[: call.settings.columns], gradient, states)


def _gradient(call, layer, logits, dense, measured, upstream) -> Tensor:
    """The logits overwritten with the gradient of what the output layer's product gave, as products take it."""
    scale, softcap = call.head.scale, call.head.softcap
    upstream = tuple(None if u is None else (scale * u).float().contiguous() for u in upstream)
    bend = None if softcap is None else (logits / softcap).square_()  # 1 - tanh' at these logits
    ops.gradient_(logits, *dense, *measured, *upstream, *kernel_arguments(call.settings))
    if bend is not None:
        # A masked row's logits may be NaN, and its gradient is 0.
        logits.addcmul_(logits, bend.nan_to_num_(nan=0.0), value=-1)
    return layer.cast(logits)


def _upstream(ce_weight, weight, of_loss, of_divergence, of_cross_entropy) -> tuple[Tensor | None, ...]:
    """Of divergence and cross-entropy, where the loss that is made of them brings one as well."""
    if of_loss is None:
        return of_divergence, of_cross_entropy
    divergence = of_loss * weight if of_divergence is None else of_loss * weight + of_divergence
    if ce_weight == 0:
        return divergence, of_cross_entropy
    cross_entropy = of_loss * ce_weight
    return divergence, cross_entropy if of_cross_entropy is None else cross_entropy + of_cross_entropy


def common_multiple(upstream: Tensor, expected: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The number by which `upstream` is a multiple of `expected` at each token that counts, and whether there is none.

    Scalars on the device, for which nobody waits. A NaN or an infinity is not uneven: the number is not finite then.
    """
    ratio = upstream if expected is None else upstream / expected
    if ratio.numel() == 0:
        return ratio.new_ones(()), ratio.new_zeros((), dtype=torch.bool)
    if mask is None:
        low, high = ratio.aminmax()
    else:
        counted = mask != 0
        low = torch.where(counted, ratio, torch.inf).amin()
        high = torch.where(counted, ratio, -torch.inf).amax()
        nothing = ~counted.any()
        low, high = torch.where(nothing, 1.0, low), torch.where(nothing, 1.0, high)
    uneven = high - low > _ROUNDING * torch.maximum(low.abs(), high.abs())
    return low / 2 + high / 2, uneven & low.isfinite() & high.isfinite()


def chunks_of(mask: Tensor | None, rows: int, size: int) -> tuple[list[Rows], Tensor | None]:
    """The tokens of each chunk, and the mask that is still needed within them.

    On CPU tokens that do not count are left out, and no mask is needed. Elsewhere to know them would stall the device.
    """
    if mask is not None and mask.device.type == "cpu":
        counted = mask.nonzero().squeeze(1)
        rows, mask = len(counted), None
    else:
        counted = None
    pieces = -(-rows // size)
    edges = [rows * piece // pieces for piece in range(pieces + 1)] if pieces else []
    spans = zip(edges, edges[1:], strict=False)
    if counted is None:
        return [slice(first, last) for first, last in spans], mask
    return [_adjacent(counted[first:last]) for first, last in spans], None


def _adjacent(index: Tensor) -> Rows:
    first, last = int(index[0]), int(index[-1]) + 1
    return slice(first, last) if last - first == len(index) else index


def _largest(chunks: list[Rows]) -> int:
    return max((c.stop - c.start if isinstance(c, slice) else len(c) for c in chunks), default=0)


def part_of(tensor: Tensor | None, chunk: Rows) -> Tensor | None:
    return None if tensor is None else tensor[chunk]


def main_grad_of(parameter: Tensor) -> Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        raise expected("weight", "a main_grad to accumulate into", "a weight without one")
    return main_grad


def announced(parameter: Tensor) -> Tensor | None:
    """What backward returns where main_grad has the gradient already, as Megatron's hooks want it.

    A weight with `grad_added_to_main_grad` has hooks that wait for a gradient: they get one of its shape, read only
    where `zero_out_wgrad` says that something else, a tied embedding, adds to it.
    """
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    return (
        torch.zeros_like(parameter)
        if getattr(parameter, "zero_out_wgrad", False)
        else torch.empty_like(parameter)
    )
