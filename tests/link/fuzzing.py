"""Damaged headers, greetings, replies and statements, and what may become of them: an error of the link, no more.

Strategies and single trials, each of which ends by itself; test_fuzz.py runs some of each, fuzz.py as many as there is
time for.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from hypothesis import strategies as st

from vcrd.link import LinkError, LinkSettings
from vcrd.link import connection as wire
from vcrd.link import handshake as stated
from vcrd.link.connection import Connection, Header, Kind, Listener, dial
from vcrd.link.handshake import Handshake, Head
from vcrd.link.payload import payload_named
from vcrd.link.plan import Piece, Place
from vcrd.link.reassembly import Reassembly
from vcrd.link.rendezvous import Rendezvous, ask, listen
from vcrd.link.requests import RequestReceiver
from vcrd.link.respond import ResponseSender
from vcrd.link.student_connections import StudentConnections
from vcrd.link.transport.opening import Endpoint

LONG = 60.0  # seconds; whatever takes that long hangs
MEMORY = 4 << 20  # bytes that Python may allocate for what one trial sends: far more than it sends
SETTINGS = LinkSettings(address="127.0.0.1:1", timeout=LONG)
ENDPOINT = Endpoint("auto", torch.device("cpu"))
STUDENT = Handshake(9, 16, "float16", 64, 9, tensor_size=1, copies=2, credits=2, teacher_context_length=3)
WIDE = Handshake(9, 16, "float16", 64, 10, tensor_size=2, copies=1, credits=2)
TEACHER = Handshake(9, 16, "float16", 64, 9, tensor_size=1, copies=1)
HIDDEN = Handshake(9, 16, "hidden", 64, 9, tensor_size=1, copies=1, head=Head(8, "float32"))

# What is sent.

_NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from(
        [1 << k for k in range(0, 63, 3)]
        + [-1 << 63, (1 << 63) - 1, wire.LARGEST_FIELD, wire.LARGEST_FIELD - 1]
    ),
    st.integers(-(1 << 63), (1 << 63) - 1),
)


@st.composite
def header_bytes(draw) -> bytes:
    """A header whose fields are anything, often all but right, sometimes damaged."""
    kind = draw(st.one_of(st.sampled_from([int(kind) for kind in Kind]), st.integers(0, (1 << 32) - 1)))
    good = draw(
        st.sampled_from(
            [(0, 4, 2, 0, 3, 0, 9, 1, 0), (1, 16, 1, 3, 0, 0, 9, 1, 0), (8, 0, 0, 0, 0, 0, 9, 0, 0)]
        )
    )
    fields = [draw(_NUMBERS) if draw(st.integers(0, 4)) == 0 else field for field in good]
    protocol = draw(st.sampled_from([wire.PROTOCOL] * 9 + [0, 1, (1 << 32) - 1]))
    raw = wire._HEADER.pack(wire.MAGIC, protocol, kind, *fields)
    return draw(damaged(raw)) if draw(st.integers(0, 3)) == 0 else raw


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """Some bytes of it changed, and perhaps not all of it."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(0, 4))):
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


ready = st.just(Header(Kind.READY).pack())
streams = st.lists(st.one_of(ready, header_bytes(), st.binary(max_size=200)), max_size=6).map(b"".join)

