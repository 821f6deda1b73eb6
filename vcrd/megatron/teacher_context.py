"""What a teacher sees and its student does not: the fields of a micro-batch, and the longer rows of the teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.plan import context_rows
from vcrd.link.question import NO_CONTEXT, Context
from vcrd.megatron.packing import edges_in, field, for_script

# Keys in a micro-batch: the tokens that the teacher alone sees, and where it sees them.
CONTEXT_KEY, POSITIONS_KEY = CONTEXT_KEYS = ("vcrd_teacher_context", "vcrd_teacher_context_positions")
_PADDING = -1
_STEP = 64  # rows are as long as a multiple of it, so that kernels meet few shapes


def context_of(batch: Any, tokens: Tensor, edges: Tensor, arguments: Any = None) -> Context:
    """The teacher's context in a micro-batch of the student's tokens [b, s]; ValueError if its fields are wrong.

    `CONTEXT_KEY`: integers [n, c] that are padded with -1, or a list of n tensors or lists, one for each row, or for
    each packed sequence. An entry for the padding at the end of a packed row may be missing. `POSITIONS_KEY`, in the
    same form: for each token of context the position in its row or packed sequence before which the teacher sees it,
    not descending; without this field all are 0. edges: as from `packed`, of this micro-batch and the `arguments` of
    the model's forward.
    """
    given, positions = (field(batch, key) for key in CONTEXT_KEYS)
    if given is None:
        if positions is not None:
            raise expected(CONTEXT_KEY, f"in the micro-batch, beside {POSITIONS_KEY}", "none")
        return NO_CONTEXT
    rows, width = tokens.shape
    cuts = edges.tolist() or list(range(0, rows * width + 1, width))
    lengths = [stop - start for start, stop in zip(cuts, cuts[1:], strict=False)]
    if len(edges) and _count(given) == len(lengths) - 1 and _ends_in_padding(batch, arguments, rows * width):
        lengths.pop()
    contexts = _entries(CONTEXT_KEY, given, len(lengths))
    if positions is None:
        befores = [torch.zeros_like(each) for each in contexts]
    else:
        befores = _entries(POSITIONS_KEY, positions, len(lengths))
    found, places = [], []
    for number, (context, before) in enumerate(zip(contexts, befores, strict=True)):
        if context.shape != before.shape:
            got = f"{len(before)} for the {len(context)} of sequence {number}"
            raise expected(POSITIONS_KEY, "as many positions as tokens of context", got)
        true = context != _PADDING
        context, before = context[true], before[true]
        if len(context) and int(context.min()) < 0:
            raise expected(CONTEXT_KEY, f"tokens, and {_PADDING} for padding", int(context.min()))
        wrong = (before < 0) | (before >= lengths[number])
        if bool(wrong.any()) or bool((before.diff() < 0).any()):
            what = f"positions from 0 to {lengths[number] - 1} that do not descend, for sequence {number}"
            raise expected(POSITIONS_KEY, what, before.tolist()[:16])
        found.append(context)
        places.append(before + cuts[number])
    return Context(torch.cat(found), torch.cat(places)) if found else NO_CONTEXT


def without_fields(source: Iterator[Any] | None) -> Iterator[Any] | None:
    """An iterator over `source` whose micro-batches are `for_script`; None for None."""
    return None if source is None else _each(source, for_script)


def recorded(source: Iterator[Any] | None, drawn: list[Any]) -> Iterator[Any] | None:
    """An iterator over `source` that appends each micro-batch to `drawn`; None for None."""

    def note(batch: Any) -> Any:
        # A copy, because Megatron's functions remove and move the entries of the dictionary.
        drawn.append(dict(batch) if isinstance(batch, dict) else batch)
        return batch

    return None if source is None else _each(source, note)


def _each(source: Iterator[Any], change: Callable[[Any], Any]) -> Iterator[Any]:
    # Not `map`: a source may have __next__ alone.
    while True:
        try:
            batch = next(source)
        except StopIteration:
            return
        yield change(batch)


def _ends_in_padding(batch: Any, arguments: Any, width: int) -> bool:
    named = edges_in(batch) or (None if arguments is None else edges_in(arguments))
    edges = torch.as_tensor(named[1])
    return (edges.dim() < 2 or len(edges) == 1) and int(edges.max()) < width


def _count(given: Any) -> int | str:
    """How many entries a field has; another type's name."""
    listed = isinstance(given, (list, tuple)) or (isinstance(given, Tensor) and given.dim() == 2)
    return len(given) if listed else type(given).__name__


