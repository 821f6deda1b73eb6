"""The one autograd function: vocabulary-parallel statistics, divergence and gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss import ops
from vcrd.loss.agreement import refuse
from vcrd.loss.checks import DIVERGENCES, Layout, settle_layout
from vcrd.loss.invalid_rows import skip_invalid_rows
from vcrd.loss.overwriting import (
    IF_UNUSED,
    check_inplace_gradient,
    holders,
    holders_of_a_lone_loss,
    shares_memory,
)
from vcrd.loss.teacher_blocks import (
    BLOCK_BYTES,
    DenseBlocks,
    Restate,
    TeacherBlocks,
    as_rows,
    blocks_of,
    gather_shards,
    joined,
    rows_of,
)
from vcrd.teacher_logits import HiddenStates, TopKLogits


class DivergenceStats(NamedTuple):
    """Per-token statistics, each [...], float32 (actions int64), equal on every rank of the group.

    Only `divergence` and `cross_entropy` carry a gradient. Logarithms are natural: nats. Everything but `divergence` is
    read at temperature 1. An action is the model's most probable next token. Rows whose mask is 0 hold zeros; without a
    label (or with a negative one) `cross_entropy` and both label log-probabilities are 0. Of equal logits the action is
    the one with the lowest id.

    With `TopKLogits` they are facts of the teacher all the same. `teacher_action` is its most probable token, and -1
    where no token is known; a log-probability of a token that is not known is an upper bound, and `teacher_entropy` a
    lower one.
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


# Divergences and statistics go by their numbers between Python and the extension.
if (ops.DIVERGENCES, ops.STATISTICS) != (DIVERGENCES, DivergenceStats._fields[: len(ops.STATISTICS)]):
    raise ImportError(
        f"vcrd._C: expected the divergences {DIVERGENCES} and the statistics {DivergenceStats._fields}, got "
        f"{ops.DIVERGENCES} and {ops.STATISTICS}: build the extension again"
    )


class Plan(NamedTuple):
    """Everything but tensors that the passes need."""

    divergence: str
    temperature: float
    mixture_weight: float  # weight of the teacher in the mixture, for the divergences that have one
    columns: int
    first_column: int
    skip_invalid_teacher: bool

    @property
    def code(self) -> int:
        return DIVERGENCES.index(self.divergence)

    @property
    def has_mixture(self) -> bool:
        return self.divergence in ("jsd", "skew_kl", "skew_reverse_kl")


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKLogits | HiddenStates,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.1,
    beta: float = 0.5,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    inplace_gradient: bool | str = False,
    teacher_max: Tensor | None = None,
    skip_invalid_teacher: bool = False,
    _block_bytes: int = BLOCK_BYTES,
) -> DivergenceStats:
    """Divergence of the student from the teacher at each token, and what validity estimators need, in one pass.

    With p = softmax(teacher logits / T) and q = softmax(student logits / T), without the factor T^2:

    - forward_kl KL(p||q), reverse_kl KL(q||p), jeffreys half of each;
    - jsd: beta KL(p||m) + (1 - beta) KL(q||m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649);
    - skew_kl KL(p || alpha p + (1 - alpha) q), skew_reverse_kl KL(q || alpha q + (1 - alpha) p)
      (DistiLLM, arXiv 2402.03898).

    A logit of -inf gives no probability, nor does one whose probability no float64 holds (below e^-745); a logit more
    than 1e30 below the largest of its row may count as -inf. KL(p||q) is inf where p has probability and q has none,
    KL(q||p) where q has and p has none. The gradient of an infinite KL(p||q) is (q - p) / T, as that of a finite one.
    An infinite KL(q||p) has no gradient: that of reverse_kl, and of the whole of jeffreys, is then 0 in that row. The
    mixtures are always finite. A row of -inf alone is no distribution: its results are NaN.

    Args:
        student_logits: [..., vocabulary shard], float32, bfloat16 or float16. Each rank of `group` holds its own
            contiguous shard, in rank order. The last dimension should be adjacent in memory; otherwise it is copied.
        teacher_logits: [..., vocabulary shard], any of these dtypes, or uint8: the square-root code, which stands for
            the logit -24 (code / 255)^2 below the row's maximum and is decoded in registers. Must begin at the same
            column as the student's shard and hold its true columns; padding may differ. Or, in its place, `TopKLogits`
            or `HiddenStates`: then float32 logits are made in blocks of less than 32 MiB, anew for each pass. Never
            receives a gradient.
        labels: [...], integers, ids of the whole vocabulary; negative for none.
        vocab_size: the true vocabulary. Columns at and past it are padding: no probability, zero gradient.
            Default: all.
        mask: [...], any dtype. Rows where it is 0 are not read; their loss and gradient are 0 even where they hold NaN.
        group: the tensor-parallel group; None means one shard.
        inplace_gradient: let backward overwrite the student's logits with their gradient, which saves a buffer of their
            size. Backward then runs once. It raises autograd's version counter, as every in-place operation of torch:
            where another term or a second loss on the same logits needs them later, torch raises RuntimeError.
            "if_unused": only where nothing else holds the logits by then, that is no other node of the graph, no view
            and no Python variable; otherwise into a buffer. Always into a buffer under torch.compile, which plans its
            own, and for logits whose rows are not evenly spaced, that share memory with each other (`expand`) or with
            the teacher. On CPU, where fresh pages cost more than the arithmetic, the buffer of the last large gradient
            is kept for the next one, if the teacher is dense.
        teacher_max: [...], float32, added to a row's teacher logits: the maxima that codes, or float16 distances, were
            taken from. Only needed where these differ between the shards of a row, since a shift of the whole row
            changes nothing. For a dense teacher alone.
        skip_invalid_teacher: treat rows whose teacher is no distribution as masked: those with a NaN or +inf, with
            nothing above -inf, or, of codes without `teacher_max`, with none below 255 (how the link marks them). All
            of their statistics are 0, but for `teacher_entropy`, which is NaN; `invalid_rows` finds
            them. A row that holds a NaN of the student's is never skipped. Found in the merged statistics, so alike on
            every rank, at no cost and without waiting for the device.

    Accumulates in float32. Inputs are never modified, unless `inplace_gradient` says so.

    Collectives: forward one all-gather of 19 floats per token; `jsd` and the skewed ones one all-reduce of 2 floats per
    token more; `TopKLogits` one all-gather of 3 floats per token before these; backward none. With one rank, none.

    Under torch.compile a dense teacher is traced without a graph break; the other forms break the graph.

    Raises TypeError or ValueError, on every rank and before any collective, that names the argument. A label at or past
    `vocab_size`, or an id of the teacher's outside the vocabulary, is a ValueError on CPU; on other devices, where
    reading it would stall, that token's loss is NaN.
    """
    return measure(
        *(student_logits, teacher_logits, labels, divergence, temperature, alpha, beta, vocab_size),
        *(mask, group, inplace_gradient, teacher_max, skip_invalid_teacher, _block_bytes),
    ).stats


