"""Tensors travel whole, in order and untouched, by NCCL's rules; and where NCCL fails, over TCP with its words."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from link_jobs import Layout, connected, exchange, part
from ports import free_port
from waiting import wait_until

from vcrd.link import (
    HandshakeRefused,
    LinkError,
    LinkSettings,
    StudentLink,
    StudentLost,
    TeacherLink,
    TeacherLost,
    TeacherPlace,
    host_rendezvous,
    teacher_session,
)
from vcrd.link.connection import HEADER_BYTES, Connection, Header, Kind
from vcrd.link.handshake import Handshake, refusal, transport_of
from vcrd.link.transport import fake, nccl, opening
from vcrd.link.transport.nccl import CommunicatorError
from vcrd.link.transport.opening import Endpoint, Receiver, Sender
from vcrd.link.transport.tcp import Stripes, stripes_to

LONG = 60.0
DTYPES = (torch.float32, torch.float16, torch.uint8, torch.int32, torch.bfloat16)


def connections() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        return Connection(left), Connection(server.accept()[0])


class Pair:
    """Both ends of one transport, each used by one thread."""

    def __init__(self, name: str, sockets: int = 1) -> None:
        left, right = connections()
        endpoint = Endpoint(name, torch.device("cpu"), sockets=sockets)
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self.sender = self.send_thread.submit(Sender, left, endpoint).result()
        self.receiver = self.receive_thread.submit(Receiver, right, endpoint).result()
        opening = self.send_thread.submit(self.sender.open, name)
        while self.receiver.transport is None:  # twice, where the sender says something else
            self.receive_thread.submit(lambda: self.receiver.switch(right.receive_header())).result(LONG)
        assert opening.result(LONG) == ""

    @property
    def send_thread(self) -> ThreadPoolExecutor:
        return self.threads[0]

    @property
    def receive_thread(self) -> ThreadPoolExecutor:
        return self.threads[1]

    def send(self, header: Header, tensors) -> None:
        transport = self.sender.transport
        parts = [transport.stage(tensor) for tensor in tensors]
        self.sending = self.send_thread.submit(transport.send, header, parts, seconds=LONG)

    def receive(self, tensors: list[torch.Tensor], columns: slice | None = None) -> Header:
        def run() -> Header:
            header = self.receiver.connection.receive_header()
            self.receiver.transport.receive(tensors, columns)
            return header

        self.receiving = self.receive_thread.submit(run)
        return self.receiving

    def close(self) -> None:
        for thread, end in zip(self.threads, (self.sender, self.receiver), strict=True):
            thread.submit(end.close).result(LONG)
            thread.shutdown()


@contextmanager
def pair(name: str, sockets: int = 1) -> Iterator[Pair]:
    both = Pair(name, sockets)
    try:
        yield both
    finally:
        both.close()


@pytest.mark.parametrize("name", ["tcp", "fake"])
def test_what_is_sent_arrives_where_it_belongs_whatever_its_shape(name):
    dice, carried = random.Random(3), 0
    with pair(name) as both:
        for number in range(25):
            width, spare = dice.randint(0, 9), dice.choice([0, 0, 4])
            first = dice.randint(0, spare)
            columns = slice(first, first + width) if spare else None
            sent, wanted, received = [], [], []
            for _ in range(3):
                shape, dtype = [dice.randint(1, 5), dice.randint(1, 3), width], dice.choice(DTYPES)
                tensor = (100 * torch.rand(shape)).to(dtype)
                into = torch.zeros([*shape[:-1], width + spare], dtype=dtype)
                expected = into.clone()
                expected[..., first : first + width] = tensor
                sent.append(tensor)
                carried += tensor.nbytes
                wanted.append(expected)
                received.append(into)
            header = Header(Kind.RESPONSE, number)
            both.receive(received, columns)
            both.send(header, sent)
            both.sending.result(LONG)
            assert both.receiving.result(LONG) == header
            for into, expected in zip(received, wanted, strict=True):
                assert torch.equal(into, expected)
        sent, received = both.sender.connection.sent, both.receiver.connection.received
        assert sent == received == 25 * HEADER_BYTES + carried


def test_a_piece_larger_than_what_is_read_at_once_arrives_in_its_columns():
    tensor = torch.arange(3 * 2**21).view(6, 1, -1).to(torch.int32)
    for name in ("tcp", "fake"):
        into = torch.zeros(6, 1, 2**20 + 7, dtype=torch.int32)
        with pair(name) as both:
            both.receive([into], slice(5, 5 + tensor.shape[-1]))
            both.send(Header(Kind.RESPONSE), [tensor])
            both.sending.result(LONG), both.receiving.result(LONG)
        assert torch.equal(into[..., 5 : 5 + tensor.shape[-1]], tensor)


@pytest.mark.parametrize("shape", [(7, 1, 1 << 19), (1 << 20, 1), (1 << 22,), (3, 5, 7), (1, 1, 1 << 22)])
def test_large_tensors_are_divided_among_several_connections(shape):
    tensor = (torch.arange(torch.Size(shape).numel()) % 8191).float().view(shape)
    into = [torch.zeros(shape)]
    if len(shape) > 1:  # and once into columns of what is wider
        wide = torch.zeros(*shape[:-1], shape[-1] + 3)
        into.append(wide)
    with pair("tcp", sockets=3) as both:
        used = both.sender.connection.stripes
        assert len(used) == 2
        for number, target in enumerate(into):
            columns = slice(1, 1 + shape[-1]) if target.shape != tensor.shape else None
            both.receive([target], columns)
            both.send(Header(Kind.RESPONSE, number), [tensor])
            both.sending.result(LONG), both.receiving.result(LONG)
            got = target if columns is None else target[..., columns]
            assert torch.equal(got, tensor) and int(target.count_nonzero()) == int(tensor.count_nonzero())
        large = tensor.nbytes >= 8 << 20 and (len(shape) == 1 or tensor.shape[:-1].numel() > 1)
        assert [stripe.sent > 0 for stripe in used] == [large, large and tensor.nbytes >= 12 << 20]
        counted = both.sender.connection.sent, both.receiver.connection.received
        assert counted == (len(into) * (tensor.nbytes + HEADER_BYTES),) * 2


def test_a_connection_that_breaks_ends_the_others():
    tensor = torch.zeros(1 << 24)
    with pair("tcp", sockets=2) as both:
        both.send(Header(Kind.RESPONSE), [tensor])
        (stripe,) = both.receiver.connection.stripes
        stripe.end()
        both.receive([torch.zeros(1 << 24)])
        with pytest.raises(ConnectionError):
            both.receiving.result(LONG)


@pytest.mark.parametrize("stranger", [b"", bytes(17), b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_at_the_port_of_the_stripes_is_not_taken_for_one(stranger):
    left, right = connections()
    with Stripes(right) as coming, ThreadPoolExecutor(1) as pool:
        port = json.loads(coming.invitation)["port"]
        accepting = pool.submit(coming.accept, 1, LONG)
        with socket.create_connection(("127.0.0.1", port)) as unknown:
            unknown.sendall(stranger)
            with suppress(OSError):  # it is shown the door at once
                unknown.shutdown(socket.SHUT_WR)
            (mine,) = stripes_to(left, coming.invitation, 1, LONG)
            (theirs,) = accepting.result(LONG)
        mine.send_bytes(b"hello", seconds=LONG)
        got = bytearray(5)
        theirs.receive(got)
        assert got == b"hello"
    for each in (left, right, mine, theirs):
        each.close()


@pytest.mark.parametrize("end", ["stripes_to", "Stripes"])
def test_where_no_more_connections_can_be_made_one_is_used(end, monkeypatch, caplog):
    def refused(*_):
        raise OSError("no more connections to 127.0.0.1: a firewall")

    monkeypatch.setattr(opening, end, refused)
    with pair("tcp", sockets=4) as both:
        assert both.sender.connection.stripes == both.receiver.connection.stripes == ()
        into = torch.zeros(1 << 22)
        both.receive([into])
        both.send(Header(Kind.RESPONSE), [torch.ones(1 << 22)])
        both.sending.result(LONG), both.receiving.result(LONG)
        assert into.all()
    assert "one connection instead of 4 is used: no more connections to 127.0.0.1: a firewall" in caplog.text


def test_an_end_that_waits_for_a_transfer_sees_that_the_other_one_is_gone():
    """NCCL itself would wait on: the fake does."""
    with pair("fake") as both:
        both.send(Header(Kind.RESPONSE), [torch.ones(4)])
        both.sender.connection.end()
        with pytest.raises(ConnectionError):
            both.sending.result(LONG)
    with pair("fake") as both:
        both.receive([torch.zeros(4)])
        both.sender.connection.send(Header(Kind.RESPONSE), seconds=LONG)
        both.sender.connection.end()
        with pytest.raises(ConnectionError, match="the other end closed"):
            both.receiving.result(LONG)


def test_a_send_that_nobody_takes_ends_in_time():
    with pair("fake") as both:
        transport = both.sender.transport
        parts = [transport.stage(torch.ones(4))]
        sending = both.send_thread.submit(transport.send, Header(Kind.RESPONSE), parts, seconds=0.2)
        with pytest.raises(TimeoutError, match="did not take what was sent within 0.2 seconds"):
            sending.result(LONG)


def test_streams_are_kept_and_sockets_and_threads_are_not():
    def left() -> tuple[int, int]:
        return threading.active_count(), len(fake.FakeLibrary._free)

    with pair("fake"):
        pass
    before = left()
    for _ in range(20):
        with pair("fake"):
            pass
    assert left() == before


def breaks(rule: str):
    return pytest.raises(fake.RuleBroken, match=rule)


class Library(fake.FakeLibrary):
    """Both ends of a communicator in this process, made and settled."""

    def both(self) -> tuple[fake.FakeCommunicator, fake.FakeCommunicator]:
        unique_id = self.unique_id()
        ends = self.communicator(0, unique_id), self.communicator(1, unique_id)
        for end in ends:
            wait_until(end.settled, LONG, "a communicator is made")
        return ends


@pytest.fixture
def ends():
    library = Library()
    made = library.both()
    streams = library.stream(), library.stream()
    yield *made, *streams
    for end, stream in zip(made, streams, strict=True):
        end.abort()
        library.give_back(stream)
    fake.broken.clear()


@pytest.mark.parametrize(
    ("sent", "received", "rule"),
    [
        (torch.ones(8), torch.ones(4), "sends 8 elements of torch.float32, transfer 0 receives 4"),
        (torch.ones(8), torch.ones(8).int(), "receives 8 of torch.int32"),
    ],
)
def test_sides_that_do_not_agree_break_a_rule(ends, sent, received, rule):
    left, right, one, other = ends
    left.send(sent, one)
    right.receive(received, other)
    wait_until(lambda: fake.broken, LONG, "the rule is broken")
    assert rule in fake.broken[0]


def test_a_tensor_that_is_touched_while_it_travels_breaks_a_rule(ends):
    left, right, one, other = ends
    sent, received = torch.ones(1 << 20), torch.zeros(1 << 20)
    left.send(sent, one)
    wait_until(lambda: select.select([right._socket], [], [], 0)[0], LONG, "the transfer has begun")
    sent[5] = 2.0
    right.receive(received, other)
    wait_until(lambda: fake.broken, LONG, "the rule is broken")
    assert fake.broken == ["a tensor was changed while it was sent"]
    fake.broken.clear()


def test_a_destination_that_is_written_to_meanwhile_breaks_a_rule(ends):
    left, right, one, other = ends
    received = torch.zeros(1 << 10)
    right.receive(received, other)
    wait_until(lambda: received[0] != 0.0, LONG, "the transfer has begun")
    received[7] = 1.0
    left.send(torch.ones(1 << 10), one)
    wait_until(lambda: fake.broken, LONG, "the rule is broken")
    assert fake.broken == ["a tensor was written to while it was received into"]


def test_each_call_that_nccl_forbids_breaks_a_rule(ends):
    left, _, stream, other = ends
    with breaks("without elements"):
        left.send(torch.empty(0), stream)
    with breaks("not contiguous"):
        left.send(torch.ones(4, 4).T, stream)
    with breaks("a thread that did not make it"), ThreadPoolExecutor(1) as pool:
        pool.submit(left.send, torch.ones(4), stream).result()
    left.send(torch.ones(4), stream)
    left._calls_settle_at = time.monotonic() + LONG
    stream.in_progress = lambda: True
    with breaks("while its last call was in progress"):
        left.send(torch.ones(4), stream)
    with breaks("a stream was given work while a call"):
        stream.record()


HANDSHAKE = dict(
    vocab_size=8,
    sequence_length=4,
    payload="float16",
    max_tokens=64,
    padded_vocab_size=8,
    tensor_size=1,
    copies=1,
)


def sides(student: tuple[str, int], teacher: tuple[str, int]) -> tuple[Handshake, Handshake]:
    return tuple(Handshake(**HANDSHAKE, transport=said, nccl=version) for said, version in (student, teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "transport", "reason"),
    [
        (("auto", 22809), ("auto", 22809), "nccl", ""),
        (("auto", 22809), ("nccl", 22809), "nccl", ""),
        (("auto", 0), ("auto", 0), "tcp", ""),
        (("tcp", 0), ("auto", 22809), "tcp", ""),
        (("fake", 1), ("fake", 1), "fake", ""),
        (
            ("auto", 22809),
            ("auto", 23005),
            "tcp",
            "NCCL is 2.28.9 for the student and 2.30.5 for the teacher",
        ),
        (
            ("auto", 0),
            ("auto", 22809),
            "tcp",
            "NCCL is not available for the student and 2.28.9 for the teacher",
        ),
    ],
)
def test_two_jobs_take_the_best_transport_that_both_can(student, teacher, transport, reason):
    handshake = sides(student, teacher)
    assert refusal(*handshake, 1) is None
    assert transport_of(*handshake) == (transport, reason)
    assert transport_of(*reversed(handshake))[0] == transport


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        (("nccl", 22809), ("tcp", 0), "transport is nccl for the student and tcp for the teacher"),
        (("fake", 1), ("auto", 0), "transport is fake for the student and auto for the teacher"),
        (
            ("nccl", 22809),
            ("auto", 0),
            "transport is nccl, and NCCL is 2.28.9 for the student and not available for the teacher",
        ),
    ],
)
def test_jobs_that_insist_on_what_cannot_be_are_refused(student, teacher, reason):
    assert refusal(*sides(student, teacher), 1) == f"the link is refused: {reason}"


SIZES = dict(vocab_size=8, padded_vocab_size=8, sequence_length=4)


def test_nccl_needs_a_gpu():
    settings = LinkSettings(transport="nccl")
    refused = pytest.raises(
        ValueError,
        match="transport: expected 'auto' or 'tcp' where this rank computes on cpu, not on a GPU, got 'nccl'",
    )
    with refused:
        StudentLink.connect(settings, **SIZES, tensor_rank=0, tensor_size=1, data_rank=0, data_size=1)
    with refused:
        TeacherLink.connect(
            settings, **SIZES, place=TeacherPlace(), group=None, tensor_group=None, device="cpu"
        )
    with pytest.raises(
        ValueError, match="VCRD_TRANSPORT .*: expected one of auto, nccl, tcp, fake, got 'rdma'"
    ):
        LinkSettings(transport="rdma")


def test_the_binding_finds_the_nccl_that_torch_brings_or_says_what_is_missing():
    if importlib.util.find_spec("nccl") is None:
        with pytest.raises(
            ImportError, match=r"the package nccl4py cannot be imported \(pip install 'vcrd\[nccl\]'\)"
        ):
            nccl.version()
        return
    major, minor, patch = torch.cuda.nccl.version()
    assert nccl.version() == 10000 * major + 100 * minor + patch


@contextmanager
def failing(monkeypatch, rank: int, words: str):
    """One end's communicator cannot be made."""
    make = fake.FakeLibrary.communicator

    def communicator(self, own: int, unique_id: bytes):
        if own == rank:
            raise CommunicatorError(words)
        return make(self, own, unique_id)

    monkeypatch.setattr(fake.FakeLibrary, "communicator", communicator)
    yield


