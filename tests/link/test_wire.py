"""Greetings, the shared secret, and interfaces. Strangers stand in test_strangers.py."""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from link_jobs import Layout, connected, exchange, part
from listening import link_threads, listening
from ports import free_port

from vcrd.link import (
    HandshakeRefused,
    LinkError,
    LinkSettings,
    StudentLink,
    TeacherLink,
    host_rendezvous,
)
from vcrd.link import connection as wire
from vcrd.link.connection import dial, memory
from vcrd.link.rendezvous import candidates, local_host
from vcrd.settings import DistillSettings

LONG = 60.0  # seconds that no test here may reach
SECRET = "correct horse battery staple"


def settings_for(**changes) -> LinkSettings:
    return LinkSettings(
        **(dict(address=f"127.0.0.1:{free_port()}", timeout=LONG, connect_timeout=LONG) | changes)
    )


# The secret.


def secret_of(kind: str, tmp_path) -> dict:
    if kind == "file":
        (tmp_path / "secret").write_text(f"  {SECRET}\n")
        return {"secret_file": str(tmp_path / "secret")}
    return {"secret": kind}


@pytest.mark.parametrize("student", [SECRET, "file"])
@pytest.mark.parametrize("teacher", [SECRET, "file"])
def test_who_knows_the_secret_joins(student, teacher, tmp_path):
    both = settings_for(**secret_of(student, tmp_path))
    rendezvous = host_rendezvous(both)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(join_as_teacher, both, secret_of(teacher, tmp_path))
        link = StudentLink.connect(both, **Layout().student(0))
        exchange(link, coming.result(), 0)
        part(link, coming.result())
    rendezvous.close()


@pytest.mark.parametrize(("student", "teacher"), [(SECRET, "wrong"), (SECRET, ""), ("", SECRET)])
def test_who_does_not_is_turned_away_and_the_student_waits_on(student, teacher, caplog):
    caplog.set_level(logging.DEBUG, "vcrd")
    settings = settings_for(secret=student)
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(StudentLink.connect, settings, **Layout().student(0))
        for _ in range(2):
            with pytest.raises(
                HandshakeRefused, match="refused: the shared secret differs from the other side's"
            ):
                join_as_teacher(settings, {"secret": teacher})
            assert not coming.done()
        right = join_as_teacher(settings, {})
        exchange(coming.result(), right, 0)
        part(coming.result(), right)
    rendezvous.close()
    assert "is refused: its shared secret differs" in caplog.text
    assert SECRET not in caplog.text and "wrong" not in caplog.text


def test_a_stranger_cannot_end_a_student_that_is_linked():
    """Neither at the rendezvous nor at the student's own port, in whatever role, and not with what it overheard."""
    settings = settings_for(secret=SECRET)
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    for address in (*candidates(settings.address), student._connections.address):
        for role in ("student", "peer", "teacher", "requests", "sender"):
            hello = {
                "run": "vcrd",
                "role": role,
                "epoch": 1 << 40,
                "replica": 0,
                "place": [0, 0, 0],
                "sender": 0,
            }
            with pytest.raises(HandshakeRefused, match="the shared secret differs"):
                dial(address, "guessed", hello)
    exchange(student, teacher, 0)
    part(student, teacher)
    rendezvous.close()


def test_a_greeting_that_was_overheard_cannot_be_said_again():
    with listening(SECRET) as listener, socket.socket() as tap:
        overheard = bytearray()
        tap.bind(("127.0.0.1", 0))
        tap.listen()

        def relay() -> None:
            """Between the one who knows the secret and the listener."""
            near, _ = tap.accept()
            with near, socket.create_connection(listener.address) as far:
                near.sendall(exactly(far, wire._GREETING.size))
                overheard.extend(exactly(near, 80))
                (length,) = wire._REPLY.unpack(bytes(32) + bytes(overheard[-4:]))[1:]
                overheard.extend(exactly(near, length))
                far.sendall(overheard)
                while data := far.recv(1 << 16):
                    near.sendall(data)

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(relay)
            _, reply = dial(tap.getsockname(), SECRET, {"name": "known"})
            done.result()
        assert reply["heard"]["name"] == "known"
        with socket.create_connection(listener.address) as again:
            exactly(again, 44)
            again.sendall(overheard)
            seal, length = wire._REPLY.unpack(exactly(again, 36))
            assert exactly(again, length) == b"{}"  # as to whoever does not know the secret


