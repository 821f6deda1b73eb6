"""Strangers: what connects to a listener and does not greet, and what is dialled and does not answer."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from listening import link_threads, listening
from waiting import wait_until

from vcrd.link import HandshakeRefused
from vcrd.link import connection as wire
from vcrd.link.connection import dial

LONG = 60.0  # seconds that no test here may reach


# Strangers.

HELLO = wire._HELLO.pack(wire.MAGIC, wire.PROTOCOL, bytes(32), bytes(32), 4)
STRANGERS = {
    "silent": b"",
    "garbage": bytes(range(256)) * 8,
    "half a hello": HELLO[:50],
    "half its text": HELLO + b"{}",
    "HTTP": b"GET / HTTP/1.1\r\nHost: student\r\n\r\n",
    "too long": wire._HELLO.pack(wire.MAGIC, wire.PROTOCOL, bytes(32), bytes(32), (1 << 32) - 1)
    + bytes(4096),
    "no seal": HELLO + b"null",
}
AT_ONCE = ("garbage", "HTTP", "too long", "no seal")


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_cut_off_in_time_and_others_are_served_meanwhile(stranger, monkeypatch):
    monkeypatch.setattr(wire, "GREETING_SECONDS", 3600.0 if stranger in AT_ONCE else 1.0)
    with listening() as listener, socket.create_connection(listener.address) as sock:
        sock.settimeout(LONG)
        sock.sendall(STRANGERS[stranger])
        connection, reply = dial(listener.address, "", {"name": "honest"}, LONG)
        connection.close()
        assert reply["heard"]["name"] == "honest"
        try:
            while sock.recv(4096):  # until it is cut off: TimeoutError is none of these
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass
        wait_until(lambda: "vcrd-link-greeting" not in link_threads(), LONG, "no greeting is under way")


def test_one_byte_at_a_time_gains_no_time(monkeypatch):
    monkeypatch.setattr(wire, "GREETING_SECONDS", 1.0)
    with listening() as listener, socket.create_connection(listener.address) as sock:
        with pytest.raises(ConnectionError):
            for byte in HELLO:
                sock.sendall(bytes([byte]))
                time.sleep(0.1)


def test_two_hundred_silent_connections_keep_nobody_out():
    with listening() as listener:
        silent = [socket.create_connection(listener.address) for _ in range(200)]
        connection, _ = dial(listener.address, "", {})  # within the seconds of a greeting
        connection.close()
        for sock in silent:
            sock.close()


def test_more_silent_connections_than_there_is_room_for_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(wire, "_GREETINGS", 16)
    monkeypatch.setattr(wire, "GREETING_SECONDS", 3600.0)  # so that nothing but making room can help
    with listening() as listener:
        silent = [socket.create_connection(listener.address) for _ in range(100)]
        connection, _ = dial(listener.address, "", {}, LONG)
        connection.close()
        # A greeting whose connection was closed for another ends when its thread next runs.
        wait_until(lambda: link_threads().count("vcrd-link-greeting") <= 17, LONG, "room was made")
        for sock in silent:
            sock.close()


def test_a_crowd_of_honest_peers_waits_for_room(monkeypatch):
    monkeypatch.setattr(wire, "_GREETINGS", 2)
    monkeypatch.setattr(wire, "_PATIENCE", LONG)
    with listening() as listener, ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda i: dial(listener.address, "", {"name": i}, LONG), range(24)))
        for i, (connection, reply) in enumerate(replies):
            assert reply["heard"]["name"] == i
            connection.close()


def test_close_ends_greetings_that_are_under_way(monkeypatch):
    monkeypatch.setattr(wire, "GREETING_SECONDS", 3600.0)
    with listening() as listener:  # which says at its end that no thread is left
        silent = [socket.create_connection(listener.address) for _ in range(5)]
        wait_until(lambda: link_threads().count("vcrd-link-greeting") == 5, LONG, "they are greeted")
        listener.close()
        listener.close()
        for sock in silent:
            sock.close()


# The dialling side.


@pytest.mark.parametrize(
    ("says", "error", "reason"),
    [
        (b"", ConnectionError, "closed during the greeting"),
        (
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
            HandshakeRefused,
            "what listens there is not vcrd",
        ),
        (
            wire._GREETING.pack(wire.MAGIC, wire.PROTOCOL, bytes(32))[:30],
            ConnectionError,
            "closed during",
        ),
        (
            wire._GREETING.pack(wire.MAGIC, 1, bytes(32)),
            HandshakeRefused,
            rf"protocol version is 1 for the student and {wire.PROTOCOL} for the teacher",
        ),
        (
            wire._GREETING.pack(wire.MAGIC, wire.PROTOCOL, bytes(32)) + wire._REPLY.pack(bytes(32), 1 << 31),
            ConnectionError,
            f"a reply of {1 << 31} bytes is longer than",
        ),
        (
            wire._GREETING.pack(wire.MAGIC, wire.PROTOCOL, bytes(32))
            + wire._REPLY.pack(bytes(32), 2)
            + b"{}",
            HandshakeRefused,
            "the shared secret differs",
        ),
    ],
)
def test_what_answers_nonsense_is_one_sentence(says, error, reason):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(say, server, says)
            with pytest.raises(error, match=reason):
                dial(server.getsockname(), "", {}, LONG)


def say(server: socket.socket, text: bytes) -> None:
    sock, _ = server.accept()
    with sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass


def test_one_that_never_greets_is_given_up():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(ConnectionError, match="timed out"):
            dial(server.getsockname(), "", {}, 0.2)


@pytest.mark.parametrize(
    "address", [("127.0.0.1", 1 << 16), ("127.0.0.1", -1), ("no\0host", 1), ("." * 300, 1)]
)
def test_what_is_no_address_is_a_connection_error(address):
    with pytest.raises(ConnectionError):
        dial(address, "", {}, 1.0)


def test_a_port_that_nobody_listens_at_is_not_taken_by_dialling_it(monkeypatch):
    """The system may choose the dialled port to dial from: that connects, and nobody could listen there meanwhile."""
    itself = socket.socket()
    itself.bind(("127.0.0.1", 0))
    itself.connect(itself.getsockname())
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: itself)
    with pytest.raises(ConnectionError, match="nobody listens there"):
        dial(itself.getsockname(), "", {}, LONG)
    assert itself.fileno() == -1