class Measured(NamedTuple):
    """The statistics, and what the loss alone needs besides."""

    stats: DivergenceStats
    # log V of the teacher for validity "label", where that is not its log-probability of the label: see `TopKLogits`.
    label_validity: Tensor | None


def measured_of(fields: Iterable[Tensor]) -> Measured:
    """From the fields of DivergenceStats in their order, and the label validity where there is one."""
    *stats, last = fields
    if len(stats) < len(DivergenceStats._fields):
        return Measured(DivergenceStats(*stats, last), None)
    return Measured(DivergenceStats(*stats), last)


def measure(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKLogits | HiddenStates,
    labels: Tensor | None,
    divergence: str,
    temperature: float,
    alpha: float,
    beta: float,
    vocab_size: int | None,
    mask: Tensor | None,
    group: dist.ProcessGroup | None,
    inplace_gradient: bool | str,
    teacher_max: Tensor | None,
    skip_invalid_teacher: bool,
    block_bytes: int = BLOCK_BYTES,
) -> Measured:
    """What `vocab_parallel_divergence` gives, and the label validity."""
    try:
        check_inplace_gradient(inplace_gradient)
    except ValueError as error:
        if group is not None:
            refuse(group, error)
        raise
    call = settle(
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
        skip_invalid_teacher,
    )
    leading, rows = student_logits.shape[:-1], student_logits.shape[:-1].numel()
    if torch.compiler.is_compiling():
        inplace_gradient = False
    fields_of = _fields if isinstance(teacher_logits, Tensor) else _untraced_fields
    fields = fields_of(
        as_rows(student_logits, rows),
        call.labels,
        call.mask,
        call.plan,
        call.group,
        inplace_gradient,
        (teacher_logits, call.teacher_max, rows, *call.layout, block_bytes),
    )
    return measured_of(field.view(leading) for field in fields)


class Call(NamedTuple):
    """The arguments of one call, checked and agreed on, as the passes take them; rows are tokens."""

    layout: Layout
    plan: Plan
    group: dist.ProcessGroup | None  # None for one rank
    teacher_max: Tensor | None  # [rows]
    labels: Tensor | None  # [rows] int64
    mask: Tensor | None  # [rows] uint8


