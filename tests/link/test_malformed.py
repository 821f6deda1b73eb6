"""Headers that lie, in every direction: refused with a reason before anything is allocated, and survived."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from link_jobs import Layout, exchange, part
from listening import link_threads
from ports import free_port
from waiting import wait_until

from vcrd.link import (
    Head,
    LinkError,
    LinkSettings,
    StudentLink,
    StudentLost,
    TeacherLink,
    handshake,
    host_rendezvous,
)
from vcrd.link import connection as wire
from vcrd.link.connection import Connection, Header, Kind, dial
from vcrd.link.handshake import Handshake
from vcrd.link.plan import Place
from vcrd.link.rendezvous import ask_until
from vcrd.link.requests import RequestReceiver
from vcrd.link.respond import ResponseSender
from vcrd.link.transport.opening import Endpoint, Receiver
from vcrd.link.transport.tcp import TcpTransport

LONG = 60.0  # a time-out that no test here may reach
ENDPOINT = Endpoint("auto", torch.device("cpu"))
STUDENT = Handshake(9, 16, "float16", 64, 9, tensor_size=1, copies=1, credits=2, teacher_context_length=3)


@pytest.fixture(autouse=True)
def small_micro_batches(monkeypatch):
    """Headers may say 64 tokens at most."""
    monkeypatch.setattr(handshake, "MOST_TOKENS", 64)


def link_settings(**changes) -> LinkSettings:
    times = dict.fromkeys(("timeout", "connect_timeout"), LONG)
    return LinkSettings(**(dict(address=f"127.0.0.1:{free_port()}") | times | changes))


def pair() -> tuple[Connection, Connection]:
    """Two ends of one connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        return Connection(near), Connection(far)


def opened(connections: dict[Place, Connection], timeout: float, *students: Connection) -> ResponseSender:
    """A responses over TCP, to students that agree to that."""
    responses = ResponseSender(connections, dict.fromkeys(connections, 0), timeout, ENDPOINT)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(responses.open, "tcp")
        for student in students:
            Receiver(student, ENDPOINT).switch(student.receive_header())
        assert opening.result() == ""
    responses.begin()
    return responses


def changed(header: Header, **changes) -> bytes:
    return raw(*{**vars(header), **changes}.values())


def raw(kind: int, *fields: int, magic: bytes = wire.MAGIC, protocol: int = wire.PROTOCOL) -> bytes:
    """A header without the checks of its making."""
    return wire._HEADER.pack(magic, protocol, kind, *fields)


def let_in(address: list, hello: dict) -> Connection:
    """Asks until the student is no longer busy: it may not yet have noticed that the last one is gone, or, for
    a sender, not yet have taken in the first rank that it has welcomed."""
    deadline = time.monotonic() + LONG
    while True:
        connection, said = dial(tuple(address), "", hello)
        if said["state"] == "welcome":
            return connection
        connection.close()
        assert said == {"state": "busy"} and time.monotonic() < deadline, said
        time.sleep(0.01)


class FalseTeacher:
    """A teacher of one rank up to where it says it is ready; what it sends then is the test's to choose."""

    def __init__(self, settings: LinkSettings, head: Head | None = None) -> None:
        sizes = dict(vocab_size=50, sequence_length=16, padded_vocab_size=50, tensor_size=1, copies=1)
        handshake = Handshake.of(settings, **sizes, head=head)
        own = {
            "replica": 0,
            "handshake": handshake.plain(),
            "sender": 0,
            "run": settings.name,
            "digest": "none",
        }
        reply, _ = ask_until(settings, {"role": "teacher", **own}, lambda r: r["state"] == "ready", LONG)
        (address,) = reply["addresses"]
        hello = {**own, "epoch": reply["epoch"]}
        self.requests = let_in(address, {**hello, "role": "requests"})
        self.sender = let_in(address, {**hello, "role": "sender"})
        over_tcp = b'{"reason": "", "sockets": 1}'
        self.sender.send(Header(Kind.TRANSPORT, 1, length=len(over_tcp)), over_tcp, seconds=LONG)
        assert self.sender.receive_header() == Header(Kind.TRANSPORT, 1)
        self.requests.send(Header(Kind.READY), seconds=LONG)

    def await_request(self) -> Header:
        header = self.requests.receive_header()
        self.requests.receive(bytearray(4 * (header.tokens + header.boundaries + 2 * header.context)))
        return header

    def close(self) -> None:
        self.requests.close()
        self.sender.close()


