"""Authenticated connections between ranks, over TCP: framing, deadlines, and how two ends get to know each other.

Plain sockets rather than a process group, because of what must survive: any process may die at any moment,
and each connection then ends by itself, at once, without touching another; a group breaks as a whole, and its
forming cannot be interrupted.

The greeting is a challenge in both directions. The accepting end sends a nonce; the dialling end answers with
its own nonce, a JSON hello and HMAC-SHA256 of all of it under the shared secret; the reply is sealed in the
same way. Without a secret the key is empty, and the seal is a checksum. What follows is not encrypted: the
secret keeps strangers out, it does not hide the traffic of a network that is not trusted.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from . import header as headers
from .errors import HandshakeRefused, LinkError
from .header import Header

_log = logging.getLogger("vcrd")
GREETING_SECONDS = 10.0  # that either end gives the other
_GREETINGS = 64  # under way at once on a listener; more are turned away
_HELLO_BYTES = 1 << 16
_REPLY_BYTES = 1 << 22  # holds the addresses of some ten thousand ranks
_NONCE = 32
_GREETING = struct.Struct(f"<8sI{_NONCE}s")
_HELLO = struct.Struct(f"<8sI{_NONCE}s32sI")
_REPLY = struct.Struct("<32sI")
_MOST_AT_ONCE = 1 << 20  # bytes per call, so that progress is seen while something large arrives

Address = tuple[str, int]


class Connection:
    """One end of a connection. One thread at a time may receive; any number may send, one after another.

    heard: when something last arrived, by time.monotonic(). sent, received: bytes so far, headers included.
    Every method raises ConnectionError once the connection has ended, from either side.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        self.heard = time.monotonic()
        self.sent = 0
        self.received = 0
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses power says nothing: notice it within a minute or so.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, header: Header, *parts: Tensor | bytes, seconds: float) -> None:
        """Sends a header and what belongs to it; parts are bytes or contiguous CPU tensors.

        TimeoutError when nothing was taken for that many seconds; the connection is useless then.
        """
        with self._sending:
            self._send_all(memoryview(header.pack()), seconds)
            for part in parts:
                self._send_all(memory(part), seconds)

    def receive_header(self) -> Header:
        """The next header, however long it takes; LinkError if it is malformed."""
        raw = bytearray(headers.BYTES)
        self._fill(memoryview(raw))
        return headers.parse(bytes(raw))

    def receive(self, *parts: Tensor | bytearray) -> None:
        """Fills contiguous CPU tensors or bytearrays, in order."""
        for part in parts:
            self._fill(memory(part))

    def receive_text(self, header: Header) -> str:
        """The text that follows a header."""
        raw = bytearray(header.length)
        self._fill(memoryview(raw))
        return raw.decode(errors="replace")

    def end(self) -> None:
        """Ends the connection and releases every thread blocked in it. Idempotent, never blocks."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends it and gives the descriptor back; called by the one thread that receives, or after it ended.

        Closed under a thread that is about to receive, the descriptor's number could be another connection's.
        """
        self.end()
        with self._sending:
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


def dial(
    address: Address, secret: str, hello: dict, seconds: float = GREETING_SECONDS
) -> tuple[Connection, dict]:
    """A greeted connection and the reply. ConnectionError if no one answers there in time, HandshakeRefused
    if secret or protocol version differ."""
    try:
        sock = socket.create_connection(address, timeout=seconds)
    except OSError as error:
        raise ConnectionError(f"{address[0]}:{address[1]}: {error}") from None
    try:
        return _greet(sock, secret, hello, time.monotonic() + seconds)
    except (OSError, ConnectionError) as error:
        sock.close()
        raise ConnectionError(f"{address[0]}:{address[1]}: {error}") from None
    except BaseException:
        sock.close()
        raise


