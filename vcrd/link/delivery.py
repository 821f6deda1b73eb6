"""The sending half of a teacher rank of the last stage: one connection to each student rank that it serves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from torch import Tensor

from .connection import Connection
from .errors import LinkError, StudentLost
from .header import Header, Kind
from .plan import Place
from .staging import Staged
from .tracing import span

_UNDER_WAY = 4  # responses, each of which holds its encoded copy


class Delivery:
    """Sends in the background, in the order of posting, with a writer and a reader per student rank.

    firsts: by place, the number below which it needs no response. timeout: seconds in which a student must take
    something of what is next for it; a slow network that moves is never taken for a lost student.
    """

    def __init__(
        self, connections: dict[Place, Connection], firsts: dict[Place, int], timeout: float
    ) -> None:
        self._firsts = firsts
        self._room = threading.Semaphore(_UNDER_WAY)
        self._lock = threading.Lock()
        self._failure: LinkError | None = None
        self._writers = {place: _Writer(place, c, timeout, self._fail) for place, c in connections.items()}

    @property
    def failure(self) -> LinkError | None:
        return self._failure

    @property
    def bytes_sent(self) -> int:
        return sum(writer.connection.sent for writer in self._writers.values())

    def wants(self, place: Place, number: int) -> bool:
        """Whether a student rank is still there and lacks this response."""
        return number >= self._firsts[place] and not self._writers[place].left

    def wait_for_room(self) -> None:
        """Blocks while as many responses are under way as may be. Returns soon on a link that failed."""
        self._room.acquire()

    def post(self, response: Sequence[tuple[Place, Header, Sequence[Staged]]]) -> None:
        """All pieces of one response that this rank sends; after `wait_for_room`."""
        remaining = _Countdown(len(response), self._room.release)
        for place, header, parts in response:
            self._writers[place].put(header, parts, remaining)

    def send_head(self, place: Place, header: Header, rows: Tensor) -> None:
        """Rows of the output layer, ahead of all responses."""
        self._writers[place].put(header, [Staged(rows)], _Countdown(1, lambda: None))

    def finish(self, seconds: float) -> None:
        """Waits, at most that long, until every student has said goodbye, then closes."""
        for writer in self._writers.values():
            writer.join(seconds)
        self.end(seconds)

    def end(self, seconds: float) -> None:
        """Closes every connection at once and waits for the threads."""
        self._fail(LinkError("the link is closed"))
        for writer in self._writers.values():
            writer.end()
        for writer in self._writers.values():
            writer.join(seconds)

    def _fail(self, error: LinkError) -> None:
        with self._lock:
            self._failure = self._failure or error


class _Countdown:
    def __init__(self, count: int, done) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._done = done
        if not count:
            done()

    def one(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count:
                return
        self._done()


class _Writer:
    """One connection: a thread that sends what was put, and a thread that hears the student's goodbye or its end."""

    def __init__(self, place: Place, connection: Connection, timeout: float, fail) -> None:
        self.connection = connection
        self.left = False  # it has said goodbye, and reads nothing that was not under way
        self._place = place
        self._timeout = timeout
        self._fail = fail
        self._broken = False
        self._lock = threading.Lock()
        self._over = False  # nothing is sent any more
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="vcrd-link-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="vcrd-link-reader", daemon=True)
        self._sender.start()
        self._reader.start()

    def put(self, header: Header, parts: Sequence[Staged], countdown: _Countdown) -> None:
        with self._lock:
            if not self._over:
                self._queue.put((header, parts, countdown))
                return
        countdown.one()

    def end(self) -> None:
        self._broken = True
        self.connection.end()
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        self._reader.join(seconds)

    def _send(self) -> None:
        while (item := self._queue.get()) is not None:
            header, parts, countdown = item
            if not (self.left or self._broken):
                self._send_one(header, parts)
            del item, parts  # with them go the encoded copies
            countdown.one()
        with self._lock:
            self._over = True
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                item[2].one()

    def _send_one(self, header: Header, parts: Sequence[Staged]) -> None:
        try:
            with span("send", header.number):
                self.connection.send(header, *(part.ready() for part in parts), seconds=self._timeout)
        except ConnectionError:
            self._lose("closed its connection")
        except TimeoutError as error:
            self._lose(str(error))
        except (
            Exception
        ) as error:  # whatever it is, a thread that ended unheard would block all that is posted
            self._broken = True
            self._fail(LinkError(f"an answer to {self._place} could not be sent: {error!r}"))
            self.connection.end()

    def _read(self) -> None:
        try:
            header = self.connection.receive_header()
            if header.kind != Kind.GOODBYE:
                raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
            self.left = True
            self._queue.put(None)
            self._sender.join()  # the student drains what is under way
            self.connection.send(Header(Kind.GOODBYE), seconds=self._timeout)
        except (ConnectionError, TimeoutError):
            self._lose("closed its connection")
        except LinkError as error:
            self._lose(f"sent a header that is refused: {error}")
        finally:
            self._queue.put(None)
            self._sender.join()
            self.connection.close()

    def _lose(self, how: str) -> None:
        if not (self._broken or self.left):
            self._broken = True
            self._fail(StudentLost(f"{self._place} {how}"))
            self.connection.end()
