"""The bytes from each teacher rank to each student rank, exactly as the link sends them.

The counts equal `StudentLink.bytes_received` and `TeacherLink.bytes_sent`: headers and their data. The handshake of a
connection and the closing messages at the end of a run do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import NamedTuple

from vcrd.link.connection import HEADER_BYTES
from vcrd.link.payload import Payload
from vcrd.link.plan import Place, Shard, overlaps, pieces_of, places, students_of, vocab_shards

Shape = tuple[int, int]  # sequence, batch


class Flow(NamedTuple):
    """The bytes that tensor rank `sender` of the last teacher stage sends to a student rank, with the header."""

    sender: int
    receiver: Place
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """The traffic between two layouts with one payload. The sizes of the payload must be set (`Payload.sized`).

    vocab_size: columns without padding. teacher_padded, student_padded: columns with padding, which the tensor ranks
    divide evenly. data_size, context_size: of the student.
    """

    payload: Payload
    vocab_size: int
    teacher_padded: int
    teacher_tensor: int
    student_padded: int
    student_tensor: int
    context_size: int = 1
    data_size: int = 1

    @cached_property
    def teacher_shards(self) -> tuple[Shard, ...]:
        return vocab_shards(self.vocab_size, self.teacher_padded, self.teacher_tensor)

    @cached_property
    def student_shards(self) -> tuple[Shard, ...]:
        return vocab_shards(self.vocab_size, self.student_padded, self.student_tensor)

    @cached_property
    def _known(self) -> dict[Shape, list[list[int]]]:
        return {}

    @property
    def widest(self) -> int:
        """Columns without padding of the widest student shard."""
        return max(shard.width for shard in self.student_shards)

    def response(self, shape: Shape, data_rank: int = 0) -> tuple[Flow, ...]:
        """One micro-batch of a data rank: `batch` sequences, each divided over the context ranks."""
        sequence, batch = shape
        tokens = sequence // self.context_size * batch
        return tuple(
            Flow(piece.sender, place, HEADER_BYTES + self.payload.bytes(tokens, piece.width))
            for place in self._receivers(data_rank)
            for piece in pieces_of(place, self.teacher_shards, self.student_shards, self.payload.whole)
        )

    def output_layer(self, data_rank: int = 0) -> tuple[Flow, ...]:
        """The output layer of the teacher, sent when a data rank connects that does not have it; only with "hidden"."""
        if self.payload.name != "hidden":
            return ()
        pieces = overlaps(self.teacher_shards, self.student_shards)
        return tuple(
            Flow(
                piece.sender, place, HEADER_BYTES + self.payload.bytes(piece.width, 0)
            )  # each row is as wide as a state
            for place in self._receivers(data_rank)
            for piece in pieces
            if piece.receiver == place.tensor
        )

    def received_by(self, place: Place, shapes: Iterable[Shape]) -> int:
        """Bytes into one student rank for these micro-batches of its data rank, with what a teacher sends first."""
        ready = HEADER_BYTES if place.is_request_leader else 0
        flows = chain(self.output_layer(place.data), *(self.response(shape, place.data) for shape in shapes))
        return ready + sum(flow.bytes for flow in flows if flow.receiver == place)

    def sent_by(self, sender: int, replica: int, replicas: int, shapes: Sequence[Shape]) -> int:
        """Bytes out of one rank of the last stage of a replica, for these micro-batches of every data rank it serves.

        The output layer counts too.
        """
        total = 0
        for rank in students_of(replica, self.data_size, replicas):
            flows = chain(self.output_layer(rank), *(self.response(shape, rank) for shape in shapes))
            total += sum(flow.bytes for flow in flows if flow.sender == sender)
        return total

    def into_busiest(self, shape: Shape) -> int:
        """Bytes of a micro-batch into the student rank that receives most; equal in every data rank."""
        into: Counter[Place] = Counter()
        for flow in self.response(shape):
            into[flow.receiver] += flow.bytes
        return max(into.values())

    def out_of_busiest(self, shape: Shape, replicas: int) -> int:
        """Bytes out of the teacher rank that sends most, for one micro-batch of each data rank."""
        sums = self._sums(shape)
        edges = [-(-replica * self.data_size // replicas) for replica in range(replicas + 1)]
        return max(
            after - before
            for first, last in pairwise(edges)
            for before, after in zip(sums[first], sums[last], strict=True)
        )

    def _receivers(self, data_rank: int) -> tuple[Place, ...]:
        return places([data_rank], self.context_size, self.student_tensor)

    def _sums(self, shape: Shape) -> list[list[int]]:
        """Bytes out of each sender: entry n is for one micro-batch of each of the first n data ranks."""
        if shape in self._known:
            return self._known[shape]
        sums = self._known[shape] = [[0] * self.teacher_tensor]
        for rank in range(self.data_size):
            if self.payload.whole or not rank:  # otherwise the flows of all data ranks are equal
                flows = self.response(shape, rank)
            sums.append(list(sums[-1]))
            for flow in flows:
                sums[-1][flow.sender] += flow.bytes
        return sums


def request_bytes(shape: Shape, boundaries: int = 0, context: int = 0) -> int:
    """Bytes of the request for one micro-batch, from one student rank to one teacher rank.

    boundaries: edges of packed sequences. context: tokens that only the teacher sees, each of which has a place.
    """
    sequence, batch = shape
    return HEADER_BYTES + 4 * (sequence * batch + boundaries + 2 * context)