WORDS = "NCCL: SystemError: no route to host"


@pytest.mark.parametrize("rank", [0, 1], ids=["the teacher's end", "the student's end"])
def test_where_nccl_fails_tensors_travel_over_tcp_and_its_words_are_logged_once(monkeypatch, caplog, rank):
    settings = LinkSettings(address=f"127.0.0.1:{free_port()}", transport="fake", timeout=LONG)
    caplog.set_level(logging.WARNING, "vcrd")
    with failing(monkeypatch, rank, WORDS):
        rendezvous = host_rendezvous(settings)
        student, teacher = connected(settings)
        for number in range(3):
            exchange(student, teacher, number)
        part(student, teacher)
        rendezvous.close()
    assert "student data rank 0, tensor rank 0: " + WORDS in caplog.text
    assert caplog.text.count(WORDS) == 2  # once in each job


def test_whatever_breaks_while_a_transport_opens_is_told_to_the_other_ranks_of_the_replica():
    class ReplicaGroup:
        def conclude(self, outcome, text: str) -> None:
            raise LinkError(f"{outcome.name}: {text}")

    class ResponseSender:
        def open(self, *_) -> str:
            raise RuntimeError("out of memory")

    with pytest.raises(
        LinkError, match=r"BROKEN: .* cannot open its transports: RuntimeError\('out of memory'\)"
    ):
        teacher_session._opened(ReplicaGroup(), SimpleNamespace(responses=ResponseSender()), "nccl", "")


