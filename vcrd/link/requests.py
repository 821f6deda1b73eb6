"""The first rank of a teacher replica receives the requests from the request leaders of the student."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .connection import Connection, Header, Kind, check_shape
from .errors import LinkError, StudentLost
from .handshake import Handshake
from .plan import Place, check_boundaries
from .question import NO_CONTEXT, Context, check_context

_PARTING = 5.0  # seconds that sending the answer to a goodbye may take


@dataclass(frozen=True)
class Request:
    """A micro-batch to answer.

    Attributes:
        number: of the micro-batch within student data-parallel rank `data_rank`.
        tokens: int64 [b, s].
        boundaries: edges of the sequences that are packed into it, int64 from 0 to s; empty if it is not packed.
        context: what the teacher sees besides the tokens.
    """

    number: int
    data_rank: int
    tokens: Tensor
    boundaries: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    context: Context = NO_CONTEXT


class RequestReceiver:
    """Reads one connection per data-parallel rank of the student, each in a thread of its own.

    student: the handshake of the student. It limits the size of a request, and how many requests of a data-parallel
    rank may wait. failure: the first error, after which no more requests are read.
    """

    def __init__(self, student: Handshake, connections: dict[int, Connection]) -> None:
        self._student = student
        self._connections = connections
        self._changed = threading.Condition()
        self._queue: deque[Request] = deque()
        self._left: set[int] = set()
        self.failure: LinkError | None = None
        self._threads = [
            threading.Thread(target=self._read, args=item, name="vcrd-link-requests", daemon=True)
            for item in connections.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def all_left(self) -> bool:
        return len(self._left) == len(self._connections)

    def begin(self, seconds: float) -> None:
        """Tells every data-parallel rank that it may send requests."""
        for data_rank, connection in self._connections.items():
            try:
                connection.send(Header(Kind.READY), seconds=seconds)
            except (ConnectionError, TimeoutError):
                self._fail(StudentLost(f"{Place(data_rank, 0, 0)} closed its connection"))

    def take(self, limit: int, seconds: float) -> list[Request]:
        """Up to `limit` waiting requests of one shape. [] if none came within that time, the link has failed, or every
        data-parallel rank has left. The requests of a data-parallel rank stay in order."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self.failure or self.all_left, seconds)
            if self.failure or not self._queue:
                return []
            shape, passed_over = _shape(self._queue[0]), set()
            taken, kept = [], []
            for request in self._queue:
                fits = _shape(request) == shape and request.data_rank not in passed_over
                if fits and len(taken) < limit:
                    taken.append(request)
                else:
                    passed_over.add(request.data_rank)
                    kept.append(request)
            self._queue = deque(kept)
            return taken

    def end(self, seconds: float) -> None:
        """Closes every connection and waits for the threads."""
        with self._changed:
            self.failure = self.failure or LinkError("the link is closed")
        for connection in self._connections.values():
            connection.end()
        for thread in self._threads:
            thread.join(seconds)

    def _read(self, data_rank: int, connection: Connection) -> None:
        who = Place(data_rank, 0, 0)
        try:
            while (header := connection.receive_header()).kind != Kind.GOODBYE:
                self._take_in(data_rank, header, connection)
            self._say_goodbye(data_rank, connection)
        except (ConnectionError, TimeoutError):
            self._fail(StudentLost(f"{who} closed its connection"))
        except LinkError as error:
            self._fail(StudentLost(f"{who} sent a request that is refused: {error}"))
        except Exception as error:  # next_batch raises every error
            self._fail(LinkError(f"a request of {who} could not be taken in: {error!r}"))
        finally:
            connection.close()

    def _take_in(self, data_rank: int, header: Header, connection: Connection) -> None:
        if header.kind != Kind.REQUEST:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
        check_shape(header, self._student.sequence_length, self._student.max_tokens)
        sequences = max(header.batch, header.boundaries - 1)
        most = self._student.max_tokens - header.tokens
        if header.context > min(most, sequences * self._student.teacher_context_length):
            raise LinkError(f"its context of {header.context} tokens is longer than agreed")
        with self._changed:
            if sum(request.data_rank == data_rank for request in self._queue) >= self._student.credits:
                raise LinkError(f"more requests than its {self._student.credits} credits are waiting")
        tokens = torch.empty(header.batch, header.sequence, dtype=torch.int32)
        boundaries = torch.empty(header.boundaries, dtype=torch.int32)
        context = Context(*(torch.empty(header.context, dtype=torch.int32) for _ in Context._fields))
        connection.receive(tokens, boundaries, *context)
        low, high = (int(edge) for edge in tokens.aminmax())
        if low < 0 or high >= self._student.vocab_size:
            raise LinkError(f"its tokens reach from {low} to {high}, outside [0, {self._student.vocab_size})")
        try:
            longest = self._student.sequence_length
            check_boundaries(header.sequence, boundaries.tolist(), self._student.context_size, longest)
            check_context(
                context,
                header.batch,
                header.sequence,
                boundaries.tolist(),
                vocab_size=self._student.vocab_size,
                longest=self._student.teacher_context_length,
                most=self._student.max_tokens,
            )
        except ValueError as error:
            raise LinkError(f"its {error}") from None
        with self._changed:
            context = Context(*(part.long() for part in context))
            self._queue.append(Request(header.number, data_rank, tokens.long(), boundaries.long(), context))
            self._changed.notify_all()

    def _say_goodbye(self, data_rank: int, connection: Connection) -> None:
        with self._changed:
            self._left.add(data_rank)
            self._queue = deque(request for request in self._queue if request.data_rank != data_rank)
            self._changed.notify_all()
        connection.send(Header(Kind.GOODBYE), seconds=_PARTING)

    def _fail(self, error: LinkError) -> None:
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()


def _shape(request: Request) -> tuple[int, int, int]:
    """What is equal for all requests of one batch, which the ranks of the replica share and compute together. Their
    contexts may differ."""
    return (*request.tokens.shape, len(request.boundaries))
