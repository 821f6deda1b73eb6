"""The one autograd function: vocabulary-parallel statistics, divergence and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss import ops
from vcrd.loss.checks import VocabShard, refuse, settle_shard, teacher_form
from vcrd.loss.config import DIVERGENCES, IF_UNUSED, LossConfig, loss_config
from vcrd.loss.overwriting import holders, holders_of_a_lone_loss, shares_memory
from vcrd.loss.teacher_blocks import (
    BLOCK_BYTES,
    NO_CODE,
    DenseBlocks,
    Restate,
    TeacherBlocks,
    as_rows,
    blocks_of,
    gather_shards,
    joined,
    rows_of,
)
from vcrd.teacher_logits import DenseLogits, TeacherLogits, TopKLogits

_STUDENT_ENTROPY, _TEACHER_ENTROPY = map(ops.STATISTICS.index, ("student_entropy", "teacher_entropy"))
_TEACHER_MAX = ops.PARTIAL_COLUMNS["teacher_max"]


class DivergenceStats(NamedTuple):
    """Per-token statistics, each [...], float32 (actions int64, skipped bool), equal on every rank of the group.

    Only `divergence` and `cross_entropy` carry a gradient. Logarithms are natural: nats. Everything but `divergence` is
    read at temperature 1. An action is the model's most probable next token. Rows whose mask is 0 hold zeros; without a
    label (or with a negative one) `cross_entropy` and both label log-probabilities are 0. Of equal logits the action is
    the one with the lowest id.

    With `TopKLogits` they still describe the teacher. `teacher_action` is its most probable token, and -1
    where no token is known; a log-probability of a token that is not known is an upper bound, and `teacher_entropy` a
    lower one.

    Attributes:
        divergence: of the student from the teacher.
        cross_entropy: of the student and the label.
        student_label_logprob, teacher_label_logprob: log-probability of the label by each model.
        student_logprob_of_student_action, student_logprob_of_teacher_action: log-probability of each action by the
            student.
        teacher_logprob_of_student_action, teacher_logprob_of_teacher_action: the same by the teacher.
        student_entropy, teacher_entropy: of each distribution.
        student_action, teacher_action: ids of the whole vocabulary.
        skipped: True in the rows that `skip_invalid_teacher` has skipped; all other fields are 0 there.
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
    skipped: Tensor

    def skipping(self, rows: Tensor) -> DivergenceStats:
        """With these rows skipped too, bool [...]: they have no gradient either."""
        *fields, skipped = self
        return DivergenceStats(*(torch.where(rows, 0, field) for field in fields), skipped | rows)


# Divergences and statistics go by their numbers between Python and the extension.
if (ops.DIVERGENCES, ops.STATISTICS) != (DIVERGENCES, DivergenceStats._fields[: len(ops.STATISTICS)]):
    raise ImportError(
        f"vcrd._C: expected the divergences {DIVERGENCES} and the statistics {DivergenceStats._fields}, got "
        f"{ops.DIVERGENCES} and {ops.STATISTICS}: build the extension again"
    )