_WORDS = [
    "role",
    "run",
    "vcrd",
    "student",
    "teacher",
    "requests",
    "sender",
    "peer",
    "place",
    "handshake",
    "address",
]
json_values = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), _NUMBERS, st.floats(), st.text(max_size=8), st.sampled_from(_WORDS)),
        st.sampled_from([10**30, -(10**400), "9" * 5000, "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.text(max_size=8) | st.sampled_from(_WORDS), inner, max_size=5),
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw, value):
    """JSON of this form, some parts of which are anything."""
    if draw(st.integers(0, 7)) == 0:
        return draw(json_values)
    if isinstance(value, dict):
        value = {name: draw(mutated(part)) for name, part in value.items()}
        if value and draw(st.integers(0, 9)) == 0:
            del value[draw(st.sampled_from(sorted(value)))]
        return value
    if isinstance(value, list):
        return [draw(mutated(part)) for part in value]
    return value


@st.composite
def hellos(draw) -> dict:
    """What someone who knows the secret may say first."""
    handshake = draw(st.sampled_from([STUDENT, WIDE, TEACHER, HIDDEN])).plain()
    whole = {
        "run": "vcrd",
        "role": draw(st.sampled_from(["student", "teacher", "requests", "sender", "peer"])),
        "place": [draw(st.integers(0, 1)), 0, draw(st.integers(0, 1))],
        "address": ["127.0.0.1", 9],
        "handshake": handshake,
        "replica": 0,
        "epoch": draw(st.integers(1, 9)),
        "sender": 0,
        "digest": "none",
    }
    hello = draw(mutated(whole))
    return hello if isinstance(hello, dict) else {"run": hello}


READY = {
    "state": "ready",
    "leader": ["127.0.0.1", 9],
    "epoch": 1,
    "handshake": STUDENT.plain(),
    "addresses": [["x", 9]],
}
replies = mutated(READY)

# Single trials. Each raises what no peer may be able to cause.


def parse_anything(raw: bytes) -> None:
    """`raw`, cut or filled to a header's size, is a header that comes back as it was, or is refused."""
    raw = raw[: wire.HEADER_BYTES].ljust(wire.HEADER_BYTES, b"\0")
    with within_memory(), suppress(LinkError):
        assert wire.parse_header(raw).pack() == raw


def read_facts(value) -> None:
    """JSON is a statement that two sides can be compared by, or is refused."""
    with within_memory(64 << 20), suppress(LinkError):  # lists of up to a million ranks
        handshake = stated.read(value, "teacher")
        if stated.refusal(STUDENT, handshake, handshake.copies) is None:
            assert handshake.content().bytes(1, 9) < MEMORY and handshake.shards()


def read_text(text: bytes) -> None:
    with within_memory(), suppress(LinkError):
        wire._parsed(text)


class Peers:
    """What listens, for a trial to connect to: a listener with a secret, a rendezvous, a student rank that asks."""

    def __init__(self) -> None:
        self.listener = Listener(listen("127.0.0.1", 0), "secret", lambda hello: ({"heard": True}, None))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.port = port
        self.settings = LinkSettings(address=f"127.0.0.1:{port}", timeout=LONG)
        self.rendezvous = Rendezvous(self.settings)

    def close(self) -> None:
        self.listener.close()
        self.rendezvous.close()

    def greet_badly(self, stream: bytes) -> None:
        """A stranger says anything; whoever knows the secret is served all the same."""
        begun = time.monotonic()
        with socket.create_connection(self.listener.address) as stranger, suppress(OSError):
            stranger.settimeout(LONG)
            stranger.sendall(stream)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1 << 16):
                pass
            assert time.monotonic() < begun + LONG
        connection, reply = dial(self.listener.address, "secret", {}, LONG)
        connection.close()
        assert reply == {"heard": True}

    def ask_rendezvous(self, hello: dict) -> None:
        """Anything from who knows the secret gets an answer, or is cut off."""
        with within_memory(64 << 20), suppress(LinkError, ConnectionError):
            connection, reply = dial(("127.0.0.1", self.port), "", hello, LONG)
            connection.close()
            assert reply["state"] in ("waiting", "ready", "refused"), reply


def knock(hellos_in_turn: list[tuple[dict, bytes]]) -> None:
    """A student rank that is asked anything in any role, and told anything by whom it lets in, stands."""
    connections = []
    with student_rank() as members, limited_tensors(144):
        for hello, stream in hellos_in_turn:
            with suppress(LinkError, ConnectionError):
                connection, reply = dial(members.address, "", hello, LONG)
                connections.append(connection)
                assert reply.get("state") in ("busy", "over", "refused", "welcome"), reply
                connection._send_all(memoryview(stream), LONG)
        for connection in connections:
            connection.close()
        members.end()
        assert not any(thread.is_alive() for thread in members._threads)
        # And nothing before, unless a teacher said that it has no transport.
        failure = str(members.failure)
        assert failure == "the link is closed" or failure.startswith("the link is refused: ")


@contextmanager
def student_rank() -> Iterator[StudentConnections]:
    changed = threading.Condition()
    reassembly = Reassembly(STUDENT, Place(0, 0, 0), changed)
    reassembly.expect(0, (4, 2))
    sock = listen("127.0.0.1", 0)
    members = StudentConnections(SETTINGS, STUDENT, Place(0, 0, 0), sock, reassembly, changed, ENDPOINT)
    try:
        yield members
    finally:
        members.end()