def _entries(key: str, given: Any, count: int) -> list[Tensor]:
    """int64 [c] on the CPU for each sequence."""
    what = f"integers [{count}, c], or a list of {count} tensors [c] or lists of integers: one per sequence"
    if _count(given) != count:
        raise expected(key, what, list(given.shape) if isinstance(given, Tensor) else _count(given))
    entries = []
    for each in given:
        try:
            entry = torch.as_tensor(each).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise expected(key, what, f"{each!r:.100}") from None
        if entry.dim() != 1 or (len(entry) and (entry.is_floating_point() or entry.dtype == torch.bool)):
            raise expected(key, what, f"{entry.dtype} {list(entry.shape)}")
        entries.append(entry.long())
    return entries


class TeacherRows(NamedTuple):
    """Where the tokens of a micro-batch [b, s] lie in the rows of w tokens that the teacher's model is given.

    shape: (b, w). edges: of packed sequences, int64 from 0 to w; empty if nothing is packed. students: int64 [b, s],
    the position of each of the student's tokens in its row. others: int64 [c], the index of each token of context
    among the b * w. What is neither is padding, which no token before it sees.
    """

    shape: tuple[int, int]
    edges: Tensor
    students: Tensor
    others: Tensor

    @classmethod
    def of(
        cls, batch: int, sequence: int, edges: Tensor, places: Tensor, multiple: int = 1, each: int = 1
    ) -> TeacherRows:
        """On the CPU. places: as in `Context`. multiple: of which w is one; each: of which the length of every packed
        sequence is one, and w too. Rows are padded on their right, packed sequences likewise, and what is left of a
        packed row is a sequence of its own."""
        count, is_packed = batch * sequence, len(edges) > 0
        starts = edges[:-1] if is_packed else torch.arange(batch) * sequence
        stops = edges[1:] if is_packed else starts + sequence
        before = torch.searchsorted(places, starts)  # tokens of context before each sequence
        lengths = stops - starts + torch.searchsorted(places, stops) - before
        multiple = lcm(multiple, each)
        if is_packed:
            ends = (_up(lengths, each)).cumsum(0)
            width = int(_up(ends[-1], multiple))
            begins = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
            edges = torch.cat([begins[:1], ends, torch.tensor([width])[ends[-1:] < width]])
        else:
            width = int(_up(lengths.max(), multiple))
            begins = torch.arange(batch) * width
        index = torch.arange(count)
        which = torch.searchsorted(starts, index, right=True) - 1
        students = begins[which] + index - starts[which]
        students += torch.searchsorted(places, index, right=True) - before[which]
        which = torch.searchsorted(starts, places, right=True) - 1
        others = begins[which] + places - starts[which] + torch.arange(len(places)) - before[which]
        students = students.view(batch, sequence)
        if not is_packed:
            students -= begins[:, None]
        return cls((batch, width), edges, students, others)

    def fill(self, tokens: Tensor, context: Tensor) -> Tensor:
        """The teacher's tokens [b, w], of the student's [b, s] and the context's [c], on the device of the first."""
        batch, width = self.shape
        rows = tokens.new_zeros(batch * width)
        first = torch.arange(batch)[:, None] * width
        rows[(self.students + first).flatten().to(rows.device)] = tokens.flatten()
        rows[self.others.to(rows.device)] = context.to(rows)
        return rows.view(batch, width)

    @property
    def width(self) -> int:
        return self.shape[1]

    def real(self, positions: Tensor) -> Tensor:
        """Position ids [b, w] in which padding has no position that the model may lack."""
        return positions.clamp(max=int(self.students.max()))  # a token of the student ends each row

    def take(self, states: Tensor, columns: Tensor | None = None) -> Tensor:
        """The part [s, b, ..] of the teacher's [w, b, ..] that belongs to the student's positions.

        columns: of the student's positions, those to take; default: all.
        """
        batch = states.shape[1]
        wanted = self.students if columns is None else self.students[:, columns]
        index = wanted.t() * batch + torch.arange(batch)
        picked = states.flatten(0, 1).index_select(0, index.flatten().to(states.device, non_blocking=True))
        return picked.view(*index.shape, *states.shape[2:])