class PassSettings(NamedTuple):
    """What the passes over the logits need besides tensors."""

    divergence: str
    temperature: float
    has_mixture: bool
    mixture_weight: float  # the teacher's weight in the mixture; 0 where there is no mixture
    columns: int
    first_column: int
    skip_invalid_teacher: bool

    @property
    def code(self) -> int:
        return DIVERGENCES.index(self.divergence)


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherLogits,
    labels: Tensor | None = None,
    *,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    _block_bytes: int = BLOCK_BYTES,
    **options: Any,
) -> DivergenceStats:
    """Divergence of the student from the teacher at each token, and what validity estimators need, in one pass.

    With p = softmax(teacher logits / T) and q = softmax(student logits / T), without the factor T^2. Formulas:
    `LossConfig`.

    A logit of -inf gives no probability, nor does one whose probability no float64 holds (below e^-745); a logit more
    than 1e30 below the largest of its row may count as -inf. KL(p||q) is inf where p has probability and q has none,
    KL(q||p) where q has and p has none. The gradient of an infinite KL(p||q) is (q - p) / T, as that of a finite one.
    An infinite KL(q||p) has no gradient: that of reverse_kl, and of the whole of jeffreys, is then 0 in that row. The
    mixtures are always finite. A row of -inf alone is no distribution: its results are NaN.

    Args:
        student_logits: [..., vocabulary shard], float32, bfloat16 or float16. Each rank of `group` holds its own
            contiguous shard, in rank order. The last dimension should be adjacent in memory; otherwise it is copied.
        teacher_logits: one form of `TeacherLogits`, or a tensor, which means `DenseLogits`. Of the other forms
            float32 logits are made in blocks of less than 32 MiB, anew for each pass. Never receives a
            gradient.
        labels: [...], integers, ids of the whole vocabulary; negative for none.
        config: see `LossConfig`, of which `divergence`, `temperature`, `alpha`, `beta`, `vocab_size`,
            `skip_invalid_teacher` and `inplace_gradient` are read here. Default: `LossConfig()`.
        mask: [...], any dtype. Rows where it is 0 are not read; their loss and gradient are 0 even where they hold NaN.
        group: the tensor-parallel group; None means one shard.
        options: fields of `LossConfig`, which count before those of `config`.

    Accumulates in float32. Inputs are never modified, unless `inplace_gradient` says so.

    Collectives: forward one all-gather of 19 floats per token; `jsd` and the skewed ones one all-reduce of 2 floats per
    token more; `TopKLogits` one all-gather of 3 floats per token before these, `MixedLogits` one of 2 floats per token
    and teacher; backward none. With one rank, none.

    Under torch.compile a dense teacher is traced without a graph break; the other forms break the graph.

    Raises TypeError or ValueError, on every rank and before any collective, that names the argument. A label at or past
    `vocab_size`, or an id of the teacher's outside the vocabulary, is a ValueError on CPU; on other devices, where
    reading it would stall, that token's loss is NaN.
    """
    try:
        config = loss_config(config, options)
    except (TypeError, ValueError) as error:
        refuse(group, error)
        raise
    return measure(student_logits, teacher_logits, labels, mask, config, group, _block_bytes).stats


class Measured(NamedTuple):
    """The statistics, and what the loss alone needs besides."""

    stats: DivergenceStats
    # log V of the teacher for validity "label", where that is not its log-probability of the label: see `TopKLogits`.
    label_validity: Tensor | None


def measured_of(fields: Sequence[Tensor]) -> Measured:
    """From the fields of DivergenceStats in their order, and the label validity where there is one."""
    count = len(DivergenceStats._fields)
    return Measured(DivergenceStats(*fields[:count]), fields[count] if len(fields) > count else None)


def measure(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherLogits,
    labels: Tensor | None,
    mask: Tensor | None,
    config: LossConfig,
    group: dist.ProcessGroup | None,
    block_bytes: int = BLOCK_BYTES,
) -> Measured:
    """What `vocab_parallel_divergence` gives, and the label validity."""
    call = settle(student_logits, teacher_logits, labels, mask, config, group)
    leading, rows = student_logits.shape[:-1], student_logits.shape[:-1].numel()
    fields_of = _fields if isinstance(call.teacher, DenseLogits) else _untraced_fields
    inplace_gradient = False if torch.compiler.is_compiling() else config.inplace_gradient
    fields = fields_of(call, as_rows(student_logits, rows), inplace_gradient, block_bytes)
    return measured_of([field.view(leading) for field in fields])


class SettledCall(NamedTuple):
    """The arguments of one call, checked and agreed on, as the passes take them; rows are tokens."""

    teacher: TeacherLogits
    shard: VocabShard
    settings: PassSettings
    group: dist.ProcessGroup | None  # None for one rank
    labels: Tensor | None  # [rows] int64
    mask: Tensor | None  # [rows] uint8


def settle(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherLogits,
    labels: Tensor | None,
    mask: Tensor | None,
    config: LossConfig,
    group: dist.ProcessGroup | None,
) -> SettledCall:
    """Checks the arguments of `vocab_parallel_divergence`; of the student's logits shape, dtype and device are read."""
    try:
        teacher = teacher_form(teacher_logits)
    except TypeError as error:
        refuse(group, error)
        raise
    shard = settle_shard(student_logits, teacher, labels, mask, config, group)
    rows = student_logits.shape[:-1].numel()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(rows).contiguous().view(torch.uint8)
    if labels is not None:
        labels = labels.to(torch.int64).reshape(rows).contiguous()
        _check_ids("labels", labels, mask, None, shard.vocab_size)
    if isinstance(teacher, TopKLogits) and teacher.ids.device.type == "cpu":
        ids = teacher.ids.to(torch.int64).masked_fill(teacher.logprobs == -torch.inf, 0)
        _check_ids("teacher_logits.ids", ids.reshape(rows, teacher.ids.shape[-1]), mask, 0, shard.vocab_size)
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    return SettledCall(teacher, shard, pass_settings(config, shard), group, labels, mask)


