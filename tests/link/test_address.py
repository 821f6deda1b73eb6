"""Where the jobs meet: an address, or a file that says it; files of students that are gone do not keep anybody out."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from link_jobs import Layout, exchange, part
from ports import free_port

from vcrd.link import LinkError, LinkSettings, StudentLink, TeacherLink, host_rendezvous
from vcrd.link.rendezvous import candidates, outward_address, publish, withdraw

LONG = 60.0


def settings_for(address: str, **changes) -> LinkSettings:
    times = dict.fromkeys(("timeout", "connect_timeout"), LONG)
    return LinkSettings(**{"address": address, "interface": "127.0.0.1", **times, **changes})


def teacher_of(settings: LinkSettings) -> TeacherLink:
    return TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)


@pytest.mark.parametrize(
    "address",
    ["nowhere", "host:0", "file:", "file:here"],
)
def test_an_address_that_is_none_is_one_sentence(address):
    with pytest.raises(ValueError) as error:
        LinkSettings(address=address)
    expected = "host:port with a port from 1 to 65535, file:/absolute/path, cache:/absolute/path, or "
    expected += "several of them as name=address,name=address"
    assert str(error.value) == f"VCRD_ADDRESS (--vcrd-address): expected {expected}, got {address!r}"


@pytest.mark.parametrize("place", [("10.0.0.7", 29600), ("fe80::1", 1)])
def test_a_file_says_the_address_until_it_is_withdrawn(tmp_path, place):
    address = f"file:{tmp_path}/deep/address"
    with pytest.raises(ConnectionError, match="no student has written its address to .*/deep/address yet"):
        candidates(address)
    publish(address, place)
    assert candidates(address) == [place]
    assert os.listdir(tmp_path / "deep") == ["address"]
    withdraw(address, ("10.0.0.8", 29600))  # a run that was replaced leaves its successor's alone
    assert candidates(address) == [place]
    withdraw(address, place)
    withdraw(address, place)
    assert os.listdir(tmp_path / "deep") == []


@pytest.mark.parametrize("content", [b"", b"nonsense", b"host:0", b"\xff\xfe:1", b"host:99999"])
def test_a_file_that_says_something_else_says_nothing(tmp_path, content):
    (tmp_path / "address").write_bytes(content)
    with pytest.raises(ConnectionError):
        candidates(f"file:{tmp_path}/address")


def test_a_pattern_finds_the_oldest_first_and_no_drafts(tmp_path):
    for age, name in enumerate(("third", "second", "first")):
        publish(f"file:{tmp_path}/{name}", (name, 7))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / ".first.draft").write_text("draft:7\n")
    assert candidates(f"file:{tmp_path}/*") == [("first", 7), ("second", 7), ("third", 7)]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LinkError, match="^the address cannot be written to .*/file/address: "):
        host_rendezvous(settings_for(f"file:{tmp_path}/file/address"))
    with pytest.raises(LinkError, match="^address: expected one file in the student job"):
        host_rendezvous(settings_for(f"file:{tmp_path}/*"))
    with pytest.raises(LinkError, match=r"yet, within 0.2 seconds \(connect_timeout\)$"):
        settings = settings_for(f"file:{tmp_path}/none", interface=None, connect_timeout=0.2)
        StudentLink.connect(settings, **Layout().student(0))


def test_outward_is_an_address_that_can_be_listened_at():
    with socket.socket() as listener:
        listener.bind((outward_address(), 0))


def test_a_student_that_starts_again_elsewhere_is_found_by_the_teacher_that_waits(tmp_path):
    """The first one is gone without a goodbye, and its file stays."""
    settings = settings_for(f"file:{tmp_path}/address", interface=None)
    rendezvous = host_rendezvous(settings)
    first = candidates(settings.address)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(teacher_of, settings)
        student = StudentLink.connect(settings, **Layout().student(0))
        teacher = coming.result()
        exchange(student, teacher, 0)
        left = Path(tmp_path / "address").read_text()
        student._connections.drop()
        rendezvous.close()
        Path(tmp_path / "address").write_text(left)
        waiting = pool.submit(teacher.next_batch, 1)
        rendezvous = host_rendezvous(settings)
        assert candidates(settings.address) != first
        student = StudentLink.connect(settings, **Layout().student(0))
        student.request(torch.zeros(1, 4, dtype=torch.long))
        (request,) = waiting.result()
        teacher.respond(request, torch.ones(4, 1, 50))
        student.receive(0)
    part(student, teacher)
    rendezvous.close()
    assert os.listdir(tmp_path) == []


def test_a_teacher_with_a_pattern_passes_over_a_student_that_was_killed(tmp_path):
    publish(f"file:{tmp_path}/killed", ("127.0.0.1", free_port()))
    os.utime(tmp_path / "killed", (1, 1))
    settings = settings_for(f"file:{tmp_path}/alive")
    with closing(host_rendezvous(settings)), ThreadPoolExecutor(1) as pool:
        coming = pool.submit(teacher_of, settings_for(f"file:{tmp_path}/*"))
        student = StudentLink.connect(settings, **Layout().student(0))
        teacher = coming.result()
        exchange(student, teacher, 0)
        part(student, teacher)
    assert os.listdir(tmp_path) == ["killed"]
