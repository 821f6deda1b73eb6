"""Rows in which the teacher is no distribution: a NaN or +inf among its logits, or nothing above -inf."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vcrd.loss import ops

_STUDENT_ENTROPY, _TEACHER_ENTROPY = map(ops.STATISTICS.index, ("student_entropy", "teacher_entropy"))
_TEACHER_MAX = ops.PARTIAL_COLUMNS["teacher_max"]
# Above what the code 255 stands for, below what 254 does. In a row of codes the largest logit has the code 0, so a row
# without any code below 255 is none: the link sends it in the place of what codes cannot say.
_NO_CODE = -23.9


class _Entropies(Protocol):
    student_entropy: Tensor
    teacher_entropy: Tensor


def invalid_rows(stats: _Entropies) -> Tensor:
    """Bool [...]: rows of `DivergenceStats` whose teacher is no distribution. Codes: those that were skipped, alone.

    Not where the student holds a NaN.
    """
    return stats.teacher_entropy.isnan() & ~stats.student_entropy.isnan()


def skip_invalid_rows(
    partials: Tensor, statistics: Tensor, actions: Tensor, mask: Tensor | None, coded: bool
) -> Tensor:
    """The mask [rows], uint8, without the invalid rows. Their statistics become 0, but the teacher's entropy NaN.

    partials: [shards, rows, n]; statistics [10, rows] and actions [2, rows], changed in place: as merged, equal on all
    rank. coded: whether the teacher is 8-bit codes relative to one maximum per row. No collective, no synchronisation.
    """
    bad = statistics[_TEACHER_ENTROPY].isnan()
    if coded and partials.shape[1]:
        bad = bad | (partials[..., _TEACHER_MAX].amax(0) < _NO_CODE)
    bad = bad & ~statistics[_STUDENT_ENTROPY].isnan()
    if mask is not None:
        bad = bad & (mask != 0)
    statistics.masked_fill_(bad, 0.0)
    statistics[_TEACHER_ENTROPY].masked_fill_(bad, torch.nan)
    actions.masked_fill_(bad, 0)
    keep = ~bad if mask is None else (mask != 0) & ~bad
    return keep.view(torch.uint8)
