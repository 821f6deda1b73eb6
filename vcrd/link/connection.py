"""Connections between ranks over TCP: the header of a message, whole messages in and out, and the greeting of two ends.

Plain sockets, not a process group, because any process may die at any moment. Then each of its connections ends at
once and alone. A process group breaks as a whole, and its construction cannot be interrupted.

A message is a `Header` of fixed size, and the tensors or the text that the header announces. The header is checked
before anything is allocated.

The greeting is a challenge in both directions. The end that accepts sends a nonce. The end that dials answers with a
second nonce, a JSON hello, and the HMAC-SHA256 of all of it under the shared secret. The reply is sealed in the
same way. Without a secret the key is empty, and the seal is a checksum. What follows is not encrypted: the secret
keeps strangers out, it does not hide the traffic on a network that is not trusted.
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
from dataclasses import astuple, dataclass
from enum import IntEnum

from torch import Tensor

from vcrd.errors import expected

from .errors import HandshakeRefused, LinkError

_log = logging.getLogger("vcrd")
PROTOCOL = 5
MAGIC = b"vcrdlink"
_HEADER = struct.Struct("<8sII9q")
HEADER_BYTES = _HEADER.size
LONGEST_TEXT = 1024  # bytes of a reason that is sent
LARGEST_FIELD = (
    1 << 48
)  # far above every count that is sent, and so small that products of fields fit into int64
_MOST_AT_ONCE = (
    1 << 20
)  # bytes per call of send or recv, so that progress is seen while a large tensor arrives
_IDLE = 1.0  # seconds between two calls of `idle` while no header arrives
# The other end has closed or is gone. Linux has an event for it; on other systems only a read notices it.
_POLL_ENDED = getattr(select, "POLLRDHUP", select.POLLHUP)
GREETING_SECONDS = 10.0  # that each end has for the greeting
_GREETINGS = 256  # that a listener may have under way at once
_PATIENCE = 0.5  # seconds for which a silent connection is kept at the limit
_HELLO_BYTES = 1 << 16
_REPLY_BYTES = 1 << 22  # holds the addresses of some ten thousand ranks
_NONCE = 32
_GREETING = struct.Struct(f"<8sI{_NONCE}s")
_HELLO = struct.Struct(f"<8sI{_NONCE}s32sI")
_REPLY = struct.Struct("<32sI")

Address = tuple[str, int]


class Kind(IntEnum):
    """What a message is. The comments say who sends it to whom, and what follows the header."""

    REQUEST = 1  # request leader to teacher; then tokens, boundaries, context tokens and their places, int32
    RESPONSE = 2  # sender to student; then the payload, unless it is empty
    HEAD = 3  # sender to student; then rows of the output layer of the teacher
    READY = 4  # teacher to request leader: all connections of the epoch are open
    GOODBYE = 5  # in both directions, the second one as the answer: this end sends nothing more
    JOIN = 6  # request leader to peer: senders of epoch `number` may connect
    LOST = 7  # between request leader and peer: epoch `number` has ended; then the reason
    PROGRESS = 8  # peer to request leader: the responses below `number` are complete there
    GIVE_UP = 9  # between request leader and peer: the student waits for no teacher any more; then the reason
    # From sender to student: tensors travel by the transport with code `number`; then what the transport is made with,
    # or the reason for it. Code 0: there is no transport, so there is no link; then the reason. The answer of the
    # student: 1 for a transport that works, or 0 and the reason why it does not.
    TRANSPORT = 10


_WITH_TEXT = (Kind.LOST, Kind.GIVE_UP, Kind.TRANSPORT)


@dataclass(frozen=True)
class Header:
    """The header of a message.

    number: the number of the micro-batch within its student replica, or of the epoch. sequence, batch: the shape of the
    whole micro-batch. boundaries: how many edges of packed sequences it has; in a request they follow the tokens.
    context: how many tokens of a request only the teacher sees; they and their places follow the boundaries. start,
    stop: the vocabulary columns of this piece. payload: the code of its encoding. length: bytes of text that follow.
    Fields without meaning are 0.
    """

    kind: Kind
    number: int = 0
    sequence: int = 0
    batch: int = 0
    boundaries: int = 0
    context: int = 0
    start: int = 0
    stop: int = 0
    payload: int = 0
    length: int = 0

    def pack(self) -> bytes:
        """HEADER_BYTES bytes: magic, protocol version, the fields in order."""
        kind, *fields = astuple(self)
        return _HEADER.pack(MAGIC, PROTOCOL, kind, *fields)

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch


def parse_header(raw: bytes) -> Header:
    """The header in HEADER_BYTES bytes; LinkError with the reason where they are no header."""
    magic, protocol, kind, *fields = _HEADER.unpack(raw)
    if magic != MAGIC:
        raise LinkError("it does not begin with the link's mark")
    if protocol != PROTOCOL:
        raise LinkError(f"its protocol version is {protocol}, not {PROTOCOL}")
    if kind not in list(Kind):
        raise LinkError(f"its kind {kind} does not exist")
    if any(not 0 <= field < LARGEST_FIELD for field in fields):
        raise LinkError("one of its fields is out of range")
    header = Header(Kind(kind), *fields)
    if header.length > (LONGEST_TEXT if header.kind in _WITH_TEXT else 0):
        raise LinkError(f"its text of {header.length} bytes is longer than {LONGEST_TEXT} or out of place")
    return header


def check_shape(header: Header, sequence_length: int, max_tokens: int) -> None:
    """LinkError if the micro-batch is empty or larger than agreed, or has more boundaries than tokens.

    A row of packed sequences may be as long as a micro-batch. Its boundaries limit the length of each sequence.
    """
    longest = max_tokens if header.boundaries else sequence_length
    if not 1 <= header.sequence <= longest:
        raise LinkError(f"its sequence length {header.sequence} is not from 1 to {longest}")
    if not 1 <= header.batch or header.tokens > max_tokens:
        raise LinkError(
            f"its batch of {header.batch} x {header.sequence} tokens is not from 1 to {max_tokens} tokens"
        )
    if header.boundaries > header.sequence + 1:
        raise LinkError(f"its {header.boundaries} boundaries are more than {header.sequence} tokens have")


class Connection:
    """One end of a connection. One thread at a time may receive. Any thread may send; a lock keeps messages apart.

    heard: the time.monotonic() at which something last arrived. sent, received: bytes, headers included, since
    `count_anew`. stripes: further connections between the same two ranks, which end with this one.
    Every method raises ConnectionError once either side has ended the connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        # Keeps shutdown and close apart: the number of a closed descriptor may belong to another connection by then.
        # Re-entrant, because the garbage collector may end the connections of a forgotten link in any thread.
        self._ending = threading.RLock()
        self.heard = time.monotonic()
        self.sent = 0
        self.received = 0
        self._over = False
        self.stripes: tuple[Connection, ...] = ()
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses power sends nothing more. Keep-alive probes notice it within about a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, header: Header, *parts: Tensor | bytes, seconds: float) -> None:
        """Sends a header and the bytes or contiguous CPU tensors that belong to it.

        TimeoutError when the other end received nothing for that many seconds. The connection is useless then.
        """
        with self._sending:
            for part in (header.pack(), *parts):
                self._send_all(memory(part), seconds)

    def send_bytes(self, part: Tensor | bytes, *, seconds: float) -> None:
        """Sends more bytes that belong to the last header. Errors as `send`."""
        with self._sending:
            self._send_all(memory(part), seconds)

    def receive_header(self, idle: Callable[[], None] | None = None) -> Header:
        """The next header, without a time limit; LinkError if it is malformed.

        idle: called about once a second while no header arrives. An error that it raises ends the wait.
        """
        while idle is not None and not self.readable(_IDLE):
            idle()
        raw = bytearray(HEADER_BYTES)
        self.receive(raw)
        return parse_header(bytes(raw))

    def receive(self, *parts: Tensor | bytearray) -> None:
        """Fills contiguous CPU tensors or bytearrays, in order."""
        for part in parts:
            view = memory(part)
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

    def receive_text(self, header: Header) -> str:
        """The text that follows a header."""
        return self.receive_bytes(header).decode(errors="replace")

    def receive_bytes(self, header: Header) -> bytes:
        """The bytes that follow a header with a length."""
        raw = bytearray(header.length)
        self.receive(raw)
        return bytes(raw)

    def readable(self, seconds: float) -> bool:
        """Whether something can be read within that time, or the connection has ended."""
        return self._over or bool(self._poll(select.POLLIN, seconds))

    @property
    def hosts(self) -> tuple[str, str]:
        """The IP addresses of this end and of the other end; ConnectionError once the connection has ended."""
        try:
            return self._socket.getsockname()[0], self._socket.getpeername()[0]
        except OSError as error:
            raise ConnectionError(str(error)) from None

    @property
    def is_over(self) -> bool:
        """Whether either end has ended it. Does not read: what the other end sent before may still be unread."""
        return self._over or bool(self._poll(_POLL_ENDED, 0.0))

    def count_anew(self) -> None:
        """Sets the counts of bytes to 0: from here on all bytes belong to micro-batches or to the output layer."""
        self.sent = self.received = 0

    def note(self, received: int) -> None:
        """Counts bytes that arrived by another way, over NCCL or a stripe. They are a sign of life too."""
        self.heard = time.monotonic()
        self.received += received

    def end(self) -> None:
        """Ends the connection, which wakes every thread that is blocked in it. Idempotent, never blocks."""
        self._over = True
        for stripe in self.stripes:
            stripe.end()
        with self._ending, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection and closes the descriptor. Only the thread that receives may call it, or any thread after
        that one has ended: a thread that is about to receive could otherwise read from another connection that has got
        the same descriptor.
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
        """Those of the events that happened within that time, and any error or hang-up; 0 if none happened."""
        poll = select.poll()
        try:
            poll.register(self._socket, events)
        except (OSError, ValueError):  # it has been closed
            return select.POLLNVAL
        found = poll.poll(seconds * 1000)
        return found[0][1] if found else 0


