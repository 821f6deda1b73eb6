"""Privileged validity: the probabilities that a judge gives the actions of both models.

The judge is a teacher that knows more, for example the solution. It judges the action of the student and that of the
teacher whose distribution is distilled. That teacher does not see what the judge sees: by its own distribution no
action is more probable than its own, and the student could never be judged the more valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.loss import ops
from vcrd.loss.config import LossConfig
from vcrd.loss.divergence import DivergenceStats, SettledCall, settle
from vcrd.loss.teacher_blocks import (
    BLOCK_BYTES,
    NO_CODE,
    blocks_of,
    gather_shards,
    joined,
    known_tokens,
    rows_of,
    spans_of,
)
from vcrd.teacher_logits import DenseLogits, TeacherLogits, TopKLogits

_MAX, _SUM = ops.PARTIAL_COLUMNS["teacher_max"], ops.PARTIAL_COLUMNS["teacher_sum"]
_CODE_RANGE = 24.0  # what the largest of the 8-bit codes stands for: see `DenseLogits`


class Verdicts(NamedTuple):
    """log V of the student's and of the teacher's action, [...] float32, equal on every rank; NaN in rows in which the
    judge is no distribution.
    """

    student: Tensor
    teacher: Tensor

    @property
    def invalid(self) -> Tensor:
        return self.student.isnan()


def require_judge(
    judge: Tensor | TeacherLogits | None, teacher: Tensor | TeacherLogits, config: LossConfig
) -> None:
    """Raises ValueError unless there is a judge exactly where validity is "privileged", and it is not the teacher."""
    if config.validity != "privileged":
        if judge is not None:
            got = f"one with {config.validity!r}"
            raise expected("judge", "none unless validity is 'privileged'", got)
    elif judge is None:
        raise ValueError("judge: needed by validity 'privileged', got None")
    elif judge is teacher:
        what = "another answer than the teacher's, by which its own action would always be the more valid"
        raise expected("judge", what, "the same")


def settle_judge(
    student_logits: Tensor,
    judge: Tensor | TeacherLogits,
    mask: Tensor | None,
    config: LossConfig,
    group: dist.ProcessGroup | None,
) -> SettledCall:
    """As `settle` for the teacher. Raises the same errors, about `judge`."""
    try:
        return settle(student_logits, judge, None, mask, LossConfig(vocab_size=config.vocab_size), group)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("teacher_logits", "judge")) from None


@torch.no_grad()
def judged_actions(call: SettledCall, stats: DivergenceStats, block_bytes: int = BLOCK_BYTES) -> Verdicts:
    """log V of both actions in `stats`, each the judge's log-probability of the action at temperature 1.

    0, which is V = 1, for both where the teacher's action is not known (-1), and where the mask is 0. With `TopKLogits`
    the log-probability of a token that is no id is the upper bound that `TopKLogits` describes, so two such actions are
    equally valid.

    A dense judge is read once, in blocks where it is coded. Collectives: one all-gather of 4 floats per token; none
    with one rank, and none with `TopKLogits`; with `MixedLogits` one more, of 2 floats per token and teacher.
    """
    shape = stats.student_action.shape
    actions = torch.stack([stats.student_action, stats.teacher_action]).reshape(2, -1)
    asked = actions.clamp(min=0)
    if isinstance(call.teacher, TopKLogits):
        found = _of_top_k(call, asked)
    else:
        found = _of_logits(call, asked, block_bytes)
    unread = actions[1] < 0
    if call.mask is not None:
        unread = unread | (call.mask == 0)
    return Verdicts(*torch.where(unread, 0.0, found).float().view(2, *shape))


def _of_top_k(call: SettledCall, actions: Tensor) -> Tensor:
    """float64 [2, rows] for actions [2, rows]."""
    judge, rows = call.teacher, actions.shape[1]
    k = judge.ids.shape[-1]
    known = known_tokens(
        judge.logprobs.reshape(rows, k),
        judge.ids.reshape(rows, k).to(torch.int64),
        judge.log_tail.reshape(rows),
        call.shard.vocab_size,
    )
    found = torch.stack([known.logprob_of(action)[0] for action in actions])
    return found.masked_fill(known.entropy.isnan(), torch.nan)


def _of_logits(call: SettledCall, actions: Tensor, block_bytes: int) -> Tensor:
    """float64 [2, rows] for actions [2, rows]."""
    shard = call.shard
    local = actions.t() - shard.first_column
    here = (local >= 0) & (local < shard.columns)
    parts = []
    for first, last, logits, shift in _blocks(call, actions.shape[1], block_bytes):
        counted, places, inside = rows_of(first, last, call.mask, local, here)
        # The kernel reads two models. Read as both, the judge comes from memory once.
        partials = ops.row_statistics(
            logits, logits, shift, None, counted, 1.0, shard.columns, shard.first_column, 0
        )
        at_actions = partials.new_full(places.shape, -torch.inf)
        if shard.columns:
            at_actions = logits.gather(1, places.clamp(0, shard.columns - 1)).float()
            at_actions = at_actions if shift is None else at_actions + shift[:, None]
            at_actions = torch.where(inside, at_actions, -torch.inf)
        parts.append(torch.cat([partials[:, _MAX, None], partials[:, _SUM, None], at_actions], 1))
    maxima, sums, *at_actions = gather_shards(joined(parts), call.group).double().unbind(-1)
    top = maxima.amax(0)
    # A shard without columns, or of -inf alone, has the maximum -inf and adds nothing.
    sums = torch.where(maxima == -torch.inf, 0.0, sums * (maxima - top).exp())
    log_total = top + sums.sum(0).log()
    found = torch.stack([each.amax(0) - log_total for each in at_actions])
    invalid = log_total.isnan() | log_total.isinf()
    if _is_coded(call.teacher) and call.teacher.row_max is None:
        invalid = invalid | (top < NO_CODE)
    return found.masked_fill(invalid, torch.nan)


def _is_coded(judge: TeacherLogits) -> bool:
    return isinstance(judge, DenseLogits) and judge.logits.dtype == torch.uint8


def _blocks(
    call: SettledCall, rows: int, block_bytes: int
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """The judge's logits of tokens [first, last), and what is to be added to each row. Codes are decoded."""
    form, tensors = blocks_of(call.teacher, rows, call.shard, block_bytes, call.group)
    if not _is_coded(call.teacher):
        for first, last in form.spans(rows):
            yield first, last, *form.logits(tensors, None, first, last)
        return
    for first, last in spans_of(rows, call.shard.columns, block_bytes):
        codes, shift = rows_of(first, last, *tensors)
        yield first, last, (codes[:, : call.shard.columns] / 255).square_().mul_(-_CODE_RANGE), shift
