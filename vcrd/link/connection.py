"""One connection between two ranks: whole messages in, whole messages out, and an end that everybody notices."""

from __future__ import annotations

import ctypes
import hashlib
import select
import socket
import threading
import time
from contextlib import suppress

from torch import Tensor

from . import header as headers
from .header import Header
from .pairs import Pair

_MOST_AT_ONCE = 1 << 20  # bytes per call, so that progress is seen while something large arrives


class Connection:
    """One end of a connection. One thread at a time may receive; any number may send, one after another.

    heard: when something last arrived, by time.monotonic(). sent, received: bytes so far, headers included.
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
        self.pair: Pair | None = None  # where tensors on a GPU travel
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses power says nothing: notice it within a minute or so.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, header: Header, *parts: Tensor | bytes, seconds: float) -> None:
        """Sends a header and what belongs to it; parts are bytes, contiguous CPU tensors, or what `pair` carries.

        TimeoutError when nothing was taken for that many seconds; the connection is useless then.
        """
        with self._sending:
            self._send_all(memoryview(header.pack()), seconds)
            for part in parts:
                if self.pair is not None and self.pair.carries(part):
                    self.pair.send(part)
                    self.sent += part.numel() * part.element_size()
                else:
                    self._send_all(memory(part), seconds)

    def receive_header(self) -> Header:
        """The next header, however long it takes; LinkError if it is malformed."""
        raw = bytearray(headers.BYTES)
        self._fill(memoryview(raw))
        return headers.parse(bytes(raw))

    def receive(self, *parts: Tensor | bytearray) -> None:
        """Fills contiguous CPU tensors, bytearrays, or tensors that `pair` carries, in order."""
        for part in parts:
            if self.pair is not None and self.pair.carries(part):
                self.pair.receive(part)
                self.heard = time.monotonic()
                self.received += part.numel() * part.element_size()
            else:
                self._fill(memory(part))

    def receive_text(self, header: Header) -> str:
        """The text that follows a header."""
        raw = bytearray(header.length)
        self._fill(memoryview(raw))
        return raw.decode(errors="replace")

    def end(self) -> None:
        """Ends the connection and releases every thread blocked in it. Idempotent, never blocks."""
        if self.pair is not None:
            self.pair.abort()
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
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
        except (OSError, ValueError) as error:  # closed meanwhile
            raise ConnectionError(str(error)) from None
        if not poll.poll(seconds * 1000):
            raise TimeoutError(f"did not take what was sent within {seconds:g} seconds")

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
