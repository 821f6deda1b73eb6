"""The teacher rank's receiving half: requests come in, and students say goodbye, in background threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .channel import Channel, Listeners, Tag
from .errors import LinkError, StudentLost
from .header import Header, Kind, check_shape
from .plan import Roster


@dataclass(frozen=True)
class Request:
    """A micro-batch to answer: its number within student data rank `data_rank`; tokens int64 [b, s]."""

    number: int
    data_rank: int
    tokens: Tensor


class Intake:
    """Listens to every student rank of a teacher replica. Every linked teacher rank has one, so that each
    learns at once who has left and who is lost; requests come only to the rank that the roster calls the
    intake.

    vocab_size, sequence_length, max_tokens: what a request may hold. credits: how many may wait per data
    rank.
    """

    def __init__(
        self,
        channel: Channel,
        roster: Roster,
        vocab_size: int,
        sequence_length: int,
        max_tokens: int,
        credits: int,
    ) -> None:
        self._channel = channel
        self._roster = roster
        self._vocab_size = vocab_size
        self._sequence_length = sequence_length
        self._max_tokens = max_tokens
        self._credits = credits
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._left: set[int] = set()
        self._acknowledged: list[dist.Work] = []
        self._failure: LinkError | None = None
        self._listeners = Listeners(channel, roster.students, self._handle, self._lost)
        self._listeners.start()

    @property
    def failure(self) -> LinkError | None:
        return self._failure

    def fail(self, error: LinkError) -> None:
        """Ends the link; the first reason stays."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def take(self, limit: int, seconds: float) -> list[Request] | None:
        """Up to `limit` waiting requests of one shape; [] if none came within that time or the link failed;
        None when every student has left. No request overtakes an earlier one of its own data rank."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._failure or self._all_left(), seconds)
            if self._failure or not self._queue:
                return None if self._all_left() and not self._failure else []
            shape, passed_over = self._queue[0].tokens.shape, set()
            taken, kept = [], []
            for request in self._queue:
                fits = request.tokens.shape == shape and request.data_rank not in passed_over
                if fits and len(taken) < limit:
                    taken.append(request)
                else:
                    passed_over.add(request.data_rank)
                    kept.append(request)
            self._queue = deque(kept)
            return taken

    @contextmanager
    def listening(self, student: int) -> Iterator[bool]:
        """Whether a student has not said goodbye; stays true while in here, and only then may it be sent
        anything.

        After the returned goodbye no one reads any more, so nothing may be posted past it.
        """
        with self._changed:
            yield student not in self._left

    def finish(self, seconds: float) -> None:
        """Lets the returned goodbyes go out, closes, and ends the listeners. Bounded."""
        if self._failure is None:
            for work in self._acknowledged:
                try:
                    self._channel.complete(work, seconds)
                except (ConnectionError, TimeoutError):
                    pass  # that student is gone already
        self._acknowledged.clear()
        self.abort()
        self._listeners.join(seconds)

    def abort(self) -> None:
        """Closes at once. Never blocks."""
        self.fail(LinkError("the link is closed"))
        self._channel.close()

    def drop(self) -> None:
        """What is left to do for a link that was forgotten, or at the interpreter's end."""
        self.abort()
        self._listeners.join(1.0)

    def _all_left(self) -> bool:
        return len(self._left) == len(self._roster.students)

    def _handle(self, student: int, header: Header) -> bool:
        if header.kind == Kind.GOODBYE:
            self._part_from(student)
            return False
        data_rank, tensor_rank = self._roster.seat(student)
        if header.kind != Kind.REQUEST or tensor_rank or self._channel.rank != self._roster.intake:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
        check_shape(header, self._sequence_length, self._max_tokens)
        with self._changed:
            if sum(request.data_rank == data_rank for request in self._queue) >= self._credits:
                raise LinkError(f"more requests than its {self._credits} credits are waiting")
        tokens = torch.empty(header.batch, header.sequence, dtype=torch.int32)
        self._channel.receive(tokens, student, Tag.TOKENS)
        low, high = (int(edge) for edge in tokens.aminmax())
        if low < 0 or high >= self._vocab_size:
            raise LinkError(f"its tokens reach from {low} to {high}, outside [0, {self._vocab_size})")
        with self._changed:
            self._queue.append(Request(header.number, data_rank, tokens.long()))
            self._changed.notify_all()
        return True

    def _part_from(self, student: int) -> None:
        data_rank, tensor_rank = self._roster.seat(student)
        with self._changed:
            self._left.add(student)
            if tensor_rank == 0:
                self._queue = deque(request for request in self._queue if request.data_rank != data_rank)
            self._acknowledged.append(self._channel.post_header(Header(Kind.GOODBYE), student))
            self._changed.notify_all()

    def _lost(self, student: int, reason: str) -> None:
        self.fail(StudentLost(f"{self._roster.describe(student)} {reason}"))
