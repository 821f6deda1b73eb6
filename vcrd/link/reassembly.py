"""The responses of one student rank while their pieces arrive: memory and order, no network."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from .connection import Header, check_shape
from .errors import LinkError
from .handshake import Handshake
from .payload import Payload
from .plan import Piece, Place
from .tracing import span
from .transport import Arrived, Transport


@dataclass
class _Response:
    shape: tuple[int, int]  # (s, b) of the whole micro-batch
    tensors: list[Tensor]  # while pieces arrive
    missing: int  # pieces that have not arrived
    arrived: Arrived | None = None  # once all pieces have arrived


class Reassembly:
    """Assembles responses in the order of their numbers, for one epoch of the teacher after another.

    handshake: the handshake of the student, which limits what a header may say. The request leader accepts the
    responses that it has requested. The other ranks accept those that the credits allow it to request. place: the rank
    whose columns and positions these are.
    All methods are safe to call from several threads. `changed` is notified of every piece.
    """

    def __init__(
        self,
        handshake: Handshake,
        place: Place,
        changed: threading.Condition,
    ) -> None:
        self._columns = handshake.shards()[place.tensor]
        self._handshake = handshake
        self._is_request_leader = place.is_request_leader
        self._changed = changed
        self._expected: dict[int, tuple[int, int]] = {}  # requested shapes, on the request leader
        self._responses: dict[int, _Response] = {}
        self._epoch = 0
        self._pieces: dict[int, Piece] = {}
        self._next: dict[int, int] = {}  # by sender: the number of its next response
        self.complete = 0  # responses below this number are complete here
        self._arriving = 0  # threads that are receiving now
        self._arriving_since = 0.0
        self._arrived_seconds = 0.0

    def begin(self, epoch: int, pieces: dict[int, Piece]) -> None:
        """Begins an epoch, in which sender i sends pieces[i]. Unfinished responses of an earlier epoch are dropped."""
        with self._changed:
            self._epoch = epoch
            self._pieces = pieces
            self._next = dict.fromkeys(pieces, self.complete)
            self._responses = {n: r for n, r in self._responses.items() if n < self.complete}

    def expect(self, number: int, shape: tuple[int, int]) -> None:
        """This rank is about to request micro-batch `number` of shape (s, b)."""
        with self._changed:
            if number >= self.complete:  # else another rank lacks it
                self._expected[number] = shape

    def take(self, number: int) -> Arrived | None:
        """The payload of a complete response, which is removed here; None if it is not complete."""
        with self._changed:
            if number >= self.complete or number not in self._responses:
                return None
            self._expected.pop(number, None)
            return self._responses.pop(number).arrived

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A context in which something arrives from the teacher. `seconds_arriving` counts its time."""
        with self._changed:
            if not self._arriving:
                self._arriving_since = time.perf_counter()
            self._arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self._arriving -= 1
                if not self._arriving:
                    self._arrived_seconds += time.perf_counter() - self._arriving_since

    @property
    def seconds_arriving(self) -> float:
        """For how long so far something was arriving: from a header to the last byte of its message."""
        with self._changed:
            under_way = time.perf_counter() - self._arriving_since if self._arriving else 0.0
            return self._arrived_seconds + under_way

    def receive_piece(
        self, epoch: int, sender: int, header: Header, payload: Payload, transport: Transport
    ) -> bool:
        """Receives the piece that follows a header. Whether further responses are complete now.

        transport: that of the sender; all senders of an epoch have the same kind. LinkError if the header is wrong,
        ConnectionError if its epoch has ended.
        """
        with self._changed:
            self._check_epoch(epoch)
            piece = self._checked(sender, header, payload)
            response = self._response(header, payload, transport)
            columns = None  # all of them
            if not payload.whole and piece.width != self._columns.width:
                columns = slice(piece.start - self._columns.start, piece.stop - self._columns.start)
        with span("receive", header.number), self.arriving():
            transport.receive(response.tensors, columns)
        with self._changed:
            self._check_epoch(epoch)
            self._next[sender] += 1
            response.missing -= 1
            if response.missing:
                self._changed.notify_all()
                return False
        # The copy to the device begins while other threads compute.
        arrived = transport.arrived(response.tensors)
        with self._changed:
            self._check_epoch(epoch)
            response.arrived, response.tensors = arrived, []
            before = self.complete
            # Several threads may arrive here in another order than that of their responses.
            while (following := self._responses.get(self.complete)) and following.arrived:
                self.complete += 1
            self._changed.notify_all()
            return self.complete > before

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise ConnectionError(f"epoch {epoch} is over")

    def _checked(self, sender: int, header: Header, payload: Payload) -> Piece:
        piece = self._pieces.get(sender)
        if piece is None:
            raise LinkError("a response from there is not expected")
        check_shape(header, self._handshake.sequence_length, self._handshake.max_tokens)
        parts = 2 * self._handshake.context_size
        if parts > 2 and header.sequence % parts:
            raise LinkError(f"its sequence length {header.sequence} is not a multiple of {parts}")
        if (header.start, header.stop) != (piece.start, piece.stop):
            raise LinkError(f"its columns {header.start}:{header.stop} are not {piece.start}:{piece.stop}")
        if header.payload != payload.code:
            raise LinkError(f"its payload code {header.payload} is not {payload.code}")
        if header.number != self._next[sender]:
            raise LinkError(f"its number {header.number} is not the next one, {self._next[sender]}")
        unasked = self._is_request_leader and header.number not in self._expected
        if unasked or header.number >= self.complete + self._handshake.credits:
            raise LinkError(f"its number {header.number} has not been asked for")
        return piece

    def _response(self, header: Header, payload: Payload, transport: Transport) -> _Response:
        shape = (header.sequence, header.batch)
        response = self._responses.get(header.number)
        wanted = response.shape if response else self._expected.get(header.number, shape)
        if shape != wanted:
            raise LinkError(f"its shape {shape} is not {wanted}, which was asked for")
        if response is None:
            local = header.sequence // self._handshake.context_size
            tensors = payload.blank(local, header.batch, self._columns.width, transport.empty)
            response = self._responses[header.number] = _Response(shape, tensors, len(self._pieces))
        return response