def exactly(sock: socket.socket, count: int) -> bytes:
    sock.settimeout(LONG)
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, f"it closed after {len(data)} of {count} bytes"
        data += chunk
    return data


def join_as_teacher(settings: LinkSettings, changes: dict) -> TeacherLink:
    if changes:
        changes = {"secret": "", "secret_file": None} | changes
    settings = LinkSettings(**(vars(settings) | changes))
    return TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)


@pytest.mark.parametrize("content", [None, "", " \n", b"\xff\xfe\xfd"])
def test_a_secret_file_that_holds_none_is_one_sentence_everywhere(content, tmp_path):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = settings_for(secret_file=str(path))
    files = len(os.listdir("/proc/self/fd"))
    for join in (
        lambda: host_rendezvous(settings),
        lambda: StudentLink.connect(settings, **Layout().student(0)),
        lambda: join_as_teacher(settings, {}),
    ):
        with pytest.raises(ValueError, match=r"^VCRD_SECRET_FILE \(.*\): expected a file that .*secret'"):
            join()
    assert link_threads() == [] and len(os.listdir("/proc/self/fd")) == files


def test_the_secret_comes_from_the_environment_and_is_never_shown(caplog, tmp_path):
    settings = DistillSettings.from_environment({"VCRD_SECRET": SECRET})
    assert settings.link.shared_secret() == SECRET
    (tmp_path / "secret").write_text(SECRET)
    in_file = DistillSettings.from_environment({"VCRD_SECRET_FILE": str(tmp_path / "secret")})
    assert in_file.link.shared_secret() == SECRET
    for shown in (settings, in_file, settings.link, settings.replaced(credits=3)):
        assert SECRET not in repr(shown) and SECRET not in str(shown)
    with pytest.raises(
        ValueError, match="VCRD_SECRET_FILE .*: expected none where VCRD_SECRET is set, got both"
    ) as error:
        DistillSettings.from_environment({"VCRD_SECRET": SECRET, "VCRD_SECRET_FILE": "x"})
    assert SECRET not in str(error.value)
    assert SECRET not in caplog.text


def test_a_secret_that_is_not_utf8_works():
    # As os.environ holds bytes that are no UTF-8.
    secret = b"\xff\xfe".decode(errors="surrogateescape")
    with listening(secret) as listener:
        connection, _ = dial(listener.address, secret, {})
        connection.close()


def test_a_teacher_of_another_version_that_came_first_is_told_of_to_the_student():
    """It knows from the greeting that it is refused, and does not wait for a student to be there."""
    settings = settings_for()
    rendezvous = host_rendezvous(settings)
    hello = {"run": settings.name, "role": "teacher", "replica": 0, "handshake": {}, "protocol": 1}
    rendezvous._answer(hello)
    reason = f"protocol version is {wire.PROTOCOL} for the student and 1 for the teacher"
    with pytest.raises(HandshakeRefused, match=f"^the link is refused: {reason}$"):
        StudentLink.connect(settings, **Layout().student(0))
    rendezvous.close()


# Interfaces.


@pytest.mark.parametrize(
    ("interface", "host"), [("lo", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), (None, "127.0.0.1")]
)
def test_each_rank_listens_on_its_interface_only(interface, host):
    settings = settings_for(interface=interface)
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    address = student._connections.address
    assert address[0] == host
    # Asked of this process: another one may listen at the same port of another address.
    ours = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [place.ip for place in ours if place.port == address[1]] == [host]
    exchange(student, teacher, 0)
    part(student, teacher)
    rendezvous.close()


def test_an_interface_that_does_not_exist_is_named():
    with pytest.raises(LinkError, match=r"interface: expected an IP address or one of .*lo.*, got 'ib7'"):
        StudentLink.connect(settings_for(interface="ib7"), **Layout().student(0))
    with pytest.raises(LinkError, match=r"192.0.2.1:0 cannot be listened at"):  # reserved for documentation
        StudentLink.connect(settings_for(interface="192.0.2.1"), **Layout().student(0))
    assert local_host(settings_for(interface="::1")) == "::1"


def test_bytes_of_a_tensor_are_shared_not_copied():
    source, target = torch.arange(6.0), torch.zeros(6)
    memory(target)[:] = memory(source)
    assert torch.equal(source, target) and len(memory(torch.zeros(0))) == 0
    with pytest.raises(ValueError, match="part: expected a contiguous tensor on the CPU"):
        memory(torch.zeros(4, 4).T)