def settle(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKLogits | HiddenStates,
    teacher_max: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    temperature: float,
    alpha: float,
    beta: float,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
    skip_invalid_teacher: bool,
) -> Call:
    """Checks the arguments of `vocab_parallel_divergence`; of the student's logits shape, dtype and device are read."""
    layout = settle_layout(
        *(student_logits, teacher_logits, teacher_max, labels, mask),
        *(divergence, temperature, alpha, beta, vocab_size, group),
    )
    rows = student_logits.shape[:-1].numel()
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).reshape(rows).contiguous().view(torch.uint8)
    if teacher_max is not None:
        teacher_max = teacher_max.reshape(rows).contiguous()
    if labels is not None:
        labels = labels.to(torch.int64).reshape(rows).contiguous()
        _check_ids("labels", labels, mask, None, layout.vocab_size)
    if isinstance(teacher_logits, TopKLogits) and teacher_logits.ids.device.type == "cpu":
        ids = teacher_logits.ids.to(torch.int64).masked_fill(teacher_logits.logprobs == -torch.inf, 0)
        ids = ids.reshape(rows, teacher_logits.ids.shape[-1])
        _check_ids("teacher_logits.ids", ids, mask, 0, layout.vocab_size)
    if alpha == 0 and divergence.startswith("skew"):
        divergence = "forward_kl" if divergence == "skew_kl" else "reverse_kl"
    share = {"jsd": beta, "skew_kl": alpha, "skew_reverse_kl": 1 - alpha}.get(divergence, 0.0)
    plan = Plan(
        *(divergence, float(temperature), float(share), layout.columns, layout.first_column),
        bool(skip_invalid_teacher),
    )
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    return Call(layout, plan, group, teacher_max, labels, mask)


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
        raise ValueError(f"{name}: expected ids {span}, got {int(ids[outside][0])}")


def _fields(student, labels, mask, plan, group, inplace_gradient, teacher) -> tuple[Tensor, ...]:
    form, tensors = blocks_of(*teacher)
    return _VocabParallelDivergence.apply(
        student, labels, mask, plan, form, group, inplace_gradient, *tensors
    )


# A traced loop over blocks would be unrolled, and their memory the compiler's to plan.
_untraced_fields = torch.compiler.disable(_fields)


def statistics_pass(
    student: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    plan: Plan,
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
    spans = form.spans(student.shape[0])
    teacher, own = form.prepare(teacher, student, mask, group)
    restate = own if restate is None else restate
    partials = []
    for first, last in spans:
        rows, *read = rows_of(first, last, student, labels, mask)
        partials.append(
            ops.row_statistics(
                *(rows, *form.logits(teacher, rows, first, last), *read),
                *(plan.temperature, plan.columns, plan.first_column, plan.code),
            )
        )
    partials = gather_shards(joined(partials), group)
    statistics, actions, constants = ops.merge_statistics(partials, labels, mask, plan.temperature, plan.code)
    if restate is not None:
        statistics = restate(statistics, actions, constants, labels, mask)
    if plan.skip_invalid_teacher:
        coded = isinstance(form, DenseBlocks) and teacher[0].dtype == torch.uint8 and teacher[1] is None
        mask = skip_invalid_rows(partials, statistics, actions, mask, coded)
    divergence, *rest = statistics.unbind(0)
    sums = None
    if plan.has_mixture:
        sums = []
        for first, last in spans:
            rows, *read = rows_of(first, last, student, mask, constants)
            sums.append(
                ops.mixture_sums(
                    *(rows, *form.logits(teacher, rows, first, last), *read),
                    *(plan.temperature, plan.columns, plan.code, plan.mixture_weight),
                )
            )
        sums = joined(sums)
        if group is not None and sums.shape[0]:
            dist.all_reduce(sums, group=group)
        divergence = sums[:, 0].clamp(min=0)  # rounding may leave a hair below
    others = len(ops.STATISTICS) - 1
    rest = (*rest[:others], *actions.unbind(0), *rest[others:])
    return (divergence, *rest), (constants, sums, teacher, mask)


class _VocabParallelDivergence(torch.autograd.Function):
    """Rows in, the fields of `measured_of` out, each [rows]."""

    @staticmethod
    def forward(ctx, student, labels, mask, plan, form, group, inplace_gradient, *teacher):
        fields, (constants, sums, teacher, mask) = statistics_pass(
            student, labels, mask, plan, form, group, teacher
        )
        ctx.save_for_backward(student, labels, mask, constants, sums, *teacher)
        ctx.plan, ctx.form, ctx.inplace_gradient, ctx.overwritten = plan, form, inplace_gradient, False
        if inplace_gradient == IF_UNUSED and ctx.needs_input_grad[0]:
            holders_of_a_lone_loss()  # measured here, where no backward is under way
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
        plan, form = ctx.plan, ctx.form
        upstream = (
            None if g is None else g.contiguous() for g in (divergence_gradient, cross_entropy_gradient)
        )
        rowwise = (labels, mask, constants, sums, *upstream)
        settings = (plan.temperature, plan.columns, plan.first_column, plan.code, plan.mixture_weight)
        unused = [None] * (6 + len(teacher))
        spans = form.spans(student.shape[0])
        overwrite = bool(ctx.inplace_gradient) and not shares_memory(student, teacher)
        if overwrite and ctx.inplace_gradient == IF_UNUSED:
            lone = holders_of_a_lone_loss()
            overwrite = bool(lone) and holders(student) in lone
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