class SplitRows:
    """The student's positions of one rank, out of rows that context parallelism divides.

    edges: of the student's packed sequences. width: the length of the teacher's rows on this rank. columns: the
    positions of the teacher's rows that this rank holds.
    """

    def __init__(self, rows: TeacherRows, edges: Tensor, group: dist.ProcessGroup) -> None:
        rank, self._group, self._rows = group.rank(), group, rows
        self._all = [columns_of(rows.width, each, group.size(), rows.edges) for each in range(group.size())]
        self._students = columns_of(rows.students.shape[1], rank, group.size(), edges)
        self.columns = self._all[rank]
        self.width = len(self.columns)

    def take(self, states: Tensor) -> Tensor:
        """[s / size, b, ..] of [w / size, b, ..]. One all-gather over the context-parallel ranks."""
        parts = [torch.empty_like(states) for _ in self._all]
        dist.all_gather(parts, states.contiguous(), group=self._group)
        order = torch.cat(self._all).argsort().to(states.device, non_blocking=True)
        return self._rows.take(torch.cat(parts).index_select(0, order), self._students)


def columns_of(width: int, rank: int, size: int, edges: Tensor) -> Tensor:
    """int64: the positions of rows of `width` that a context-parallel rank holds, in its order."""
    spans = context_rows(width, rank, size, edges.tolist())
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def _up(length: Tensor, multiple: int) -> Tensor:
    return -(-length // multiple) * multiple


def row_multiple(config: Any, context_size: int = 1) -> int:
    """Of which the teacher's longer rows are multiples: what their division among ranks and products in FP8 need."""
    parts = config.tensor_model_parallel_size if getattr(config, "sequence_parallel", False) else 1
    parts *= context_size
    return lcm(_STEP, 2 * context_size, 32 * parts if getattr(config, "fp8", None) else parts)


@contextlib.contextmanager
def for_students_alone(
    chunk: torch.nn.Module, rows: TeacherRows | SplitRows | None, group: dist.ProcessGroup | None
) -> Iterator[None]:
    """While open, the model's output layer multiplies the student's positions only.

    So there are no logits of context and padding, and no second tensor of logits. Does nothing without `rows`, on an
    earlier stage, and for a model without `output_layer`, whose output still has all positions. group: the
    tensor-parallel one. With sequence parallelism one all-gather of the hidden states takes the place of the layer's
    own.
    """
    layer = getattr(chunk, "output_layer", None)
    if layer is None or rows is None:
        yield
        return
    split = group is not None and bool(getattr(layer, "sequence_parallel", False))

    def pick(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        states, *rest = args
        if split:
            parts = [torch.empty_like(states) for _ in range(group.size())]
            dist.all_gather(parts, states.contiguous(), group=group)
            states = torch.cat(parts)
            layer.sequence_parallel = (
                False  # as Megatron's own inference does where it gathers before the layer
            )
        return (rows.take(states), *rest), kwargs

    hook = layer.register_forward_pre_hook(pick, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        if split:
            layer.sequence_parallel = True


@contextlib.contextmanager
def of_any_width(config: Any, needed: bool) -> Iterator[None]:
    """While open, and if needed, the stages of a pipeline tell each other the shapes of what they send."""
    before = config.variable_seq_lengths
    config.variable_seq_lengths = before or needed
    try:
        yield
    finally:
        config.variable_seq_lengths = before
