"""The student rank's receiving half: responses come in ahead, in background threads, piece by piece."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from .channel import Channel, Listeners, Tag
from .errors import LinkError, TeacherLost
from .header import Header, Kind, check_shape
from .payload import Payload, decode
from .plan import Piece, Roster, Shard


class _Response:
    """The answer to one micro-batch while its pieces arrive."""

    def __init__(self, shape: tuple[int, int], width: int, payload: Payload, pieces: int) -> None:
        self.shape = shape
        self.wire = torch.empty(*shape, width, dtype=payload.dtype)
        self.missing = pieces


class Inbox:
    """Assembles the responses to one student rank.

    columns: what this rank holds. pieces: what it gets of every response. sequence_length, max_tokens: what a
    header may say at most. Holds no more than what was asked for: credits bound it from the asking side.
    """

    def __init__(
        self,
        channel: Channel,
        roster: Roster,
        columns: Shard,
        pieces: Sequence[Piece],
        payload: Payload,
        sequence_length: int,
        max_tokens: int,
    ) -> None:
        self.bytes_received = 0
        self._channel = channel
        self._roster = roster
        self._columns = columns
        self._pieces = {roster.sender(piece.sender): piece for piece in pieces}
        self._payload = payload
        self._sequence_length = sequence_length
        self._max_tokens = max_tokens
        self._changed = threading.Condition()
        self._expected: dict[int, tuple[int, int]] = {}  # shapes asked for, on the rank that asks
        self._next = dict.fromkeys(self._pieces, 0)  # by sender: the number that must come next
        self._responses: dict[int, _Response] = {}
        self._failure: LinkError | None = None
        self._listeners = Listeners(channel, roster.teachers, self._handle, self._lost)
        self._listeners.start()

    def expect(self, number: int, shape: tuple[int, int]) -> None:
        """This rank asked for micro-batch `number` of shape (s, b)."""
        with self._changed:
            self._expected[number] = shape

    def check(self) -> None:
        """Raises what ended the link, if anything did."""
        with self._changed:
            if self._failure:
                raise self._failure

    def fail(self, error: LinkError) -> None:
        """Ends the link; the first reason stays."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def take(self, number: int, seconds: float) -> Tensor:
        """The logits [s, b, width] of a micro-batch. What has arrived is given out even after a failure."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._failure or self._complete(number), seconds)
            if self._complete(number):
                self._expected.pop(number, None)
                return decode(self._payload, self._responses.pop(number).wire)
            if not arrived:
                self.fail(
                    TeacherLost(f"the teacher did not answer micro-batch {number} within {seconds:g} seconds")
                )
            raise self._failure

    def finish(self, seconds: float) -> None:
        """Says goodbye, drains what still comes until the teacher says it too, and closes. Bounded."""
        deadline = time.monotonic() + seconds
        if self._failure is None:
            try:
                goodbye = Header(Kind.GOODBYE)
                works = [self._channel.post_header(goodbye, peer) for peer in self._roster.teachers]
                self._listeners.join(deadline - time.monotonic())
                works.clear()  # not earlier: a send whose Work is gone is cut off midway
            except ConnectionError:
                pass  # nobody is left to part from
        self.abort()
        self._listeners.join(deadline - time.monotonic())

    def abort(self) -> None:
        """Closes without a goodbye. Never blocks."""
        self.fail(LinkError("the link is closed"))
        self._channel.close()

    def drop(self) -> None:
        """What is left to do for a link that was forgotten, or at the interpreter's end."""
        self.abort()
        self._listeners.join(1.0)

    def _complete(self, number: int) -> bool:
        return number in self._responses and not self._responses[number].missing

    def _handle(self, peer: int, header: Header) -> bool:
        if header.kind == Kind.GOODBYE:
            return False
        piece = self._checked(peer, header)
        response = self._response(header)
        if piece.width:
            self._receive(peer, piece, response.wire)
        with self._changed:
            self._next[peer] += 1
            response.missing -= 1
            self.bytes_received += header.tokens * piece.width * self._payload.itemsize
            self._changed.notify_all()
        return True

    def _checked(self, peer: int, header: Header) -> Piece:
        piece = self._pieces.get(peer)
        if header.kind != Kind.RESPONSE or piece is None:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
        check_shape(header, self._sequence_length, self._max_tokens)
        if (header.start, header.stop) != (piece.start, piece.stop):
            raise LinkError(f"its columns {header.start}:{header.stop} are not {piece.start}:{piece.stop}")
        if header.payload != self._payload.code:
            raise LinkError(f"its payload code {header.payload} is not {self._payload.code}")
        if header.number != self._next[peer]:
            raise LinkError(f"its number {header.number} is not the next one, {self._next[peer]}")
        return piece

    def _response(self, header: Header) -> _Response:
        shape = (header.sequence, header.batch)
        with self._changed:
            if self._expected.get(header.number, shape) != shape:
                raise LinkError(
                    f"its shape {shape} is not {self._expected[header.number]}, which was asked for"
                )
            if header.number not in self._responses:
                new = _Response(shape, self._columns.width, self._payload, len(self._pieces))
                self._responses[header.number] = new
            response = self._responses[header.number]
        if response.shape != shape:
            raise LinkError(f"its shape {shape} is not {response.shape}, that of the other pieces")
        return response

    def _receive(self, peer: int, piece: Piece, wire: Tensor) -> None:
        if piece.width == self._columns.width:
            self._channel.receive(wire, peer, Tag.PAYLOAD)
            return
        part = torch.empty(*wire.shape[:-1], piece.width, dtype=wire.dtype)
        self._channel.receive(part, peer, Tag.PAYLOAD)
        wire[..., piece.start - self._columns.start : piece.stop - self._columns.start].copy_(part)

    def _lost(self, peer: int, reason: str) -> None:
        self.fail(TeacherLost(f"{self._roster.describe(peer)} {reason}"))
