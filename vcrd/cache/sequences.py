"""The sequences of a micro-batch, and where a rank of the student holds the answer to each of them: pure functions.

A sequence is a row of a micro-batch, or one of the sequences that are packed into a row. It is what a cache has an
answer for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vcrd.link.plan import Span, context_rows
from vcrd.link.question import NO_CONTEXT, Context


class Part(NamedTuple):
    """A sequence: positions [start, stop) of row `row` of the micro-batch."""

    row: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


class Held(NamedTuple):
    """What a context-parallel rank holds of a sequence: its positions `rows` in the sequence, in the order in which the
    rank holds them, from index `first` of its own part of the row on."""

    rows: tuple[Span, ...]
    first: int

    @property
    def here(self) -> slice:
        return slice(self.first, self.first + sum(span.width for span in self.rows))


def parts_of(batch: int, sequence: int, edges: Sequence[int]) -> list[Part]:
    """The sequences of a micro-batch [batch, sequence], in order. edges: of packed sequences, from 0 to `sequence`;
    empty if nothing is packed. A packed sequence without tokens is none."""
    if not len(edges):
        return [Part(row, 0, sequence) for row in range(batch)]
    return [Part(0, a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]


def question_about(part: Part, tokens: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Context]:
    """The tokens of one sequence of a micro-batch [b, s], and what the teacher alone sees of it."""
    own = tokens[part.row, part.start : part.stop]
    if not len(context.tokens):
        return own, NO_CONTEXT
    first = part.row * tokens.shape[1] + part.start
    inside = (context.places >= first) & (context.places < first + part.width)
    return own, Context(context.tokens[inside], context.places[inside] - first)


def held_by(part: Part, context_rank: int, context_size: int) -> Held:
    """What a rank holds of a sequence, in the order of Megatron's context parallelism. ValueError where it cannot be
    cut."""
    spans = context_rows(part.width, context_rank, context_size)
    merged = [spans[0]]
    for span in spans[1:]:
        if span.start == merged[-1].stop:
            merged[-1] = Span(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return Held(tuple(merged), part.start // context_size)