def test_a_student_that_is_gone_when_it_is_refused_keeps_no_rank_of_the_replica_waiting(monkeypatch):
    """The other ranks of the replica are in the collective that says why; this one must come to it too."""
    monkeypatch.setattr("vcrd.link.teacher_session._INSISTING", ("nccl", "fake"))
    endpoint = Endpoint("fake", torch.device("cpu"))
    handshake = SimpleNamespace(transport="fake", ranks=1, nccl=endpoint.nccl_version)
    concluded = []

    class ReplicaGroup:
        leads = True

        def conclude(self, outcome, text: str) -> None:
            concluded.append(outcome.name)
            if outcome.name != "DONE":
                raise HandshakeRefused(text)

        def first_text(self, text: str) -> str:
            return text

    class ResponseSender:
        def open(self, *_) -> str:
            return WORDS

        def refuse(self, reason: str) -> None:
            raise StudentLost("student data rank 0, tensor rank 0 closed its connection")

    replica = SimpleNamespace(responses=ResponseSender())
    with pytest.raises(HandshakeRefused, match=WORDS):
        teacher_session._open_transports(
            SimpleNamespace(), handshake, handshake, ReplicaGroup(), replica, endpoint
        )
    assert concluded == ["DONE", "REFUSED"]


@pytest.mark.parametrize("reason", ["x" * 1024, "\N{SNOWMAN}" * 341, '"' * 1024])
def test_a_reason_of_any_length_and_letters_fits_a_header(reason):
    left, right = connections()
    endpoint = Endpoint("tcp", torch.device("cpu"))
    receiver = Receiver(right, endpoint)
    with ThreadPoolExecutor(1) as pool:
        opening_it = pool.submit(Sender(left, endpoint).open, "tcp", reason)
        receiver.switch(right.receive_header())
        assert opening_it.result(LONG) == ""
    assert receiver.reason and reason.startswith(receiver.reason)
    left.close()
    right.close()


