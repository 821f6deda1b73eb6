"""Who sends which vocabulary columns to whom: pure functions of the two layouts.

Columns are true vocabulary columns. Megatron pads the vocabulary to a multiple of 128 times the
tensor-parallel size, so teacher and student may be padded differently; padding is never sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """The half-open range [start, stop) of true vocabulary columns that one tensor-parallel rank holds."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


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
    """The true columns of each tensor-parallel rank, in rank order. A shard of padding only is empty.

    Rank i holds the padded columns [i * w, (i + 1) * w) with w = padded_vocab_size / tensor_size.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    if padded_vocab_size < vocab_size:
        raise ValueError(
            f"padded_vocab_size must be at least vocab_size {vocab_size}, got {padded_vocab_size}"
        )
    if tensor_size < 1 or padded_vocab_size % tensor_size:
        raise ValueError(f"tensor_size must divide padded_vocab_size {padded_vocab_size}, got {tensor_size}")
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

    The empty piece carries a header only; without it that rank would never learn the micro-batch's shape.
    """
    empty = [
        Piece(0, rank, shard.start, shard.start)
        for rank, shard in enumerate(student_shards)
        if not shard.width
    ]
    return overlaps(teacher_shards, student_shards) + tuple(empty)


def replica_of(data_rank: int, data_size: int, replicas: int) -> int:
    """The teacher replica that serves a student data-parallel rank: contiguous blocks, sizes within one."""
    if not 0 <= data_rank < data_size:
        raise ValueError(f"data_rank must be in [0, {data_size}), got {data_rank}")
    if not 1 <= replicas <= data_size:
        raise ValueError(
            f"replicas must be from 1 to the student's data-parallel size {data_size}, got {replicas}"
        )
    return data_rank * replicas // data_size


def students_of(replica: int, data_size: int, replicas: int) -> tuple[int, ...]:
    """The student data-parallel ranks that a teacher replica serves, ascending."""
    if not 0 <= replica < replicas:
        raise ValueError(f"replica must be in [0, {replicas}), got {replica}")
    return tuple(rank for rank in range(data_size) if replica_of(rank, data_size, replicas) == replica)


@dataclass(frozen=True)
class Roster:
    """The ranks of the extra process group between one teacher replica and the students that it serves.

    Students first, data rank by data rank; then the teacher's senders (its last stage, by tensor rank); then
    the intake, the replica's rank 0, unless that is a sender itself (`intake_sender` is its tensor rank, or
    -1).
    """

    data_ranks: tuple[int, ...]
    student_tensor_size: int
    teacher_tensor_size: int
    intake_sender: int

    @property
    def students(self) -> range:
        return range(len(self.data_ranks) * self.student_tensor_size)

    @property
    def teachers(self) -> range:
        return range(len(self.students), self.size)

    @property
    def size(self) -> int:
        return len(self.students) + self.teacher_tensor_size + (self.intake_sender < 0)

    @property
    def intake(self) -> int:
        return self.size - 1 if self.intake_sender < 0 else self.sender(self.intake_sender)

    def sender(self, tensor_rank: int) -> int:
        return len(self.students) + tensor_rank

    def student(self, data_rank: int, tensor_rank: int) -> int:
        return self.data_ranks.index(data_rank) * self.student_tensor_size + tensor_rank

    def seat(self, student: int) -> tuple[int, int]:
        """The (data rank, tensor rank) of a student's rank in the group: the inverse of `student`."""
        position, tensor_rank = divmod(student, self.student_tensor_size)
        return self.data_ranks[position], tensor_rank

    def describe(self, rank: int) -> str:
        if rank in self.students:
            return "student data rank {}, tensor rank {}".format(*self.seat(rank))
        sender = rank - len(self.students)
        return (
            f"teacher tensor rank {sender}"
            if sender < self.teacher_tensor_size
            else "the teacher's first rank"
        )