def memory(part: Tensor | bytes | bytearray) -> memoryview:
    """The bytes of a contiguous CPU tensor, whose memory it shares, or of a bytes object."""
    if not isinstance(part, Tensor):
        return memoryview(part)
    if not part.is_contiguous() or part.device.type != "cpu":
        raise expected("part", "a contiguous tensor on the CPU", f"one on {part.device}")
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
    """A connection after its greeting, and the reply. ConnectionError if nobody answers in time, HandshakeRefused if
    the secret or the protocol version differs."""
    try:
        sock = socket.create_connection(address, timeout=seconds)
    except (OSError, OverflowError, ValueError) as error:  # the last two for an invalid host or port
        raise ConnectionError(f"{address[0]}:{address[1]}: {error}") from None
    try:
        # Where nobody listens, the system may choose this port as the local one, and the socket connects to itself.
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
    magic, theirs, challenge = _GREETING.unpack(_read_exactly(sock, _GREETING.size, deadline))
    if magic != MAGIC:
        raise HandshakeRefused("the link is refused: what listens there is not vcrd")
    text, nonce = json.dumps(hello).encode(), os.urandom(_NONCE)
    seal = _seal(secret, b"hello", challenge, nonce, PROTOCOL, text)
    sock.sendall(_HELLO.pack(MAGIC, PROTOCOL, nonce, seal, len(text)) + text)
    if theirs != PROTOCOL:
        raise HandshakeRefused("the link is refused: " + versions_differ(student=theirs, teacher=PROTOCOL))
    seal, length = _REPLY.unpack(_read_exactly(sock, _REPLY.size, deadline))
    if length > _REPLY_BYTES:
        raise ConnectionError(f"a reply of {length} bytes is longer than {_REPLY_BYTES}")
    text = _read_exactly(sock, length, deadline)
    if not hmac.compare_digest(seal, _seal(secret, b"reply", nonce, challenge, theirs, text)):
        raise HandshakeRefused("the link is refused: the shared secret differs from the other side's")
    return Connection(sock), _parsed(text)