@contextmanager
def sending(stream: bytes) -> Iterator[Connection]:
    """A connection on which that arrives, and then its end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as near:
            far = Connection(listener.accept()[0])
            try:
                near.sendall(stream)
                near.shutdown(socket.SHUT_WR)
                yield far
            finally:
                far.close()


def ask_liar(stream: bytes) -> None:
    """What answers a dialling end may be anything."""
    answer(lambda sock: sock.sendall(stream))


def ask_fool(reply) -> None:
    """A rendezvous that knows the secret and replies anything."""
    listener = Listener(listen("127.0.0.1", 0), "", lambda hello: (reply, None))
    try:
        with suppress(LinkError, ConnectionError):
            said = ask(LinkSettings(address="{}:{}".format(*listener.address)), {"role": "teacher"})
            assert said["state"] in ("waiting", "ready")
    finally:
        listener.close()


def answer(say: Callable[[socket.socket], None]) -> None:
    def serve(server: socket.socket) -> None:
        sock, _ = server.accept()
        with sock, suppress(OSError):
            say(sock)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with within_memory(16 << 20), suppress(LinkError, ConnectionError):
            connection, _ = dial(server.getsockname(), "", {}, LONG)
            connection.close()
        thread.join(LONG)
        assert not thread.is_alive()


def request_anything(stream: bytes) -> None:
    """An requests takes requests that are right, and ends with a reason at the first that is not."""
    with sending(stream) as connection, limited_tensors(64 * 4 + 17 * 4):
        requests = RequestReceiver(STUDENT, {0: connection})
        while requests.failure is None and not requests.all_left:
            for request in requests.take(4, 0.01):
                assert (
                    request.tokens.numel() <= 64
                    and 0 <= int(request.tokens.min()) <= int(request.tokens.max()) < 9
                )
                tokens, places = request.context
                assert len(tokens) == len(places) <= 64 and all(0 <= token < 9 for token in tokens.tolist())
                assert places.tolist() == sorted(places.tolist()) and set(places.tolist()) <= {*range(64)}
        requests.end(LONG)
        assert not any(thread.is_alive() for thread in requests._threads)


def respond_anything(stream: bytes, asked: int) -> None:
    """A student's reassembly takes what it asked for, in order, and nothing else."""
    reassembly = Reassembly(STUDENT, Place(0, 0, 0), threading.Condition())
    payload = payload_named("float16")
    reassembly.begin(1, {0: Piece(0, 0, 0, 9)})
    for number in range(asked):
        reassembly.expect(number, (4, 2))
    with sending(stream) as connection, limited_tensors(4 * 2 * 9 * 2), suppress(LinkError, ConnectionError):
        while True:
            header = connection.receive_header()
            connection.receive_text(header)
            reassembly.receive_piece(1, 0, header, payload, ENDPOINT.tcp(connection))
    assert reassembly.complete <= asked


def tell_sender_anything(stream: bytes) -> None:
    place = Place(0, 0, 0)
    with sending(stream) as connection:
        responses = ResponseSender({place: connection}, {place: 0}, LONG, ENDPOINT)
        responses.begin()
        responses._writers[place]._reader.join(LONG)
        assert not responses._writers[place]._reader.is_alive()
        responses.end(LONG)
        assert responses.failure is not None


@contextmanager
def within_memory(limit: int = MEMORY) -> Iterator[None]:
    """Python allocates no more than that at any time meanwhile. For one trial at a time."""
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < limit, f"{most} bytes were allocated"


@contextmanager
def limited_tensors(limit: int) -> Iterator[None]:
    """No tensor larger than that many bytes is made meanwhile; tracemalloc does not see them."""
    real = torch.empty

    def empty(*shape, **more):
        tensor = real(*shape, device="meta", **more)
        assert tensor.numel() * tensor.element_size() <= limit, f"a tensor {list(shape)}"
        return real(*shape, **more)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = real


good_stream = Header(Kind.REQUEST, 0, 4, 2, context=2).pack() + bytes(48)


def fake_greeting() -> bytes:
    return wire._GREETING.pack(wire.MAGIC, wire.PROTOCOL, os.urandom(32))


@st.composite
def greetings(draw) -> bytes:
    """What a dialling end hears that talks to anything."""
    text = json.dumps(draw(json_values)).encode()
    length = draw(st.sampled_from([len(text), len(text) - 1, 0, (1 << 32) - 1, wire._REPLY_BYTES + 1])) % (
        1 << 32
    )
    whole = wire._GREETING.pack(wire.MAGIC, draw(st.sampled_from([wire.PROTOCOL, 1])), bytes(32))
    whole += wire._REPLY.pack(bytes(32), length) + text
    return draw(st.one_of(st.just(whole), damaged(whole), st.binary(max_size=300)))


@st.composite
def stranger_hellos(draw) -> bytes:
    """What a listening end hears from anything."""
    text = json.dumps(draw(hellos())).encode()
    length = draw(
        st.sampled_from([len(text), max(0, len(text) - 1), 0, (1 << 32) - 1, wire._HELLO_BYTES + 1])
    )
    whole = wire._HELLO.pack(wire.MAGIC, wire.PROTOCOL, bytes(32), bytes(32), length) + text
    return draw(st.one_of(st.just(whole), damaged(whole), st.binary(max_size=300)))
