"""One connection between two ranks: whole messages in, whole messages out, and an end that everybody notices."""

from __future__ import annotations

import ctypes
import hashlib
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from . import header as headers
from .header import Header

_MOST_AT_ONCE = 1 << 20  # bytes per call, so that progress is seen while something large arrives
_IDLE = 1.0  # seconds
# The other end has closed or is gone. Linux has its own event for it; elsewhere it shows when something is read.
_POLL_ENDED = getattr(select, "POLLRDHUP", select.POLLHUP)


class Connection:
    """One end of a connection. One thread at a time may receive; any number may send, one after another.

    heard: when something last arrived, by time.monotonic(). sent, received: bytes with headers since `count_anew`.
    Every method raises ConnectionError once the connection has ended, from either side.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        # Between shutting down and closing: the number of a closed descriptor may be another connection's. Re-entrant,
        # because whatever thread collects a forgotten link ends its connections.
        self._ending = threading.RLock()
        self.heard = time.monotonic()
        self.sent = 0
        self.received = 0
        self._over = False
        self.stripes: tuple[Connection, ...] = ()  # which end with this one
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses power says nothing: notice it within a minute or so.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, header: Header, *parts: Tensor | bytes, seconds: float) -> None:
        """Sends a header and what belongs to it: bytes or contiguous CPU tensors.

        TimeoutError when nothing was taken for that many seconds; the connection is useless then.
        """
        with self._sending:
            for part in (header.pack(), *parts):
                self._send_all(memory(part), seconds)

    def send_bytes(self, part: Tensor | bytes, *, seconds: float) -> None:
        """Sends more of what belongs to the last header. Errors as `send`."""
        with self._sending:
            self._send_all(memory(part), seconds)

    def receive_header(self, idle: Callable[[], None] | None = None) -> Header:
        """The next header, however long it takes; LinkError if it is malformed.

        idle: called about once a second while none comes; what it raises ends the wait.
        """
        while idle is not None and not self.readable(_IDLE):
            idle()
        raw = bytearray(headers.BYTES)
        self._fill(memoryview(raw))
        return headers.parse(bytes(raw))

    def receive(self, *parts: Tensor | bytearray) -> None:
        """Fills contiguous CPU tensors or bytearrays, in order."""
        for part in parts:
            self._fill(memory(part))

    def receive_text(self, header: Header) -> str:
        """The text that follows a header."""
        return self.receive_bytes(header).decode(errors="replace")

    def receive_bytes(self, header: Header) -> bytes:
        """What follows a header with a length."""
        raw = bytearray(header.length)
        self._fill(memoryview(raw))
        return bytes(raw)

    def readable(self, seconds: float) -> bool:
        """Whether something can be read within that time, or the connection is over."""
        return self._over or bool(self._poll(select.POLLIN, seconds))

    @property
    def hosts(self) -> tuple[str, str]:
        """The IP addresses of this end and of the other one; ConnectionError once it is over."""
        try:
            return self._socket.getsockname()[0], self._socket.getpeername()[0]
        except OSError as error:
            raise ConnectionError(str(error)) from None

    @property
    def is_over(self) -> bool:
        """Whether either end has ended it, known without reading: what the other end sent before may still be there."""
        return self._over or bool(self._poll(_POLL_ENDED, 0.0))

    def count_anew(self) -> None:
        """From here on what is sent and received counts: all of it belongs to micro-batches or to the output layer."""
        self.sent = self.received = 0

    def note(self, received: int) -> None:
        """Counts bytes that arrived for this connection by another way, which are a sign of life too."""
        self.heard = time.monotonic()
        self.received += received

    def end(self) -> None:
        """Ends the connection and releases every thread blocked in it. Idempotent, never blocks."""
        self._over = True
        for stripe in self.stripes:
            stripe.end()
        with self._ending, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it and gives the descriptor back; called by the one thread that receives, or after it ended.

        Closed under a thread that is about to receive, the descriptor's number could be another connection's.
        """
        self.end()
        with self._sending, self._ending:
            self._socket.close()

    def _send_all(self, view: memoryview, seconds: float) -> None:
        while view:
            try:
                count = self._socket.send(view[:_MOST_AT_ONCE], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait_for_room(seconds)
                continue
            except OSError as error:
                raise ConnectionError(str(error)) from None
            self.sent += count
            view = view[count:]

    def _wait_for_room(self, seconds: float) -> None:
        if not self._poll(select.POLLOUT, seconds):
            raise TimeoutError(f"did not take what was sent within {seconds:g} seconds")

    def _poll(self, events: int, seconds: float) -> int:
        """Those of the events that came within that time, and whatever error or end; 0 if none did."""
        poll = select.poll()
        try:
            poll.register(self._socket, events)
        except (OSError, ValueError):  # closed meanwhile
            return select.POLLNVAL
        found = poll.poll(seconds * 1000)
        return found[0][1] if found else 0

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self._socket.recv_into(view, min(len(view), _MOST_AT_ONCE))
            except OSError as error:
                raise ConnectionError(str(error)) from None
            if not count:
                raise ConnectionError("the other end closed")
            self.heard = time.monotonic()
            self.received += count
            view = view[count:]


def memory(part: Tensor | bytes | bytearray) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it, or of a bytes object."""
    if not isinstance(part, Tensor):
        return memoryview(part)
    if not part.is_contiguous() or part.device.type != "cpu":
        raise ValueError(f"part: expected a contiguous tensor on the CPU, got one on {part.device}")
    count = part.numel() * part.element_size()
    return (
        memoryview((ctypes.c_char * count).from_address(part.data_ptr())).cast("B")
        if count
        else memoryview(b"")
    )


def digest_of(rows: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes, in hexadecimal."""
    return hashlib.sha256(memory(rows)).hexdigest()