def pass_settings(config: LossConfig, shard: VocabShard) -> PassSettings:
    """Where alpha is 0 a skewed divergence is the one that it skews."""
    divergence, weight = config.divergence, config.mixture_weight
    if config.alpha == 0 and divergence.startswith("skew"):
        divergence, weight = ("forward_kl" if divergence == "skew_kl" else "reverse_kl"), None
    return PassSettings(
        divergence=divergence,
        temperature=float(config.temperature),
        has_mixture=weight is not None,
        mixture_weight=float(weight or 0),
        columns=shard.columns,
        first_column=shard.first_column,
        skip_invalid_teacher=config.skip_invalid_teacher,
    )


def _check_ids(name: str, ids: Tensor, mask: Tensor | None, lowest: int | None, vocab_size: int) -> None:
    """Refuses ids [rows, ...] at or past `vocab_size`, or below `lowest`, in rows that are read."""
    # Reading values would stall other devices' queues and break a graph under compilation.
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = ids >= vocab_size
    if lowest is not None:
        outside |= ids < lowest
    if mask is not None:
        outside[mask == 0] = False
    if outside.any():
        span = f"below vocab_size {vocab_size}" if lowest is None else f"from {lowest} to {vocab_size - 1}"
        raise expected(name, f"ids {span}", int(ids[outside][0]))


def _fields(
    call: SettledCall, student: Tensor, inplace_gradient: bool | str, block_bytes: int
) -> tuple[Tensor, ...]:
    form, tensors = blocks_of(call.teacher, student.shape[0], call.shard, block_bytes, call.group)
    return _VocabParallelDivergence.apply(
        student, call.labels, call.mask, call.settings, form, call.group, inplace_gradient, *tensors
    )


# A traced loop over blocks would be unrolled, and their memory the compiler's to plan.
_untraced_fields = torch.compiler.disable(_fields)


def statistics_pass(
    student: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    settings: PassSettings,
    form: TeacherBlocks,
    group: dist.ProcessGroup | None,
    teacher: tuple[Tensor | None, ...],
    restate: Restate | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor | None, tuple[Tensor | None, ...], Tensor | None]]:
    """Rows in; the fields of `measured_of`, each [rows], and what the gradient needs: constants, sums, teacher, mask.

    restate: where the teacher was made dense already, what its form's `prepare` gave.

    Reads the teacher block by block of rows; a dense one is one block. What the blocks hold is joined before ranks
    meet, so that ranks may cut their rows differently and the number of collectives is that of one block.
    """
    temperature, code = settings.temperature, settings.code
    columns, first_column = settings.columns, settings.first_column
    spans = form.spans(student.shape[0])
    teacher, own = form.prepare(teacher, student, mask, group)
    restate = own if restate is None else restate
    partials = []
    for first, last in spans:
        rows, here, counted = rows_of(first, last, student, labels, mask)
        logits, shift = form.logits(teacher, rows, first, last)
        partials.append(
            ops.row_statistics(rows, logits, shift, here, counted, temperature, columns, first_column, code)
        )
    partials = gather_shards(joined(partials), group)
    statistics, actions, constants = ops.merge_statistics(partials, labels, mask, temperature, code)
    if restate is not None:
        statistics = restate(statistics, actions, constants, labels, mask)
    if settings.skip_invalid_teacher:
        coded = isinstance(form, DenseBlocks) and teacher[0].dtype == torch.uint8 and teacher[1] is None
        skipped, mask = _skip_invalid_rows(partials, statistics, actions, mask, coded)
    else:
        skipped = statistics.new_zeros(student.shape[0], dtype=torch.bool)
    divergence, *rest = statistics.unbind(0)
    sums = None
    if settings.has_mixture:
        sums = []
        for first, last in spans:
            rows, counted, known = rows_of(first, last, student, mask, constants)
            logits, shift = form.logits(teacher, rows, first, last)
            sums.append(
                ops.mixture_sums(
                    rows, logits, shift, counted, known, temperature, columns, code, settings.mixture_weight
                )
            )
        sums = joined(sums)
        if group is not None and sums.shape[0]:
            dist.all_reduce(sums, group=group)
        divergence = sums[:, 0].clamp(min=0)  # rounding may leave a hair below
    others = len(ops.STATISTICS) - 1
    fields = (divergence, *rest[:others], *actions.unbind(0), skipped, *rest[others:])
    return fields, (constants, sums, teacher, mask)


