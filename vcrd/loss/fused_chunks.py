"""The output layer and the loss by chunks of tokens: the autograd function of `fused_head`, and its products.

A chunk's logits are made, measured, turned into their own gradient and multiplied back while they are in memory: three
products, as many as with all logits stored. That needs each token's upstream gradient before backward has brought it.
The gradient of the hidden states is linear in it, token by token, and so can wait for it as a factor. That of the
weight is a sum over tokens: it is made for the upstream gradient that a masked sum or mean over tokens has, and is
right up to one factor where backward brings that. Where it brings another one, it is made again from new logits; to
see which it is waits for the device, unless the caller has promised it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss import ops
from vcrd.loss.divergence import DivergenceStats, Measured, Plan, measured_of, statistics_pass
from vcrd.loss.teacher_blocks import DenseBlocks, HiddenBlocks, TeacherBlocks, TopKBlocks, padded_columns
from vcrd.loss.validity import mean_weight, weighted
from vcrd.teacher_logits import HiddenStates

Rows = slice | Tensor  # of all tokens: from .. to, or their indices
Weigh = Callable[[Measured, "Rows | None", "Tensor | None"], tuple[Tensor, Tensor]]
# By which upstream gradients may differ from a common multiple of those expected: rounding, and nothing more.
_ROUNDING = 4e-7


class Task(NamedTuple):
    """Everything but tensors that autograd follows.

    weigh(measured, rows, mask): weight and relative validity of these tokens, not normalised; of all tokens, and final,
        for rows None.
    """

    plan: Plan
    group: dist.ProcessGroup | None
    form: TeacherBlocks
    scale: float
    softcap: float | None
    ce_weight: float
    chunk: int  # tokens of the largest chunk
    weigh: Weigh
    in_forward: bool  # whether forward makes gradients
    with_mean: bool  # whether in_forward leaves the division by the mean weight to the end
    mean_group: dist.ProcessGroup | None
    main_grad: bool
    even_upstream: (
        bool  # whether the loss's upstream gradient was promised to be a multiple of what is expected
    )
    found_uneven: Tensor | None  # where backward counts that it was not

    @property
    def settings(self) -> tuple[float, int, int, int, float]:
        plan = self.plan
        return plan.temperature, plan.columns, plan.first_column, plan.code, plan.mixture_weight


class OutputLayer:
    """The products with the output layer's true rows, in float32, or in 16 bits with float32 sums where a GPU can."""

    def __init__(self, states: Tensor, weight: Tensor, task: Task, chunk: int) -> None:
        columns = task.plan.columns
        self.factor = HiddenStates(states, weight).factor[:columns]
        self.narrow = self.factor.dtype != torch.float32
        # One buffer for all chunks: fresh pages would cost more than what is written to them.
        self._buffer = states.new_empty((chunk, columns), dtype=torch.float32)
        self.teacher_memory = None  # for the teacher's logits, where they are made here
        if not isinstance(task.form, DenseBlocks):
            self.teacher_memory = states.new_empty(chunk * padded_columns(columns), dtype=torch.float32)

    def states(self, states: Tensor) -> Tensor:
        return states if self.narrow else states.float()

    def logits(self, states: Tensor, scale: float, softcap: float | None) -> Tensor:
        """float32 [tokens, columns], valid until the next call."""
        out = self._buffer[: len(states)]
        if self.narrow:
            torch.mm(states, self.factor.t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(states, self.factor.t(), out=out)
        if scale != 1:
            out.mul_(scale)
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)
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


