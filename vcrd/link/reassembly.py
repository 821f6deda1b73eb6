"""The responses to one student rank while their pieces arrive: memory and order, no network."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .errors import LinkError
from .handshake import Handshake
from .header import Header, check_shape
from .payload import Payload
from .plan import Piece, Place
from .tracing import span
from .transport import Arrived, Destination, Transport


class _Response:
    def __init__(self, shape: tuple[int, int], tensors: list[Tensor], missing: int) -> None:
        self.shape = shape  # of the whole micro-batch, (s, b)
        self.tensors = tensors  # while they arrive
        self.missing = missing  # pieces
        self.arrived: Arrived | None = None  # once they are all here


class Reassembly:
    """Assembles responses, in number order, for one epoch of the teacher after another.

    handshake: the student's, which says what a header may hold at most. The rank that asks accepts what it asked for,
    the others what it may have asked for by its credits. place: whose columns and positions these are.
    All methods are safe to call from several threads; `changed` is notified of every piece.
    """

    def __init__(
        self,
        handshake: Handshake,
        place: Place,
        changed: threading.Condition,
    ) -> None:
        self._columns = handshake.shards()[place.tensor]
        self._handshake = handshake
        self._asks = place.asks
        self._changed = changed
        self._expected: dict[int, tuple[int, int]] = {}  # shapes asked for, on the rank that asks
        self._responses: dict[int, _Response] = {}
        self._epoch = 0
        self._pieces: dict[int, Piece] = {}
        self._next: dict[int, int] = {}  # by sender: the number that must come next
        self.complete = 0  # responses below this number are complete here
        self._arriving = 0  # threads in the middle of something that arrives
        self._arriving_since = 0.0
        self._arrived_seconds = 0.0

    def begin(self, epoch: int, pieces: dict[int, Piece]) -> None:
        """A new epoch, whose sender i sends pieces[i]: what an earlier one left unfinished is forgotten."""
        with self._changed:
            self._epoch = epoch
            self._pieces = pieces
            self._next = dict.fromkeys(pieces, self.complete)
            self._responses = {n: r for n, r in self._responses.items() if n < self.complete}

    def expect(self, number: int, shape: tuple[int, int]) -> None:
        """This rank asked for micro-batch `number` of shape (s, b)."""
        with self._changed:
            if number >= self.complete:  # else asked again for another rank
                self._expected[number] = shape

    def take(self, number: int) -> Arrived | None:
        """The payload of a complete response, which is forgotten here; None if it is not complete."""
        with self._changed:
            if number >= self.complete or number not in self._responses:
                return None
            self._expected.pop(number, None)
            return self._responses.pop(number).arrived

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Around whatever arrives from the teacher: what `seconds_arriving` counts."""
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
        """How long, up to now, anything was on its way in: from a header to the last byte that belongs to it."""
        with self._changed:
            under_way = time.perf_counter() - self._arriving_since if self._arriving else 0.0
            return self._arrived_seconds + under_way

    def place(self, epoch: int, sender: int, header: Header, payload: Payload, transport: Transport) -> bool:
        """Takes in the piece that follows a header; whether that completed its response, or a later one too.

        transport: how the piece comes; the same for all senders of an epoch. LinkError if the piece may not come now,
        ConnectionError if its epoch is over.
        """
        with self._changed:
            self._check_epoch(epoch)
            piece = self._checked(sender, header, payload)
            response = self._response(header, payload, transport)
        with span("receive", header.number), self.arriving():
            transport.receive(self._destinations(response.tensors, piece, payload))
        with self._changed:
            self._check_epoch(epoch)
            self._next[sender] += 1
            response.missing -= 1
            if response.missing:
                self._changed.notify_all()
                return False
        arrived = transport.arrived(response.tensors)  # on its way to the device while others compute
        with self._changed:
            self._check_epoch(epoch)
            response.arrived, response.tensors = arrived, []
            before = self.complete
            # Several threads may get here in another order than that of their responses.
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
        unasked = self._asks and header.number not in self._expected
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

    def _destinations(self, tensors: list[Tensor], piece: Piece, payload: Payload) -> list[Destination]:
        if payload.whole or piece.width == self._columns.width:
            return [Destination(tensor) for tensor in tensors]
        first = self._columns.start
        return [Destination(tensor, slice(piece.start - first, piece.stop - first)) for tensor in tensors]
