"""One epoch of the teacher as one student rank sees it: who sends it what, over which connections."""

from __future__ import annotations

import time
from functools import cached_property

import torch
from torch import Tensor

from .connection import Connection, digest_of
from .errors import HandshakeRefused, LinkError
from .handshake import Handshake
from .header import Header
from .payload import STATE_DTYPES
from .plan import Piece, Place, Shard, overlaps, pieces_of


class StudentSession:
    """The teacher's handshake, what each of its senders owes this rank, and the connections that stand.

    pieces: of each response, by sender. head_pieces: of the output layer, by sender, with the payload "hidden".
    """

    def __init__(self, epoch: int, student: Handshake, teacher: Handshake, place: Place) -> None:
        self.epoch = epoch
        self.teacher = teacher
        self.payload = teacher.content()
        shards = teacher.shards(), student.shards()
        self.pieces = {p.sender: p for p in pieces_of(place, *shards, self.payload.whole)}
        self.head_pieces: dict[int, Piece] = {}
        if teacher.head is not None:
            self.head_pieces = {p.sender: p for p in overlaps(*shards) if p.receiver == place.tensor}
        self.head_weight: Tensor | None = None  # where they go
        self.senders: dict[int, Connection] = {}
        self.requests: Connection | None = None
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
        return [*self.senders.values(), *([self.requests] if self.requests else [])]

    @property
    def heard(self) -> float:
        """When the teacher last gave a sign of life, by time.monotonic()."""
        return max([self.begun, *(connection.heard for connection in self.connections)])

    def end(self) -> None:
        for connection in self.connections:
            connection.end()


class Head:
    """This rank's columns of the teacher's output layer, piece by piece, each checked by its SHA-256.

    A layer that arrived as a whole is kept for good: a teacher that comes back, in whatever layout, has to have the
    same one, and sends none of it again. Guarded by the lock of `StudentConnections`, but for `receive`.
    """

    def __init__(self, columns: Shard) -> None:
        self._columns = columns
        self._missing: set[tuple[int, int]] = set()
        self._digests: dict[tuple[int, int], str] = {}
        self.weight: Tensor | None = None  # [columns.width, state size]

    @property
    def complete(self) -> bool:
        """Whether all of it has arrived, or the payload needs none."""
        return not self._missing

    def begin(self, session: StudentSession) -> None:
        """A new epoch: what an earlier one sent in part is forgotten, in memory that only its readers still see."""
        head = session.teacher.head
        if head is not None and (self.weight is None or self._missing):
            self.weight = torch.empty(self._columns.width, head.size, dtype=STATE_DTYPES[head.dtype])
            self._missing = {_key(piece) for piece in session.head_pieces.values()}
            self._digests = {}
        session.head_weight = self.weight

    def has(self, piece: Piece, digest: str) -> bool:
        """Whether these rows are here already; HandshakeRefused if they are, and are others."""
        if self._missing:
            return False
        if _key(piece) not in self._digests:  # the teacher came back in another layout
            self._digests[_key(piece)] = digest_of(self._rows(self.weight, piece))
        if self._digests[_key(piece)] != digest:
            raise HandshakeRefused(
                "the link is refused: the teacher came back with another output layer than before"
            )
        return True

    def receive(
        self, piece: Piece, header: Header, digest: str, session: StudentSession, connection: Connection
    ) -> None:
        """Takes in the rows that follow a header; LinkError if they are not what was announced."""
        size = session.teacher.head.size
        if (header.start, header.stop, header.number) != (piece.start, piece.stop, size):
            raise LinkError(f"its part {header.start}:{header.stop} of the output layer is not expected")
        if self.weight is session.head_weight and _key(piece) not in self._missing:
            raise LinkError(f"its part {header.start}:{header.stop} of the output layer was not asked for")
        rows = self._rows(session.head_weight, piece)
        connection.receive(rows)
        if digest_of(rows) != digest:
            raise LinkError("a part of the output layer arrived damaged: its SHA-256 differs")

    def arrived(self, piece: Piece, digest: str, session: StudentSession) -> None:
        """After `receive`."""
        if self.weight is session.head_weight:
            self._missing.discard(_key(piece))
            self._digests[_key(piece)] = digest

    def _rows(self, weight: Tensor, piece: Piece) -> Tensor:
        return weight[piece.start - self._columns.start : piece.stop - self._columns.start]


def _key(piece: Piece) -> tuple[int, int]:
    return piece.start, piece.stop