# Called with a hello. Returns the reply, and what to call with the connection after the reply (None: close it).
Answer = Callable[[dict], "tuple[dict, Callable[[Connection], None] | None]"]


class Listener:
    """Accepts connections and greets them, each in a thread of its own, which also calls `answer`.

    sock: bound and listening. `answer` gets hellos that have the right secret, with the protocol version of the other
    end as "protocol". A connection that does not complete the greeting costs a thread for at most GREETING_SECONDS, and
    keeps nobody else out.
    """

    def __init__(self, sock: socket.socket, secret: str, answer: Answer) -> None:
        host, port = sock.getsockname()[:2]
        self.address: Address = (host, port)
        self._socket = sock
        self._secret = secret
        self._answer = answer
        # Re-entrant, because the garbage collector may close a forgotten link in any thread.
        self._changed = threading.Condition(threading.RLock())
        self._strangers: dict[
            socket.socket, float
        ] = {}  # connections without a hello: since when, oldest first
        self._greeters: set[threading.Thread] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="vcrd-link-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops accepting and ends every greeting. Idempotent; takes at most about two seconds."""
        with self._changed:
            self._closed = True
            strangers, greeters = list(self._strangers), list(self._greeters)
            for sock in strangers:
                _shut(sock)
            self._changed.notify_all()
        _shut(self._socket)  # wakes accept()
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
                time.sleep(0.05)  # closed, or out of descriptors for a while
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
                except RuntimeError:  # out of threads for a while
                    sock.close()
                    continue
                self._strangers[sock] = time.monotonic()
                self._greeters.add(thread)

    def _make_room(self) -> None:
        """Waits until one more connection may be greeted. At the limit, the oldest silent connection is closed once it
        is older than _PATIENCE, so that silent connections keep nobody out and slow ones have time."""
        while len(self._strangers) >= _GREETINGS and not self._closed:
            oldest, since = next(iter(self._strangers.items()))
            left = since + _PATIENCE - time.monotonic()
            if left > 0:
                self._changed.wait(left)
            else:
                del self._strangers[oldest]
                _shut(oldest)

    def _known(self, sock: socket.socket) -> bool:
        """Its hello has arrived. Whether it had not been closed at the limit."""
        with self._changed:
            self._changed.notify_all()
            return self._strangers.pop(sock, None) is not None

    def _greet(self, sock: socket.socket) -> None:
        kept = False
        try:
            kept = self._exchange(sock, time.monotonic() + GREETING_SECONDS)
        except (OSError, LinkError) as error:
            _log.debug("a connection did not complete its greeting: %s", error)
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
        sock.sendall(_GREETING.pack(MAGIC, PROTOCOL, challenge))
        magic = _read_exactly(sock, len(MAGIC), deadline)
        if magic != MAGIC:  # another protocol
            return False
        raw = magic + _read_exactly(sock, _HELLO.size - len(magic), deadline)
        _, protocol, nonce, seal, length = _HELLO.unpack(raw)
        if length > _HELLO_BYTES:
            return False
        text = _read_exactly(sock, length, deadline)
        same = hmac.compare_digest(seal, _seal(self._secret, b"hello", challenge, nonce, protocol, text))
        if not self._known(sock):
            return False
        if same:
            reply, keep = self._answer({**_parsed(text), "protocol": protocol})
        else:
            _log.warning("%s:%s is refused: its shared secret differs", *sock.getpeername()[:2])
            reply, keep = {}, None  # sealed: the other end learns only that the secrets differ
        text = json.dumps(reply).encode()
        seal = _seal(self._secret, b"reply", nonce, challenge, PROTOCOL, text)
        sock.sendall(_REPLY.pack(seal, len(text)) + text)
        if keep is None:
            return False
        keep(Connection(sock))
        return True


def versions_differ(student: int, teacher: int) -> str:
    return f"protocol version is {student} for the student and {teacher} for the teacher"


def _seal(secret: str, role: bytes, first: bytes, second: bytes, protocol: int, text: bytes) -> bytes:
    message = b"|".join([role, first, second, str(protocol).encode(), text])
    # A secret from the environment need not be UTF-8.
    return hmac.digest(secret.encode(errors="surrogateescape"), message, "sha256")


def _parsed(text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LinkError("a greeting is not a JSON object")
    return value


def _read_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Exactly that many bytes; ConnectionError if they do not arrive before the deadline."""
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
    """Shuts the socket down, which wakes every thread that waits in it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
