"""The sending half of a teacher rank of the last stage: one connection to each student rank that it serves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from .connection import Connection
from .errors import LinkError, StudentLost
from .header import Header, Kind
from .plan import Place
from .tracing import span
from .transport import Endpoint, Outgoing, Sender

_UNDER_WAY = 4  # responses, each of which holds its encoded copy
_LOOK = 1.0  # seconds between two looks at a transport on which nothing travels


class ResponseSender:
    """Sends in the background, in the order of posting, with a writer and a reader per student rank.

    firsts: by place, the number below which it needs no response. timeout: seconds in which a student must take
    something of what is next for it; a slow network that moves is never taken for a lost student.
    Used in this order: `open` until it succeeds, `begin`, then the rest.
    """

    def __init__(
        self,
        connections: dict[Place, Connection],
        firsts: dict[Place, int],
        timeout: float,
        endpoint: Endpoint,
    ) -> None:
        self._firsts = firsts
        self._room = threading.Semaphore(_UNDER_WAY)
        self._lock = threading.Lock()
        self._failure: LinkError | None = None
        self._writers = {
            place: _Writer(place, Sender(connection, endpoint), timeout, self._fail)
            for place, connection in connections.items()
        }

    @property
    def failure(self) -> LinkError | None:
        return self._failure

    @property
    def bytes_sent(self) -> int:
        return sum(writer.connection.sent for writer in self._writers.values())

    def open(self, transport: str, reason: str = "") -> str:
        """Makes the transport of every pair: "" or why the first that could not be made was not.

        reason: why it is not another one. StudentLost where a student is gone, LinkError where it answers nonsense.
        """
        coming = [
            (place, writer.do(lambda sender: sender.open(transport, reason)))
            for place, writer in self._writers.items()
        ]
        return next((f"{place}: {why}" for place, why in _results(coming) if why), "")

    def refuse(self, reason: str) -> None:
        """Tells every student that there is no transport, and why."""
        _results(
            [
                (place, writer.do(lambda sender: sender.refuse(reason)))
                for place, writer in self._writers.items()
            ]
        )

    def begin(self) -> None:
        """From now on the students may say goodbye."""
        for writer in self._writers.values():
            writer.begin()

    def wants(self, place: Place, number: int) -> bool:
        """Whether a student rank is still there and lacks this response."""
        return number >= self._firsts[place] and not self._writers[place].left

    def stage(self, place: Place, tensor: Tensor) -> Outgoing:
        """Takes a tensor of the current stream on its way to a student rank; nobody changes it any more."""
        return self._writers[place].stage(tensor)

    def wait_for_room(self) -> None:
        """Blocks while as many responses are under way as may be. Returns soon on a link that failed."""
        self._room.acquire()

    def post(self, response: Sequence[tuple[Place, Header, Sequence[Outgoing]]]) -> None:
        """All pieces of one response that this rank sends; after `wait_for_room`."""
        remaining = _Countdown(len(response), self._room.release)
        for place, header, parts in response:
            self._writers[place].send(header, parts, remaining)

    def send_head(self, place: Place, header: Header, rows: Tensor) -> None:
        """Rows of the output layer, on the CPU, ahead of all responses; over the connection itself."""
        self._writers[place].send_bytes(header, rows)

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


def _results(coming: list[tuple[Place, Future]]) -> list[tuple[Place, str]]:
    """Of all of them, in order, before the first error is raised: none is left in the middle of something."""
    results: list[tuple[Place, str]] = []
    failure: LinkError | None = None
    for place, future in coming:
        try:
            results.append((place, future.result()))
        except ConnectionError as error:
            failure = failure or StudentLost(f"{place} closed its connection ({error})")
        except TimeoutError as error:
            failure = failure or StudentLost(f"{place} {error}")
        except LinkError as error:
            failure = failure or StudentLost(f"{place} sent a header that is refused: {error}")
    if failure:
        raise failure
    return results


class _Countdown:
    def __init__(self, count: int, done: Callable[[], None]) -> None:
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
    """One connection: a thread that owns the transport and does what was put, and, from `begin` on, a thread that hears
    the student's goodbye or its end."""

    def __init__(
        self, place: Place, sender: Sender, timeout: float, fail: Callable[[LinkError], None]
    ) -> None:
        self.connection = sender.connection
        self.left = False  # it has said goodbye, and reads nothing that was not under way
        self._place = place
        self._sender = sender
        self._timeout = timeout
        self._fail = fail
        self._broken = False
        self._lock = threading.Lock()
        self._over = False  # nothing is sent any more
        self._all_sent = threading.Event()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._owner = threading.Thread(target=self._run, name="vcrd-link-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="vcrd-link-reader", daemon=True)
        self._owner.start()

    def do(self, task: Callable[[Sender], str]) -> Future:
        """Runs it in the thread that owns the transport; before `begin`."""
        future: Future = Future()
        self._put((lambda: _run_into(future, task, self._sender), future.cancel))
        return future

    def begin(self) -> None:
        self._reader.start()

    def stage(self, tensor: Tensor) -> Outgoing:
        return self._sender.transport.stage(tensor)

    def send(self, header: Header, parts: Sequence[Outgoing], countdown: _Countdown) -> None:
        def work() -> None:
            if not (self.left or self._broken):
                self._send(header, lambda: self._sender.transport.send(header, parts, seconds=self._timeout))

        self._put((work, countdown.one))

    def send_bytes(self, header: Header, rows: Tensor) -> None:
        def work() -> None:
            if not (self.left or self._broken):
                self._send(header, lambda: self.connection.send(header, rows, seconds=self._timeout))

        self._put((work, lambda: None))

    def end(self) -> None:
        self._broken = True
        self.connection.end()
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        if self._reader.ident is None:  # it never began
            self.end()
        else:
            self._reader.join(seconds)
        self._owner.join(seconds)

    def _put(self, item: tuple[Callable[[], None], Callable[[], object]]) -> None:
        """Work, and what is called when it is done or will not be done."""
        with self._lock:
            if not self._over:
                self._queue.put(item)
                return
        item[1]()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            work, done = item
            work()
            del item, work  # with them go the encoded copies
            done()
        with self._lock:
            self._over = True
        while not self._queue.empty():
            if (item := self._queue.get()) is not None:
                item[1]()
        self._all_sent.set()
        if self._reader.ident is not None:
            self._reader.join()
        self._sender.close()

    def _next(self) -> tuple[Callable[[], None], Callable[[], object]] | None:
        while True:
            try:
                return self._queue.get(timeout=_LOOK)
            except queue.Empty:
                pass
            try:
                if not self._broken:
                    self._sender.check()
            except ConnectionError as error:
                self._lose(f"cannot be sent to: {error}")

    def _send(self, header: Header, send: Callable[[], None]) -> None:
        try:
            with span("send", header.number):
                send()
        except ConnectionError as error:
            self._lose("closed its connection" if self.connection.is_over else f"cannot be sent to: {error}")
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
            self._all_sent.wait()  # the student drains what is under way
            self.connection.send(Header(Kind.GOODBYE), seconds=self._timeout)
            self._hear_the_end()
        except (ConnectionError, TimeoutError):
            self._lose("closed its connection")
        except LinkError as error:
            self._lose(f"sent a header that is refused: {error}")
        finally:
            self._queue.put(None)

    def _hear_the_end(self) -> None:
        """What this end has sent may still be on its way into the student; that closes when it has everything."""
        try:
            self.connection.receive_header()
        except (ConnectionError, LinkError):
            pass

    def _lose(self, how: str) -> None:
        if not (self._broken or self.left):
            self._broken = True
            self._fail(StudentLost(f"{self._place} {how}"))
            self.connection.end()


def _run_into(future: Future, task: Callable[[Sender], str], sender: Sender) -> None:
    try:
        future.set_result(task(sender))
    except BaseException as error:
        future.set_exception(error)
