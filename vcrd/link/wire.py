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

import hmac
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from . import header as headers
from .connection import Connection
from .errors import HandshakeRefused, LinkError

_log = logging.getLogger("vcrd")
GREETING_SECONDS = 10.0  # that either end gives the other
_GREETINGS = 256  # under way at once on a listener
_PATIENCE = 0.5  # seconds that a greeting has for itself, before it may have to make room for another
_HELLO_BYTES = 1 << 16
_REPLY_BYTES = 1 << 22  # holds the addresses of some ten thousand ranks
_NONCE = 32
_GREETING = struct.Struct(f"<8sI{_NONCE}s")
_HELLO = struct.Struct(f"<8sI{_NONCE}s32sI")
_REPLY = struct.Struct("<32sI")

Address = tuple[str, int]


def dial(
    address: Address, secret: str, hello: dict, seconds: float = GREETING_SECONDS
) -> tuple[Connection, dict]:
    """A greeted connection and the reply. ConnectionError if no one answers there in time, HandshakeRefused
    if secret or protocol version differ."""
    try:
        sock = socket.create_connection(address, timeout=seconds)
    except (OSError, OverflowError, ValueError) as error:  # the last two: what is no host, what is no port
        raise ConnectionError(f"{address[0]}:{address[1]}: {error}") from None
    try:
        # Where nobody listens, the system may choose this very port to dial from.
        if sock.getsockname() == sock.getpeername():
            raise ConnectionError("nobody listens there")
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

    sock: bound and listening. The hello has passed the secret; it carries "protocol", the other end's. Who connects and
    does not get through the greeting costs a thread for GREETING_SECONDS at most, and keeps nobody else out.
    """

    def __init__(self, sock: socket.socket, secret: str, answer: Answer) -> None:
        host, port = sock.getsockname()[:2]
        self.address: Address = (host, port)
        self._socket = sock
        self._secret = secret
        self._answer = answer
        # Re-entrant, because a forgotten link is closed by whatever thread collects it.
        self._changed = threading.Condition(threading.RLock())
        self._strangers: dict[socket.socket, float] = {}  # whose hello is awaited, since when, oldest first
        self._greeters: set[threading.Thread] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="vcrd-link-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops accepting and ends every greeting. Idempotent; a second or two at most."""
        with self._changed:
            self._closed = True
            strangers, greeters = list(self._strangers), list(self._greeters)
            for sock in strangers:
                _shut(sock)
            self._changed.notify_all()
        _shut(self._socket)  # what wakes accept()
        self._socket.close()
        deadline = time.monotonic() + 1.0
        for thread in (self._thread, *greeters):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                time.sleep(0.05)  # closed, or out of descriptors, which passes
                continue
            thread = threading.Thread(
                target=self._greet, args=(sock,), name="vcrd-link-greeting", daemon=True
            )
            with self._changed:
                self._make_room()
                if self._closed:
                    sock.close()
                    return
                try:
                    thread.start()
                except RuntimeError:  # out of threads, which passes
                    sock.close()
                    continue
                self._strangers[sock] = time.monotonic()
                self._greeters.add(thread)

    def _make_room(self) -> None:
        """Waits until one more may be greeted. Who has said nothing for a while makes room for who may say something,
        so that silent connections keep nobody out; but a crowd that is only slow is waited for."""
        while len(self._strangers) >= _GREETINGS and not self._closed:
            oldest, since = next(iter(self._strangers.items()))
            left = since + _PATIENCE - time.monotonic()
            if left > 0:
                self._changed.wait(left)
            else:
                del self._strangers[oldest]
                _shut(oldest)

    def _known(self, sock: socket.socket) -> bool:
        """Takes a connection off those that may have to make room; whether it had not had to."""
        with self._changed:
            self._changed.notify_all()
            return self._strangers.pop(sock, None) is not None

    def _greet(self, sock: socket.socket) -> None:
        kept = False
        try:
            kept = self._exchange(sock, time.monotonic() + GREETING_SECONDS)
        except (OSError, LinkError) as error:
            _log.debug("a connection did not get through its greeting: %s", error)
        except Exception:
            _log.exception("a greeting failed")
        finally:
            self._known(sock)
            if not kept:
                sock.close()
            with self._changed:
                self._greeters.discard(threading.current_thread())

    def _exchange(self, sock: socket.socket, deadline: float) -> bool:
        challenge = os.urandom(_NONCE)
        sock.sendall(_GREETING.pack(headers.MAGIC, headers.PROTOCOL, challenge))
        magic = _read(sock, len(headers.MAGIC), deadline)
        if magic != headers.MAGIC:  # whatever speaks another language need not say more
            return False
        raw = magic + _read(sock, _HELLO.size - len(magic), deadline)
        _, protocol, nonce, seal, length = _HELLO.unpack(raw)
        if length > _HELLO_BYTES:
            return False
        text = _read(sock, length, deadline)
        same = hmac.compare_digest(seal, _seal(self._secret, b"hello", challenge, nonce, protocol, text))
        if not self._known(sock):
            return False
        if same:
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
    # What the environment holds need not be UTF-8.
    return hmac.digest(secret.encode(errors="surrogateescape"), message, "sha256")


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


def _shut(sock: socket.socket) -> None:
    """Ends it, and with it whatever another thread waits for there."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