def _skip_invalid_rows(
    partials: Tensor, statistics: Tensor, actions: Tensor, mask: Tensor | None, coded: bool
) -> tuple[Tensor, Tensor]:
    """The rows whose teacher is no distribution, bool [rows], and the mask without them, uint8 [rows].

    Their statistics become 0. No collective, no synchronisation.

    partials: [shards, rows, n]; statistics [10, rows] and actions [2, rows], changed in place: as merged, equal on all
        ranks. coded: whether the teacher is 8-bit codes relative to one maximum per row.
    """
    bad = statistics[_TEACHER_ENTROPY].isnan()
    if coded and partials.shape[1]:
        bad = bad | (partials[..., _TEACHER_MAX].amax(0) < NO_CODE)
    bad = bad & ~statistics[_STUDENT_ENTROPY].isnan()
    if mask is not None:
        bad = bad & (mask != 0)
    statistics.masked_fill_(bad, 0.0)
    actions.masked_fill_(bad, 0)
    keep = ~bad if mask is None else (mask != 0) & ~bad
    return bad, keep.view(torch.uint8)


def kernel_arguments(settings: PassSettings) -> tuple[float, int, int, int, float]:
    """The last arguments of `ops.gradient`."""
    code = settings.code
    return settings.temperature, settings.columns, settings.first_column, code, settings.mixture_weight


class _VocabParallelDivergence(torch.autograd.Function):
    """Rows in, the fields of `measured_of` out, each [rows]."""

    @staticmethod
    def forward(ctx, student, labels, mask, settings, form, group, inplace_gradient, *teacher):
        fields, (constants, sums, teacher, mask) = statistics_pass(
            student, labels, mask, settings, form, group, teacher
        )
        ctx.save_for_backward(student, labels, mask, constants, sums, *teacher)
        ctx.settings, ctx.form, ctx.inplace_gradient, ctx.overwritten = (
            settings,
            form,
            inplace_gradient,
            False,
        )
        ctx.lone = frozenset()
        if inplace_gradient == IF_UNUSED and ctx.needs_input_grad[0]:
            ctx.lone = holders_of_a_lone_loss()  # measured here, where no backward is under way
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*fields[2:])
        return fields

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, divergence_gradient, cross_entropy_gradient, *_):
        if ctx.overwritten:
            raise RuntimeError(
                "inplace_gradient: expected one backward, got a second; the first overwrote the student's logits"
            )
        student, labels, mask, constants, sums, *teacher = ctx.saved_tensors
        form = ctx.form
        upstream = (
            None if g is None else g.contiguous() for g in (divergence_gradient, cross_entropy_gradient)
        )
        rowwise = (labels, mask, constants, sums, *upstream)
        settings = kernel_arguments(ctx.settings)
        unused = [None] * (6 + len(teacher))
        spans = form.spans(student.shape[0])
        overwrite = bool(ctx.inplace_gradient) and not shares_memory(student, teacher)
        if overwrite and ctx.inplace_gradient == IF_UNUSED:
            overwrite = bool(ctx.lone) and holders(student) in ctx.lone
        if overwrite:
            ctx.overwritten = True
            torch.autograd.graph.increment_version(student)
        if len(spans) == 1 and not overwrite:
            logits = form.logits(teacher, student, *spans[0])
            return ops.gradient(student, *logits, *rowwise, *settings), *unused
        # Each block of logits is read before it becomes a gradient, and no other block reads it.
        gradient = student.detach() if overwrite else student.clone()
        for first, last in spans:
            rows, *read = rows_of(first, last, gradient, *rowwise)
            ops.gradient_(rows, *form.logits(teacher, rows, first, last), *read, *settings)
        return gradient, *unused