def _greet(sock: socket.socket, secret: str, hello: dict, deadline: float) -> tuple[Connection, dict]:
    magic, theirs, challenge = _GREETING.unpack(_read(sock, _GREETING.size, deadline))
    if magic != headers.MAGIC:
        raise HandshakeRefused("the link is refused: what listens there is not vcrd")
    text, nonce = json.dumps(hello).encode(), os.urandom(_NONCE)
    seal = _seal(secret, b"hello", challenge, nonce, headers.PROTOCOL, text)
    sock.sendall(_HELLO.pack(headers.MAGIC, headers.PROTOCOL, nonce, seal, len(text)) + text)
    if theirs != headers.PROTOCOL:
        raise HandshakeRefused(
            "the link is refused: " + versions_differ(student=theirs, teacher=headers.PROTOCOL)
        )
    seal, length = _REPLY.unpack(_read(sock, _REPLY.size, deadline))
    if length > _REPLY_BYTES:
        raise ConnectionError(f"a reply of {length} bytes is longer than {_REPLY_BYTES}")
    text = _read(sock, length, deadline)
    if not hmac.compare_digest(seal, _seal(secret, b"reply", nonce, challenge, theirs, text)):
        raise HandshakeRefused("the link is refused: the shared secret differs from the other side's")
    return Connection(sock), _parsed(text)


# Decides on a hello: the reply, and what becomes of the connection once the reply is out (None: it is closed).
Answer = Callable[[dict], "tuple[dict, Callable[[Connection], None] | None]"]


class Listener:
    """Accepts and greets in the background. `answer` is called in one thread per greeting.

    sock: bound and listening. The hello has passed the secret; it carries "protocol", the other end's.
    """

    def __init__(self, sock: socket.socket, secret: str, answer: Answer) -> None:
        host, port = sock.getsockname()[:2]
        self.address: Address = (host, port)
        self._socket = sock
        self._secret = secret
        self._answer = answer
        self._room = threading.Semaphore(_GREETINGS)
        self._thread = threading.Thread(target=self._accept, name="vcrd-link-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops accepting. Idempotent; never called from `answer`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # what wakes accept()
        self._socket.close()
        self._thread.join(1.0)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0 or not _listens(self._socket):
                    return
                time.sleep(0.05)  # out of descriptors, for one: this passes
                continue
            if not self._room.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._greet, args=(sock,), name="vcrd-link-greeting", daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            kept = self._exchange(sock, time.monotonic() + GREETING_SECONDS)
        except (OSError, LinkError, struct.error) as error:
            _log.debug("a connection did not get through its greeting: %s", error)
            kept = False
        except Exception:
            _log.exception("a greeting failed")
            kept = False
        finally:
            self._room.release()
        if not kept:
            sock.close()

    def _exchange(self, sock: socket.socket, deadline: float) -> bool:
        challenge = os.urandom(_NONCE)
        sock.sendall(_GREETING.pack(headers.MAGIC, headers.PROTOCOL, challenge))
        magic, protocol, nonce, seal, length = _HELLO.unpack(_read(sock, _HELLO.size, deadline))
        if magic != headers.MAGIC or length > _HELLO_BYTES:
            return False
        text = _read(sock, length, deadline)
        known = hmac.compare_digest(seal, _seal(self._secret, b"hello", challenge, nonce, protocol, text))
        if known:
            reply, keep = self._answer({**_parsed(text), "protocol": protocol})
        else:
            _log.warning("%s:%s was turned away: its shared secret differs", *sock.getpeername()[:2])
            reply, keep = {}, None  # sealed, so the other end sees that the secrets differ and nothing else
        text = json.dumps(reply).encode()
        seal = _seal(self._secret, b"reply", nonce, challenge, headers.PROTOCOL, text)
        sock.sendall(_REPLY.pack(seal, len(text)) + text)
        if keep is None:
            return False
        keep(Connection(sock))
        return True


def versions_differ(student: int, teacher: int) -> str:
    return f"protocol version is {student} for the student and {teacher} for the teacher"


def _seal(secret: str, role: bytes, first: bytes, second: bytes, protocol: int, text: bytes) -> bytes:
    message = b"|".join([role, first, second, str(protocol).encode(), text])
    return hmac.digest(secret.encode(), message, "sha256")


def _parsed(text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LinkError("a greeting is not a JSON object")
    return value


def _read(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly that many bytes before the deadline, or ConnectionError."""
    data = bytearray()
    while len(data) < count:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = sock.recv(min(count - len(data), 1 << 16))
        if not chunk:
            raise ConnectionError("the other end closed during the greeting")
        data += chunk
        if len(data) < count and time.monotonic() > deadline:
            raise ConnectionError("the greeting took too long")
    return bytes(data)


def _listens(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