def test_one_pair_that_fails_takes_all_of_the_replica_to_tcp(monkeypatch, caplog):
    """Tensors of one response never come by two ways."""
    settings = LinkSettings(address=f"127.0.0.1:{free_port()}", transport="fake", timeout=LONG)
    layout, names = Layout(student_tensor=2, vocab=50), []
    made: list[int] = []
    make = fake.FakeLibrary.communicator

    def communicator(self, own: int, unique_id: bytes):
        made.append(own)
        if own == 1 and made.count(1) == 2:
            raise CommunicatorError(WORDS)
        return make(self, own, unique_id)

    monkeypatch.setattr(fake.FakeLibrary, "communicator", communicator)
    arrived = Receiver.switch

    def switch(self, header, **kwargs):
        arrived(self, header, **kwargs)
        names.append(self.transport.name if self.transport else None)

    monkeypatch.setattr(Receiver, "switch", switch)
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        teacher = TeacherLink.connect(settings, **layout.teacher(0, 0), group=None, tensor_group=None)
        students = [each.result(LONG) for each in coming]
    wait_until(lambda: len(names) == 4, LONG, "both ranks have heard twice")
    assert sorted(names[:2], key=str) == [None, "fake"] and names[2:] == ["tcp", "tcp"]
    for student in students:
        student.close()
    teacher.close()
    rendezvous.close()


def test_a_job_that_insists_ends_with_the_words_of_nccl(monkeypatch):
    """As "nccl" does, for which "fake" stands here."""
    monkeypatch.setattr("vcrd.link.teacher_session._INSISTING", ("nccl", "fake"))
    settings = LinkSettings(address=f"127.0.0.1:{free_port()}", transport="fake", timeout=LONG)
    with failing(monkeypatch, 0, WORDS), ThreadPoolExecutor(1) as pool:
        rendezvous = host_rendezvous(settings)
        coming = pool.submit(StudentLink.connect, settings, **Layout().student(0))
        with pytest.raises(HandshakeRefused, match=f"transport is 'fake', and .*{WORDS}"):
            TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)
        with pytest.raises(TeacherLost, match=f"the link is refused: transport is 'fake', and .*{WORDS}"):
            student = coming.result(LONG)
            student.request(torch.zeros(1, 4, dtype=torch.long))
            student.receive(0)
        rendezvous.close()
