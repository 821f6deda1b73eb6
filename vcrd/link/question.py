"""What a teacher is asked about a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.settings import label

_NONE = torch.empty(0, dtype=torch.int64)


class Context(NamedTuple):
    """Tokens that the teacher sees and the student does not.

    tokens: int64 [c], in the order in which the teacher sees them. places: int64 [c], not descending: the index among
    the b * s tokens of the micro-batch before which the teacher sees each of them. A token before the first one of a
    packed sequence, or of a row, belongs to that sequence or row.
    """

    tokens: Tensor = _NONE
    places: Tensor = _NONE


NO_CONTEXT = Context()


class Question(NamedTuple):
    """What the teachers are asked about a micro-batch.

    tokens: the student's, integers [b, s], whole sequences. edges: those of packed sequences, int64 from 0 to s, and
    then b is 1; empty if nothing is packed. context: what the teacher alone sees. teachers: the name or the
    index of the teacher of each row, or of each packed sequence; empty for the first teacher.
    """

    tokens: Tensor
    edges: Tensor = _NONE
    context: Context = NO_CONTEXT
    teachers: tuple[str | int, ...] = ()


def check_context(
    context: Context,
    batch: int,
    sequence: int,
    edges: Sequence[int],
    *,
    vocab_size: int,
    longest: int,
    most: int,
) -> None:
    """ValueError unless this is a context for a micro-batch of [batch, sequence] tokens with these edges.

    longest: tokens of context that a sequence may have. most: tokens that the teacher may see in all, with rows that
    are padded to the longest one.
    """
    tokens, places = context
    name, count = "teacher_context", len(tokens) if tokens.dim() == 1 else -1
    if count < 0 or places.shape != tokens.shape:
        shapes = f"{list(tokens.shape)} and {list(places.shape)}"
        raise expected(name, "tokens [c] and as many places", shapes)
    if any(each.is_floating_point() or each.dtype == torch.bool for each in context):
        raise expected(name, "integers", f"{tokens.dtype} and {places.dtype}")
    if not count:
        return
    low, high = (int(edge) for edge in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise expected(name, f"tokens in [0, {vocab_size})", f"{low} to {high}")
    low, high = (int(edge) for edge in places.aminmax())
    if low < 0 or high >= batch * sequence or bool((places.diff() < 0).any()):
        raise expected(name, f"ascending places in [0, {batch * sequence})", places.tolist()[:16])
    starts = torch.tensor(list(edges[:-1]) or range(0, batch * sequence, sequence), dtype=torch.int64)
    which = torch.searchsorted(starts, places.long(), right=True)
    widest = int(which.unique_consecutive(return_counts=True)[1].max())
    if widest > longest:
        setting = label("teacher_context_length")
        raise expected(name, f"at most {longest} tokens per sequence, by {setting}", widest)
    seen = sequence + count if len(edges) else batch * (sequence + widest)
    if seen > most:
        raise expected(name, f"at most {most} tokens that the teacher sees in a micro-batch", seen)