GOOD_RESPONSE = Header(Kind.RESPONSE, 0, sequence=4, batch=2, start=0, stop=50, payload=1)
GOOD_REQUEST = Header(Kind.REQUEST, 0, sequence=4, batch=2)
NO_HEADER = [
    (bytes(wire.HEADER_BYTES), "it does not begin with the link's mark"),
    (raw(2, *[0] * 9, protocol=9), f"its protocol version is 9, not {wire.PROTOCOL}"),
    (raw(77, *[0] * 9), "its kind 77 does not exist"),
    (changed(GOOD_RESPONSE, batch=1 << 62), "one of its fields is out of range"),
    (changed(GOOD_RESPONSE, batch=-1), "one of its fields is out of range"),
    (changed(GOOD_RESPONSE, length=5), "its text of 5 bytes is longer than 1024 or out of place"),
    (changed(Header(Kind.LOST), length=1025), "its text of 1025 bytes is longer than 1024 or out of place"),
]
NO_RESPONSE = [
    *NO_HEADER,
    (changed(GOOD_RESPONSE, kind=Kind.REQUEST), "a request from there is not expected"),
    (changed(Header(Kind.LOST, 1)), "a lost from there is not expected"),
    (changed(Header(Kind.HEAD, 8, start=0, stop=50)), "a head from there is not expected"),
    (changed(GOOD_RESPONSE, batch=1 << 40), f"its batch of {1 << 40} x 4 tokens is not from 1 to 64 tokens"),
    (changed(GOOD_RESPONSE, batch=0), "its batch of 0 x 4 tokens is not from 1 to 64 tokens"),
    (changed(GOOD_RESPONSE, sequence=17), "its sequence length 17 is not from 1 to 16"),
    (changed(GOOD_RESPONSE, boundaries=9), "its 9 boundaries are more than 4 tokens have"),
    (changed(GOOD_RESPONSE, stop=51), "its columns 0:51 are not 0:50"),
    (changed(GOOD_RESPONSE, payload=2), "its payload code 2 is not 1"),
    (changed(GOOD_RESPONSE, number=1), "its number 1 is not the next one, 0"),
    (changed(Header(Kind.TRANSPORT, 1)), "its description of its connections cannot be read"),
    (changed(Header(Kind.TRANSPORT, 9)), "its transport code 9 is not expected"),
    (changed(Header(Kind.TRANSPORT, 2)), "its transport code 2 is not expected"),
    (changed(GOOD_RESPONSE, batch=1), r"its shape (4, 1) is not (4, 2), which was asked for"),
]
NOT_FROM_INTAKE = [
    *NO_HEADER[:2],
    (changed(GOOD_RESPONSE), "a response from there is not expected"),
    (changed(Header(Kind.JOIN, 1)), "a join from there is not expected"),
]


def test_what_a_false_teacher_sends_is_refused_and_a_true_one_is_served():
    """One student, one false teacher after another; what the student asked stays asked."""
    settings = link_settings()
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(StudentLink.connect, settings, **Layout().student(0))
        false = FalseTeacher(settings)
        student = coming.result()
        student.request(torch.zeros(2, 4, dtype=torch.long))
        cases = [("sender", "tensor rank 0", case) for case in NO_RESPONSE]
        cases += [("requests", "the first rank", case) for case in NOT_FROM_INTAKE]
        for connection, who, (sent, reason) in cases:
            assert false.await_request() == GOOD_REQUEST
            getattr(false, connection).send(Raw(sent), seconds=LONG)
            expected = f"{who} of teacher replica 0 sent what is refused: {reason}"
            wait_until(
                lambda text=expected: student._connections.lost_because == text,
                LONG,
                expected,
                lambda: student._connections.lost_because,
            )
            assert student._reassembly._responses == {}  # nothing was allocated
            false.close()
            false = FalseTeacher(settings)
        # An answer that is right, and another one that nobody asked for.
        false.await_request()
        false.sender.send(GOOD_RESPONSE, torch.zeros(4, 2, 50, dtype=torch.float16), seconds=LONG)
        assert student.receive(0).logits.shape == (4, 2, 50)
        false.sender.send(Raw(changed(GOOD_RESPONSE, number=1)), seconds=LONG)
        wait_until(
            lambda: "number 1 has not been asked for" in student._connections.lost_because,
            LONG,
            "it is refused",
        )
        assert student._reassembly._responses == {}
        false.close()
        false = FalseTeacher(settings)
        false.sender.send(Header(Kind.GOODBYE), seconds=LONG)
        wait_until(lambda: "said goodbye unasked" in student._connections.lost_because, LONG, "it is refused")
        false.close()
    true = TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)
    exchange(student, true, 1)
    part(student, true)
    rendezvous.close()