class FusedHead(torch.autograd.Function):
    """hidden [tokens, size] and weight [width, size] -> loss, weight, rho and the fields of DivergenceStats, [tokens].

    Loss, divergence and cross-entropy may be differentiated. `expected` [tokens] or None for ones: what the loss's
    upstream gradient is likely to be a multiple of.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, mask, expected, task, *teacher):
        rows = hidden.shape[0]
        chunks, chunk_mask = chunks_of(mask, rows, task.chunk)
        layer = OutputLayer(hidden, weight, task, _largest(chunks))
        need_hidden, need_weight = (task.in_forward and need for need in ctx.needs_input_grad[:2])
        hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        floats = hidden.new_zeros((len(ops.STATISTICS), rows), dtype=torch.float32)
        actions = hidden.new_zeros((2, rows), dtype=torch.int64)
        weights = hidden.new_zeros((2, rows), dtype=torch.float32)
        label_validity = torch.zeros_like(floats[0]) if isinstance(task.form, TopKBlocks) else None
        keep = (
            None
            if mask is None and not task.plan.skip_invalid_teacher
            else torch.zeros_like(actions[0], dtype=torch.uint8)
        )
        ctx.kept = []
        for chunk in chunks:
            states = layer.states(hidden[chunk])
            logits = layer.logits(states, task.scale, task.softcap)
            label, counted = part_of(labels, chunk), part_of(chunk_mask, chunk)
            blocks = teacher_part(task.form, teacher, chunk)
            blocks, restate = task.form.prepare(blocks, logits, counted, task.group)
            dense = task.form.logits(blocks, logits, 0, len(logits), layer.teacher_memory)
            fields, (constants, sums, _, counted) = statistics_pass(
                logits, label, counted, task.plan, DenseBlocks(), task.group, dense, restate
            )
            prepared = blocks if isinstance(task.form, TopKBlocks) else None
            measured = (label, counted, constants, sums)
            ctx.kept.append((chunk, measured, prepared))
            if keep is not None:
                keep[chunk] = 1 if counted is None else counted
            floats[:, chunk] = torch.stack(fields[: len(ops.STATISTICS)])
            actions[:, chunk] = torch.stack(fields[len(ops.STATISTICS) : len(ops.STATISTICS) + 2])
            measurement = measured_of(fields)
            if label_validity is not None:
                label_validity[chunk] = measurement.label_validity
            if not task.in_forward:
                continue
            weights[:, chunk] = torch.stack(task.weigh(measurement, chunk, counted))
            if not (need_hidden or need_weight):
                continue
            upstream = (weights[0, chunk], torch.full_like(fields[0], task.ce_weight))
            gradient = _gradient(task, layer, logits, dense, measured, upstream)
            if need_hidden:
                hidden_gradient[chunk] = layer.states_gradient(gradient)
            if need_weight:
                expected_here = part_of(expected, chunk)
                if expected_here is not None:
                    states = (states * expected_here[:, None]).to(states.dtype)
                layer.add_weight_gradient(weight_gradient[: task.plan.columns], gradient, states)
        stats = DivergenceStats(*floats.unbind(0), *actions.unbind(0))
        ctx.mean = None
        if not task.in_forward:
            weights = torch.stack(task.weigh(Measured(stats, label_validity), None, keep))
        elif task.with_mean:
            ctx.mean = mean_weight(weights[0], keep, task.mean_group)
            weights[0] /= ctx.mean
        loss = weighted(weights[0], stats.divergence)
        if task.ce_weight != 0:
            loss = loss + task.ce_weight * stats.cross_entropy
        ctx.save_for_backward(hidden, weight, mask, expected, weights, *teacher)
        ctx.parameter, ctx.task = weight, task
        ctx.hidden_gradient, ctx.weight_gradient = hidden_gradient, weight_gradient
        ctx.set_materialize_grads(False)
        out = (loss, *weights.unbind(0), *stats)
        ctx.mark_non_differentiable(*out[1:3], *out[5:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss, _weight, _rho, of_divergence, of_cross_entropy, *_):
        hidden, weight, mask, expected, weights, *teacher = ctx.saved_tensors
        task: Task = ctx.task
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        unused = [None] * (len(ctx.needs_input_grad) - 2)
        hidden_gradient = weight_gradient = None
        if task.in_forward and of_divergence is None and of_cross_entropy is None:
            # where, not a product: a row that is not counted may bring anything.
            of_loss = of_loss if mask is None else torch.where(mask != 0, of_loss, 0.0)
            factor = of_loss if ctx.mean is None else of_loss / ctx.mean
            if need_hidden:
                hidden_gradient = ctx.hidden_gradient * factor[:, None]
            made, ctx.weight_gradient = ctx.weight_gradient, None  # a second backward makes its own
            if made is not None:
                multiple, uneven = common_multiple(of_loss, expected, mask)
                if task.found_uneven is not None:
                    task.found_uneven.add_(uneven)
                if task.even_upstream or not uneven:  # only the latter waits for the device
                    multiple = torch.where(uneven, torch.nan, multiple)
                    weight_gradient = made.mul_(multiple if ctx.mean is None else multiple / ctx.mean)
        missing = (need_hidden and hidden_gradient is None, need_weight and weight_gradient is None)
        into = main_grad_of(ctx.parameter) if need_weight and task.main_grad else None
        if any(missing):
            total = _upstream(task.ce_weight, weights[0], of_loss, of_divergence, of_cross_entropy)
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
    task: Task = ctx.task
    layer = OutputLayer(hidden, weight, task, _largest([chunk for chunk, *_ in ctx.kept]))
    for chunk, measured, blocks in ctx.kept:
        states = layer.states(hidden[chunk])
        logits = layer.logits(states, task.scale, task.softcap)
        blocks = teacher_part(task.form, teacher, chunk) if blocks is None else blocks
        dense = task.form.logits(blocks, logits, 0, len(logits), layer.teacher_memory)
        here = tuple(part_of(tensor, chunk) for tensor in upstream)
        gradient = _gradient(task, layer, logits, dense, measured, here)
        if wanted[0]:
            hidden_gradient[chunk] = layer.states_gradient(gradient)
        if wanted[1]:
            layer.add_weight_gradient(weight_gradient[: task.plan.columns], gradient, states)


def _gradient(task, layer, logits, dense, measured, upstream) -> Tensor:
    """The logits overwritten with the gradient of what the output layer's product gave, as products take it."""
    upstream = tuple(None if u is None else (task.scale * u).float().contiguous() for u in upstream)
    bend = None if task.softcap is None else (logits / task.softcap).square_()  # 1 - tanh' at these logits
    ops.gradient_(logits, *dense, *measured, *upstream, *task.settings)
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


def teacher_part(form: TeacherBlocks, teacher: tuple, chunk: Rows) -> tuple:
    """A chunk's tokens of the teacher; its output layer is for all of them."""
    if isinstance(form, HiddenBlocks):
        return teacher[0][chunk], teacher[1]
    return tuple(part_of(tensor, chunk) for tensor in teacher)


def main_grad_of(parameter: Tensor) -> Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        raise ValueError("weight: expected a main_grad to accumulate into, got a weight without one")
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
