"""A teacher rank of the last stage sends its responses: one connection to each student rank that it serves."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from .connection import Connection, Header, Kind
from .errors import LinkError, StudentLost
from .plan import Place
from .tracing import span
from .transport.opening import Endpoint, Sender

_UNDER_WAY = 4  # responses at once, each of which holds its encoded tensors
_LOOK = 1.0  # seconds between two checks of a transport on which nothing travels


class ResponseSender:
    """Sends in the background, in the order of `post`, with a writer thread and a reader thread per student rank.

    firsts: for each place, the number below which it needs no response. timeout: a student that receives nothing for so
    many seconds, while something is being sent to it, is lost. A slow network that moves bytes never loses a student.
    room: acquired before a response is encoded, released when all of its pieces have been sent or dropped. It limits
    the responses under way. failure: the first error.
    The order of use: `open` until it succeeds, `begin`, then the other methods.
    """

    def __init__(
        self,
        connections: dict[Place, Connection],
        firsts: dict[Place, int],
        timeout: float,
        endpoint: Endpoint,
    ) -> None:
        self._firsts = firsts
        self.room = threading.Semaphore(_UNDER_WAY)
        self.failure: LinkError | None = None
        self._lock = threading.Lock()
        self._writers = {
            place: _Writer(place, Sender(connection, endpoint), timeout, self._fail)
            for place, connection in connections.items()
        }

    @property
    def bytes_sent(self) -> int:
        return sum(writer.connection.sent for writer in self._writers.values())

    def open(self, transport: str, reason: str = "") -> str:
        """Makes the transport of every pair. "", or the reason of the first pair that could not make it.

        reason: why it is not another transport. StudentLost where a student is gone or sends invalid data.
        """
        coming = [
            (place, writer.do(lambda sender: sender.open(transport, reason)))
            for place, writer in self._writers.items()
        ]
        return next((f"{place}: {why}" for place, why in _results(coming) if why), "")

    def refuse(self, reason: str) -> None:
        """Tells every student rank that there is no transport, and why."""
        _results(
            [
                (place, writer.do(lambda sender: sender.refuse(reason)))
                for place, writer in self._writers.items()
            ]
        )

    def begin(self) -> None:
        """From now on the student ranks may say goodbye."""
        for writer in self._writers.values():
            writer.begin()

    def wants(self, place: Place, number: int) -> bool:
        """Whether a student rank is still connected and lacks this response."""
        return number >= self._firsts[place] and not self._writers[place].left

    def post(self, response: Sequence[tuple[Place, Header, Sequence[Tensor]]]) -> None:
        """Sends one response in the background: all pieces of it that this rank has, as tensors of the current stream.

        Called after `room.acquire()`. Nobody changes the tensors any more.
        """
        if not response:
            self.room.release()
            return
        pieces = _Countdown(len(response), self.room.release)
        for place, header, tensors in response:
            writer = self._writers[place]
            transport = writer.sender.transport
            parts = [transport.stage(tensor) for tensor in tensors]
            writer.put(partial(writer.send, transport.send, header, parts), pieces.one_done)

    def send_head(self, place: Place, header: Header, rows: Tensor) -> None:
        """Sends rows of the output layer, on the CPU, before all responses. They travel over the connection itself."""
        writer = self._writers[place]
        writer.put(partial(writer.send, writer.connection.send, header, rows), lambda: None)

    def finish(self, seconds: float) -> None:
        """Waits, at most that long, until every student rank has said goodbye, then closes."""
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
            self.failure = self.failure or error


def _results(coming: list[tuple[Place, Future]]) -> list[tuple[Place, str]]:
    """The results in order. Waits for all of them before it raises the first error, so none is still running."""
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
    """Calls `done` when `one_done` has been called `count` times."""

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._done = done

    def one_done(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count:
                return
        self._done()


class _Writer:
    """One connection, with two threads: one owns the transport and does the work of `put`; the other one, from `begin`
    on, waits for the goodbye of the student rank or for the end of the connection."""

    def __init__(
        self, place: Place, sender: Sender, timeout: float, fail: Callable[[LinkError], None]
    ) -> None:
        self.sender = sender
        self.connection = sender.connection
        self.left = False  # it has said goodbye, and reads only what was under way
        self._place = place
        self._timeout = timeout
        self._fail = fail
        self._broken = False
        self._lock = threading.Lock()
        self._over = False  # no work is done any more
        self._all_sent = threading.Event()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._owner = threading.Thread(target=self._run, name="vcrd-link-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="vcrd-link-reader", daemon=True)
        self._owner.start()

    def do(self, task: Callable[[Sender], str]) -> Future:
        """Runs the task in the thread that owns the transport; before `begin`."""
        future: Future = Future()
        self.put(partial(_run_into, future, task, self.sender), future.cancel)
        return future

    def begin(self) -> None:
        self._reader.start()

    def end(self) -> None:
        self._broken = True
        self.connection.end()
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        if self._reader.ident is None:  # `begin` was not called
            self.end()
        else:
            self._reader.join(seconds)
        self._owner.join(seconds)

    def put(self, work: Callable[[], None], done: Callable[[], object]) -> None:
        """Lets the thread that owns the transport do this work. done: called when it is done or will not be done."""
        with self._lock:
            if not self._over:
                self._queue.put((work, done))
                return
        done()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            work, done = item
            work()
            del item, work  # frees the encoded tensors
            done()
        with self._lock:
            self._over = True
        while not self._queue.empty():
            if (item := self._queue.get()) is not None:
                item[1]()
        self._all_sent.set()
        if self._reader.ident is not None:
            self._reader.join()
        self.sender.close()

    def _next(self) -> tuple[Callable[[], None], Callable[[], object]] | None:
        while True:
            try:
                return self._queue.get(timeout=_LOOK)
            except queue.Empty:
                pass
            try:
                if not self._broken:
                    self.sender.check()
            except ConnectionError as error:
                self._lose(f"cannot be sent to: {error}")

    def send(self, send: Callable[..., None], header: Header, what: object) -> None:
        """Sends a header and what belongs to it by this method of the transport or of the connection."""
        if self.left or self._broken:
            return
        try:
            with span("send", header.number):
                send(header, what, seconds=self._timeout)
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
            self._all_sent.wait()  # the student rank reads what is under way
            self.connection.send(Header(Kind.GOODBYE), seconds=self._timeout)
            self._wait_for_the_end()
        except (ConnectionError, TimeoutError):
            self._lose("closed its connection")
        except LinkError as error:
            self._lose(f"sent a header that is refused: {error}")
        finally:
            self._queue.put(None)

    def _wait_for_the_end(self) -> None:
        """Waits until the student rank closes the connection: then it has received everything that was sent."""
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