class Raw:
    """Bytes in the place of a header."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def pack(self) -> bytes:
        return self.content


@pytest.mark.parametrize(
    ("header", "rows", "reason"),
    [
        (Header(Kind.HEAD, 8, start=0, stop=51), None, "its part 0:51 of the output layer is not expected"),
        (
            Header(Kind.HEAD, 1 << 40, start=0, stop=50),
            None,
            "its part 0:50 of the output layer is not expected",
        ),
        (Header(Kind.HEAD, 8, start=0, stop=50), (50, 8), "arrived damaged: its SHA-256 differs"),
    ],
)
def test_a_part_of_the_output_layer_that_is_not_what_was_announced_is_refused(header, rows, reason):
    settings = link_settings(payload="hidden")
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(StudentLink.connect, settings, **Layout().student(0))
        false = FalseTeacher(settings, Head(size=8, dtype="float32"))
        student = coming.result()
        false.sender.send(header, *([torch.ones(rows)] if rows else []), seconds=LONG)
        wait_until(
            lambda: reason in student._connections.lost_because,
            LONG,
            reason,
            lambda: student._connections.lost_because,
        )
        false.close()
    student.close()
    rendezvous.close()


@pytest.mark.parametrize(
    ("sent", "tokens", "reason"),
    [
        *((sent, None, reason) for sent, reason in NO_HEADER),
        (changed(GOOD_REQUEST, kind=Kind.RESPONSE), None, "a response from there is not expected"),
        (changed(GOOD_REQUEST, batch=1 << 40), None, "tokens is not from 1 to 64 tokens"),
        (changed(GOOD_REQUEST, sequence=0), None, "its sequence length 0 is not from 1 to 16"),
        (changed(GOOD_REQUEST, boundaries=6), None, "its 6 boundaries are more than 4 tokens have"),
        (changed(GOOD_REQUEST), torch.full((2, 4), 9), "its tokens reach from 9 to 9, outside [0, 9)"),
        (changed(GOOD_REQUEST), torch.full((2, 4), -1), "its tokens reach from -1 to -1, outside [0, 9)"),
        (
            changed(GOOD_REQUEST, batch=1, boundaries=2),
            torch.tensor([0, 0, 0, 0, 2, 4]),
            "its boundaries: expected ascending edges from 0 to 4, got [2, 4]",
        ),
        (
            changed(GOOD_REQUEST, batch=1, sequence=20, boundaries=2),
            torch.tensor([0] * 20 + [0, 20]),
            "its boundaries: expected sequences of at most 16 tokens, got one of 20",
        ),
        (
            changed(GOOD_REQUEST, batch=1, sequence=65, boundaries=2),
            None,
            "its sequence length 65 is not from 1 to 64",
        ),
        (changed(GOOD_REQUEST, context=7), None, "its context of 7 tokens is longer than agreed"),
        (changed(GOOD_REQUEST, context=1 << 40), None, "tokens is longer than agreed"),
        (
            changed(GOOD_REQUEST, batch=1, sequence=62, boundaries=7, context=3),
            None,
            "its context of 3 tokens is longer than agreed",
        ),
        (
            changed(GOOD_REQUEST, context=2),
            torch.tensor([0] * 8 + [3, 9, 0, 0]),
            "its teacher_context: expected tokens in [0, 9), got 3 to 9",
        ),
        (
            changed(GOOD_REQUEST, context=2),
            torch.tensor([0] * 8 + [3, 3, 4, 8]),
            "its teacher_context: expected ascending places in [0, 8), got [4, 8]",
        ),
        (
            changed(GOOD_REQUEST, context=2),
            torch.tensor([0] * 8 + [3, 3, 4, 1]),
            "its teacher_context: expected ascending places in [0, 8), got [4, 1]",
        ),
        (
            changed(GOOD_REQUEST, context=4),
            torch.tensor([0] * 8 + [3] * 4 + [4, 5, 6, 7]),
            "its teacher_context: expected at most 3 tokens per sequence, by VCRD_TEACHER_CONTEXT_LENGTH",
        ),
        (
            changed(GOOD_REQUEST, batch=60, sequence=1, context=3),
            torch.tensor([0] * 60 + [3] * 3 + [5] * 3),
            "its teacher_context: expected at most 64 tokens that the teacher sees in a micro-batch, got 240",
        ),
    ],
)
def test_a_malformed_request_is_refused(sent, tokens, reason, monkeypatch):
    allocated = []
    if tokens is None:
        monkeypatch.setattr("vcrd.link.requests.torch.empty", lambda *shape, **_: allocated.append(shape))
    near, far = pair()
    requests = RequestReceiver(STUDENT, {0: far})
    near.send(Raw(sent), *([tokens.int()] if tokens is not None else []), seconds=LONG)
    assert requests.take(1, LONG) == [] and allocated == []
    text = str(requests.failure)
    assert isinstance(requests.failure, StudentLost)
    assert (
        text == f"student data rank 0, tensor rank 0 sent a request that is refused: {text.split(': ', 1)[1]}"
    )
    assert reason in text
    requests.end(LONG)
    near.close()


def test_more_requests_than_credits_are_refused():
    near, far = pair()
    requests = RequestReceiver(STUDENT, {0: far})
    for number in range(3):
        near.send(Header(Kind.REQUEST, number, 4, 2), torch.zeros(2, 4, dtype=torch.int32), seconds=LONG)
    wait_until(lambda: requests.failure, LONG, "they are refused")
    assert "more requests than its 2 credits are waiting" in str(requests.failure)
    requests.end(LONG)
    near.close()


@pytest.mark.parametrize(
    ("sent", "reason"), [*NO_HEADER, (changed(GOOD_REQUEST), "a request from there is not expected")]
)
def test_what_a_student_says_to_a_sender_is_refused_unless_it_is_goodbye(sent, reason):
    near, far = pair()
    place = Place(0, 0, 0)
    responses = ResponseSender({place: far}, {place: 0}, LONG, ENDPOINT)
    responses.begin()
    near.send(Raw(sent), seconds=LONG)
    wait_until(lambda: responses.failure, LONG, "that is refused")
    assert str(responses.failure) == f"{place} sent a header that is refused: {reason}"
    responses.end(LONG)
    near.close()


def test_a_student_that_takes_nothing_is_lost_and_blocks_nobody():
    near, far = pair()
    place = Place(0, 0, 0)
    responses = opened({place: far}, 0.3, near)
    large = torch.zeros(1 << 24)
    for number in range(12):  # more than may be under way
        responses.room.acquire()
        responses.post([(place, Header(Kind.RESPONSE, number), [large])])
    assert str(responses.failure) == f"{place} did not take what was sent within 0.3 seconds"
    responses.end(LONG)
    near.close()


def test_an_answer_that_cannot_be_sent_is_an_error_and_blocks_nobody(monkeypatch):
    """As a copy from a GPU can fail."""

    class Broken:
        is_empty = False

        def ready(self):
            raise RuntimeError("device-side assert triggered")

    near, far = pair()
    place = Place(0, 0, 0)
    monkeypatch.setattr(TcpTransport, "stage", lambda self, tensor: Broken())
    responses = opened({place: far}, LONG, near)
    for number in range(12):
        responses.room.acquire()
        responses.post([(place, Header(Kind.RESPONSE, number), [torch.zeros(4)])])
    assert "an answer to student data rank 0, tensor rank 0 could not be sent" in str(responses.failure)
    assert "device-side assert" in str(responses.failure)
    responses.end(LONG)
    near.close()


@pytest.mark.parametrize("speaker", [0, 1], ids=["the request leader", "its peer"])
@pytest.mark.parametrize("sent", [bytes(wire.HEADER_BYTES), changed(GOOD_RESPONSE), "not its to say"])
def test_a_rank_of_the_student_that_talks_nonsense_ends_the_other(speaker, sent):
    settings = link_settings()
    rendezvous = host_rendezvous(settings)
    layout = Layout(student_tensor=2)
    with ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        teacher = TeacherLink.connect(settings, **layout.teacher(0, 0), group=None, tensor_group=None)
        students = [each.result() for each in coming]
    if sent == "not its to say":
        sent = changed(Header(Kind.PROGRESS if speaker == 0 else Kind.JOIN, 1))
    other = students[1 - speaker]
    students[speaker]._connections._peers.connections[0].send(Raw(sent), seconds=LONG)
    wait_until(lambda: other._connections.failure, LONG, "that is refused")
    if speaker == 1:
        other._connections.requested = 1  # request() would raise already
    with pytest.raises(LinkError, match=f"student data rank 0, tensor rank {speaker} is gone: .*"):
        other.receive(0)
    for link in (*students, teacher):
        link.close()
    rendezvous.close()
    assert link_threads() == []


def test_progress_in_the_wrong_order_is_no_step_back():
    settings = link_settings()
    rendezvous = host_rendezvous(settings)
    layout = Layout(student_tensor=2)
    with ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        teacher = TeacherLink.connect(settings, **layout.teacher(0, 0), group=None, tensor_group=None)
        leader, peer = (each.result() for each in coming)
    seen = []
    leader._connections.send_requests = lambda: seen.append([*leader._connections._peers.progress.values()])
    for number in (2, 1):
        peer._connections._peers.tell(Header(Kind.PROGRESS, number))
    wait_until(lambda: len(seen) == 2, LONG, "both are seen", lambda: seen)
    assert seen == [[2], [2]]
    for link in (teacher, leader, peer):
        link.close()
    rendezvous.close()
