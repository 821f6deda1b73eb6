"""What a teacher is asked about a micro-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    then b is 1; empty if nothing is packed. context: what the teacher alone sees. teachers: the name of the teacher of
    each row, or of each packed sequence; empty for the first teacher.
    """

    tokens: Tensor
    edges: Tensor = _NONE
    context: Context = NO_CONTEXT
    teachers: tuple[str, ...] = ()
