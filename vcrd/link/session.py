"""One epoch of the teacher as one student rank sees it: who sends it what, over which connections."""

from __future__ import annotations

import time
from functools import cached_property

import torch
from torch import Tensor

from .errors import LinkError
from .facts import Facts
from .header import Header
from .payload import STATE_DTYPES
from .plan import Piece, Place, overlaps, pieces_of
from .wire import Connection, digest_of


class Session:
    """The teacher's facts, what each of its senders owes this rank, and the connections that stand.

    pieces: of each response, by sender. head_pieces: of the output layer, by sender, with the payload "hidden".
    """

    def __init__(self, epoch: int, student: Facts, teacher: Facts, place: Place) -> None:
        self.epoch = epoch
        self.teacher = teacher
        self.payload = teacher.content()
        shards = teacher.shards(), student.shards()
        self.pieces = {p.sender: p for p in pieces_of(place, *shards, self.payload.whole)}
        self.head_pieces: dict[int, Piece] = {}
        if teacher.head is not None:
            self.head_pieces = {p.sender: p for p in overlaps(*shards) if p.receiver == place.tensor}
        self.senders: dict[int, Connection] = {}
        self.intake: Connection | None = None
        self.ready = False  # the teacher has said that every connection stands; on the rank that asks
        self.begun = time.monotonic()

    @cached_property
    def expected(self) -> frozenset[int]:
        return frozenset(self.pieces) | frozenset(self.head_pieces)

    @property
    def connected(self) -> bool:
        return self.expected == self.senders.keys()

    @property
    def connections(self) -> list[Connection]:
        return [*self.senders.values(), *([self.intake] if self.intake else [])]

    @property
    def heard(self) -> float:
        """When the teacher last gave a sign of life, by time.monotonic()."""
        return max([self.begun, *(connection.heard for connection in self.connections)])

    def end(self) -> None:
        for connection in self.connections:
            connection.end()


class Head:
    """This rank's columns of the teacher's output layer, piece by piece, each checked by its SHA-256.

    Kept over the epochs: a teacher that comes back with the same weights sends none of them again.
    """

    def __init__(self, width: int, first_column: int) -> None:
        self._width = width
        self._first_column = first_column
        self._digests: dict[tuple[int, int], str] = {}
        self.weight: Tensor | None = None  # [width, state size]

    def has(self, piece: Piece, digest: str) -> bool:
        return self._digests.get((piece.start, piece.stop)) == digest

    def covers(self, pieces: dict[int, Piece]) -> bool:
        return all((piece.start, piece.stop) in self._digests for piece in pieces.values())

    def receive(
        self, piece: Piece, header: Header, digest: str, session: Session, connection: Connection
    ) -> None:
        """Takes in the rows that follow a header; LinkError if they are not what was announced."""
        head = session.teacher.head
        if (header.start, header.stop, header.number) != (piece.start, piece.stop, head.size):
            raise LinkError(f"its part {header.start}:{header.stop} of the output layer is not expected")
        if self._digests.get((piece.start, piece.stop), digest) != digest:
            raise LinkError("the teacher came back with another output layer than before")
        if self.weight is None:
            self.weight = torch.empty(self._width, head.size, dtype=STATE_DTYPES[head.dtype])
        rows = self.weight[piece.start - self._first_column : piece.stop - self._first_column]
        connection.receive(rows)
        if digest_of(rows) != digest:
            raise LinkError("a part of the output layer arrived damaged: its SHA-256 differs")
        self._digests[piece.start, piece.stop] = digest
