"""Which teacher answers which sequences of a micro-batch, and what each of them is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.plan import Span
from vcrd.link.question import NO_CONTEXT, Context, Question
from vcrd.megatron.packing import edges_in, field

TEACHER_KEY = "vcrd_teacher"


def teachers_of(
    batch: Any, edges: Tensor, shape: Sequence[int], arguments: Any = None
) -> tuple[str | int, ...]:
    """What the field `vcrd_teacher` of a micro-batch says: a name or an index for each row, or each packed sequence.

    Empty if there is no such field. edges: as from `packing.packed`. shape: [b, s] of the tokens before packing.
    arguments: those of the model's forward, if the edges come from them. In a tensor that holds the indices of several
    packed rows, negative entries are padding. A row's padding, after its last edge, goes to the teacher of the sequence
    before it.

    ValueError unless it has one name or index for each row or packed sequence.
    """
    given = field(batch, TEACHER_KEY)
    if given is None:
        return ()
    values = _values(given)
    if not len(edges):
        if len(values) != shape[0]:
            raise expected(TEACHER_KEY, f"one for each of {shape[0]} rows", len(values))
        return tuple(values)
    values = [value for value in values if isinstance(value, str) or value >= 0]
    starts = edges.tolist()[:-1]
    padding = _padding(batch, arguments, *shape)
    sequences = [start for start in starts if start not in padding]
    if len(values) == len(starts):
        return tuple(values)
    if len(values) != len(sequences):
        raise expected(TEACHER_KEY, f"one for each of {len(sequences)} packed sequences", len(values))
    found: list[str | int] = []
    left = iter(values)
    for start in starts:
        found.append((found[-1] if found else 0) if start in padding else next(left))
    return tuple(found)


def _values(given: Any) -> list[str | int]:
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise expected(TEACHER_KEY, "integers or names", given.dtype)
        return given.detach().cpu().reshape(-1).tolist()
    if not isinstance(given, (list, tuple)):
        raise expected(TEACHER_KEY, "a tensor of integers or a list of names", type(given).__name__)
    values = []
    for value in given:
        values += value if isinstance(value, (list, tuple)) else [value]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise expected(TEACHER_KEY, "integers or names", type(value).__name__)
    return values


def _padding(batch: Any, arguments: Any, size: int, sequence: int) -> set[int]:
    """Where the padding of packed rows begins, as positions of the one row that they become."""
    found = edges_in(batch)
    if found is None and arguments is not None:
        found = edges_in(arguments)
    edges = torch.as_tensor(found[1]).cpu().long()
    rows = edges.reshape(-1, edges.shape[-1] if edges.dim() else 1)
    width = size * sequence if len(rows) == 1 else sequence
    ends = [int(row[row >= 0][-1]) + width * number for number, row in enumerate(rows)]
    return {end for number, end in enumerate(ends) if end < width * (number + 1)}


@dataclass(frozen=True)
class Split:
    """The teacher of each sequence of a micro-batch: of each row, or of each packed sequence of its one row.

    rows, width: [b, s] of the tokens. edges: those of packed sequences, or empty. owners: for each sequence the index
    of its teacher.
    """

    rows: int
    width: int
    edges: tuple[int, ...]
    owners: tuple[int, ...]

    @classmethod
    def of(cls, question: Question, names: Sequence[str]) -> Split:
        """ValueError for a teacher that is neither one of `names` nor the index of one."""
        rows, width = question.tokens.shape
        edges = tuple(question.edges.tolist())
        count = max(0, len(edges) - 1) if edges else rows
        owners = tuple(_index(teacher, names) for teacher in question.teachers) or (0,) * count
        return cls(rows, width, edges, owners)

    @property
    def present(self) -> tuple[int, ...]:
        """The teachers that have a sequence, ascending."""
        return tuple(sorted(set(self.owners)))

    @property
    def dim(self) -> int:
        """The dimension of an answer [s, b, ..] along which it is cut: that of rows, or of positions if packed."""
        return 0 if self.edges else 1

    def question(self, whole: Question, teacher: int) -> Question:
        """What one of the teachers is asked: its own sequences, in their order."""
        if self.present == (teacher,):
            return whole._replace(teachers=())
        spans = [span for owner, span in self.runs(1) if owner == teacher]
        if not self.edges:
            index = torch.cat([torch.arange(span.start, span.stop) for span in spans])
            tokens = whole.tokens[index.to(whole.tokens.device)]
            rows = [Span(row * self.width, (row + 1) * self.width) for row in index.tolist()]
            return Question(tokens, whole.edges, _context(whole.context, rows))
        tokens = torch.cat([whole.tokens[:, span.start : span.stop] for span in spans], dim=1)
        widths = [
            stop - start
            for owner, start, stop in zip(self.owners, self.edges, self.edges[1:], strict=False)
            if owner == teacher
        ]
        edges = torch.tensor([0, *widths]).cumsum(0)
        return Question(tokens, edges, _context(whole.context, spans))

    def runs(self, context_size: int) -> list[tuple[int, Span]]:
        """(teacher, span) of neighbouring sequences of one teacher, in order, along `dim` of what one context-parallel
        rank holds. Context parallelism gives each rank the same share of each packed sequence, in their order."""
        edges = [edge // context_size for edge in self.edges] or list(range(self.rows + 1))
        runs: list[tuple[int, Span]] = []
        for owner, start, stop in zip(self.owners, edges, edges[1:], strict=False):
            if runs and runs[-1][0] == owner:
                runs[-1] = (owner, Span(runs[-1][1].start, stop))
            else:
                runs.append((owner, Span(start, stop)))
        return runs

    def of_tokens(self, context_size: int) -> Tensor:
        """int16 [s / context_size, b] on the CPU: the teacher of each token that one context-parallel rank holds."""
        length = self.width // context_size
        runs = self.runs(context_size)
        owners = torch.tensor([owner for owner, _ in runs], dtype=torch.int16)
        owners = owners.repeat_interleave(torch.tensor([span.width for _, span in runs]))
        return owners[:, None].contiguous() if self.edges else owners.expand(length, self.rows).contiguous()


def _index(teacher: str | int, names: Sequence[str]) -> int:
    if tuple(names) == ("",) and teacher != 0:
        raise expected(TEACHER_KEY, "0 or none, because the settings name no teacher", repr(teacher))
    known = ", ".join(names)
    if isinstance(teacher, str):
        if teacher not in names:
            raise expected(TEACHER_KEY, f"names of teachers ({known})", repr(teacher))
        return names.index(teacher)
    if not 0 <= teacher < len(names):
        raise expected(TEACHER_KEY, f"integers from 0 to {len(names) - 1} ({known})", teacher)
    return teacher


def _context(context: Context, spans: Sequence[Span]) -> Context:
    """The context of these tokens alone, which are put one after another. spans: of the b * s tokens, ascending."""
    if not len(context.tokens):
        return NO_CONTEXT
    tokens, places, before = [], [], 0
    for span in spans:
        here = (context.places >= span.start) & (context.places < span.stop)
        tokens.append(context.tokens[here])
        places.append(context.places[here] - span.start + before)
        before += span.width
    return Context(torch.cat(tokens), torch.cat(places))
