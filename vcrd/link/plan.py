"""Which teacher rank sends which rows and vocabulary columns to which student rank: pure functions of the two layouts.

Columns are true vocabulary columns. Megatron pads the vocabulary to a multiple of 128 times the tensor-parallel size,
so teacher and student may have different padding. Padding is never sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vcrd.errors import expected


@dataclass(frozen=True)
class Span:
    """A half-open range [start, stop): positions of a sequence, or columns."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


class Shard(Span):
    """The true vocabulary columns that one tensor-parallel rank holds."""


@dataclass(frozen=True)
class Piece:
    """Columns [start, stop) that teacher tensor rank `sender` sends to student tensor rank `receiver`."""

    sender: int
    receiver: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


def vocab_shards(vocab_size: int, padded_vocab_size: int, tensor_size: int) -> tuple[Shard, ...]:
    """The true columns of each tensor-parallel rank, in rank order. A shard that has only padding is empty.

    Rank i holds the padded columns [i * w, (i + 1) * w) with w = padded_vocab_size / tensor_size.
    """
    if vocab_size < 1:
        raise expected("vocab_size", "at least 1", vocab_size)
    if padded_vocab_size < vocab_size:
        raise expected("padded_vocab_size", f"at least vocab_size {vocab_size}", padded_vocab_size)
    if tensor_size < 1 or padded_vocab_size % tensor_size:
        raise expected("tensor_size", f"a divisor of padded_vocab_size {padded_vocab_size}", tensor_size)
    width = padded_vocab_size // tensor_size
    edges = [min(rank * width, vocab_size) for rank in range(tensor_size + 1)]
    return tuple(Shard(start, stop) for start, stop in zip(edges, edges[1:], strict=False))


def overlaps(teacher_shards: Sequence[Shard], student_shards: Sequence[Shard]) -> tuple[Piece, ...]:
    """Every non-empty intersection of a teacher shard with a student shard, ordered by receiver, then sender.

    Together the pieces hold every true column of every student shard exactly once.
    """
    pieces = []
    for receiver, wanted in enumerate(student_shards):
        for sender, held in enumerate(teacher_shards):
            start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
            if start < stop:
                pieces.append(Piece(sender, receiver, start, stop))
    return tuple(pieces)


def responses(teacher_shards: Sequence[Shard], student_shards: Sequence[Shard]) -> tuple[Piece, ...]:
    """The pieces of one response: `overlaps`, and an empty piece from sender 0 to each empty student shard.

    The empty piece is a header without tensors. Without it that rank would never learn the shape of the micro-batch.
    """
    empty = [
        Piece(0, rank, shard.start, shard.start)
        for rank, shard in enumerate(student_shards)
        if not shard.width
    ]
    return overlaps(teacher_shards, student_shards) + tuple(empty)


def pieces_of(
    place: Place, teacher_shards: Sequence[Shard], student_shards: Sequence[Shard], whole: bool
) -> tuple[Piece, ...]:
    """The pieces of each response that one student rank receives, ordered by sender, at most one from each.

    whole: the payload does not depend on the columns (top-k, hidden states). Then every student rank receives all of it
    from one sender, and the senders take turns. Otherwise a student rank receives the columns that it holds, from every
    sender that holds some of them. A rank that holds only padding then receives an empty piece.
    """
    if whole:
        turn = (place.data + place.context) * len(student_shards) + place.tensor
        mine = student_shards[place.tensor]
        return (Piece(turn % len(teacher_shards), place.tensor, mine.start, mine.stop),)
    return tuple(p for p in responses(teacher_shards, student_shards) if p.receiver == place.tensor)


def replica_of(data_rank: int, data_size: int, replicas: int) -> int:
    """The teacher replica that serves a student data-parallel rank: contiguous blocks, sizes differ by at most 1."""
    if not 0 <= data_rank < data_size:
        raise expected("data_rank", f"an integer in [0, {data_size})", data_rank)
    if not 1 <= replicas <= data_size:
        raise expected(
            "replicas", f"an integer from 1 to the student's data-parallel size {data_size}", replicas
        )
    return data_rank * replicas // data_size


def students_of(replica: int, data_size: int, replicas: int) -> tuple[int, ...]:
    """The student data-parallel ranks that a teacher replica serves, ascending."""
    if not 0 <= replica < replicas:
        raise expected("replica", f"an integer in [0, {replicas})", replica)
    return tuple(rank for rank in range(data_size) if replica_of(rank, data_size, replicas) == replica)


@dataclass(frozen=True)
class Place:
    """A rank of the student's last pipeline stage: its data-parallel, context-parallel and tensor-parallel ranks."""

    data: int
    context: int
    tensor: int

    @property
    def is_request_leader(self) -> bool:
        """Whether this rank sends the requests of its data-parallel rank to the teacher."""
        return self.context == 0 and self.tensor == 0

    def __str__(self) -> str:
        context = f", context rank {self.context}" if self.context else ""
        return f"student data rank {self.data}{context}, tensor rank {self.tensor}"


def places(data_ranks: Sequence[int], context_size: int, tensor_size: int) -> tuple[Place, ...]:
    """All ranks of the last stage of the student that belong to those data-parallel ranks, in rank order."""
    return tuple(
        Place(data, context, tensor)
        for data in data_ranks
        for context in range(context_size)
        for tensor in range(tensor_size)
    )


def context_rows(
    sequence: int, context_rank: int, context_size: int, boundaries: Sequence[int] = ()
) -> tuple[Span, ...]:
    """The positions of a sequence that a context-parallel rank holds, in the order in which it holds them.

    This is the zig-zag order of Megatron, which gives every rank the same share of causal attention. Each sequence is
    cut into 2 context_size equal chunks, and rank r holds chunk r, then chunk 2 context_size - 1 - r.

    Args:
        boundaries: edges of packed sequences, 0 and `sequence` included; each packed sequence is cut by itself.

    ValueError where a sequence cannot be cut.
    """
    if not 0 <= context_rank < context_size:
        raise expected("context_rank", f"an integer in [0, {context_size})", context_rank)
    check_boundaries(sequence, boundaries, context_size)
    edges = list(boundaries) or [0, sequence]
    if context_size == 1:
        return (Span(0, sequence),)
    spans: list[Span] = []
    for start, stop in zip(edges, edges[1:], strict=False):
        width = (stop - start) // (2 * context_size)
        for chunk in (context_rank, 2 * context_size - 1 - context_rank):
            if width:
                spans.append(Span(start + chunk * width, start + (chunk + 1) * width))
    return tuple(spans)


def check_boundaries(
    sequence: int, boundaries: Sequence[int], context_size: int, longest: int | None = None
) -> None:
    """ValueError unless these are ascending edges of packed sequences that context_size can cut.

    longest: the most tokens that a packed sequence may have; None where that has been checked before.
    """
    edges = list(boundaries) or [0, sequence]
    if edges[0] != 0 or edges[-1] != sequence or any(a > b for a, b in zip(edges, edges[1:], strict=False)):
        raise expected("boundaries", f"ascending edges from 0 to {sequence}", list(boundaries)[:16])
    widest = max((b - a for a, b in zip(edges, edges[1:], strict=False)), default=0)
    if longest is not None and widest > longest:
        raise expected("boundaries", f"sequences of at most {longest} tokens", f"one of {widest}")
    if context_size == 1:
        return
    for start, stop in zip(edges, edges[1:], strict=False):
        if (stop - start) % (2 * context_size):
            raise expected(
                "sequences",
                f"lengths that are multiples of {2 * context_size}, twice the context size",
                f"one of {stop - start} from position {start}",
            )
