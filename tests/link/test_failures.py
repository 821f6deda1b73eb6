"""Every way in which the link can fail ends in one sentence, a non-zero exit, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from link_jobs import Jobs, Layout, connected, exchange, part, true_logits
from ports import free_port

from vcrd.link import LinkError, LinkSettings, StudentLink, StudentLost, TeacherLink, TeacherLost, host_store
from vcrd.link import header as headers
from vcrd.link.channel import Channel, Tag
from vcrd.link.header import Header, Kind
from vcrd.link.inbox import Inbox
from vcrd.link.intake import Intake
from vcrd.link.payload import payload_named
from vcrd.link.plan import Piece, Roster, Shard

LONG = 60.0  # a time-out that no test here may reach
UNANSWERED = 2  # the tests' teacher answers the micro-batches before this one


def link_settings(port: int, **changes) -> LinkSettings:
    return LinkSettings(
        **({"address": f"127.0.0.1:{port}", "timeout": LONG, "connect_timeout": LONG} | changes)
    )


class Case(Layout):
    """A layout, and what its processes do. idle: seconds the student asks nothing, once. late: seconds the
    teacher takes for its last answer; 0 to never give it."""

    def __init__(
        self, idle: float = 0.0, late: float = 0.0, protocol: int = headers.PROTOCOL, **layout
    ) -> None:
        super().__init__(**({"student_tensor": 2, "teacher_tensor": 2, "pipeline": 1} | layout))
        self.idle = idle
        self.late = late
        self.protocol = protocol


def run_student(rank: int, case: Case, settings: LinkSettings) -> None:
    headers.PROTOCOL = case.protocol
    store = host_store(settings) if rank == 0 else None
    link = StudentLink.connect(settings, **case.student(rank), store=store)
    try:
        for number in range(UNANSWERED + 1):
            if number == UNANSWERED:
                print("idle", flush=True)
                time.sleep(case.idle)
            if link._tensor_rank == 0:
                link.request(torch.zeros(1, 4, dtype=torch.long))
            link.receive(number)
    finally:
        close_and_say_so(link)


def run_teacher(rank: int, case: Case, settings: LinkSettings) -> None:
    headers.PROTOCOL = case.protocol
    last = list(range(case.pipeline, case.teachers))
    tensor_group = dist.new_group(last)
    link = TeacherLink.connect(
        settings, **case.teacher(0, rank), group=dist.group.WORLD, tensor_group=tensor_group
    )
    try:
        while (batch := link.next_batch(1)) is not None:
            for request in batch:
                answer(link, request, case, rank)
    finally:
        close_and_say_so(link)


def answer(link: TeacherLink, request, case: Case, rank: int) -> None:
    if request.number == UNANSWERED:
        print("asked", flush=True)
        if not case.late:
            return
        time.sleep(case.late)
    if rank >= case.pipeline:
        logits = torch.zeros(4, 1, case.teacher_padded)
        logits[..., : case.vocab] = true_logits(request.tokens, case.vocab)
        link.respond(request, logits.chunk(case.teacher_tensor, -1)[rank - case.pipeline])


def close_and_say_so(link: StudentLink | TeacherLink) -> None:
    link.close()
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("vcrd")]
    print(f"closed, threads left: {names}", flush=True)


def start(jobs: Jobs, case: Case, **settings) -> None:
    both = link_settings(free_port(), **settings)
    jobs.world("student", case.students, run_student, case, both)
    jobs.world("teacher", case.teachers, run_teacher, case, both)


def all_said(jobs: Jobs, side: str, text: str, ranks: int) -> None:
    """Every rank of a side ended with exit status 1, this sentence as the last line, and its link closed."""
    for rank in range(ranks):
        name = f"{side}{rank}"
        output = jobs.output(name)
        assert jobs.processes[name].exitcode == 1, f"{name}: {jobs.processes[name].exitcode}\n{output}"
        assert text in output.strip().splitlines()[-1], output
        assert "closed, threads left: []" in output


@pytest.mark.parametrize(
    ("student", "teacher", "reason"),
    [
        ({"vocab": 50}, {"vocab": 49}, "vocab_size is 50 for the student and 49 for the teacher"),
        ({"sequence": 16}, {"sequence": 8}, "sequence_length is 16 for the student and 8 for the teacher"),
        ({"protocol": 1}, {"protocol": 2}, "protocol version is 1 for the student and 2 for the teacher"),
        ({"student_data": 1}, {"replicas": 2}, "2 teacher replicas are more than the student's 1 data ranks"),
    ],
)
def test_a_mismatch_is_refused_with_one_sentence_on_both_sides(student, teacher, reason, tmp_path):
    settings = link_settings(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.world("student", 2, run_student, Case(**student), settings)
        jobs.world("teacher", 3, run_teacher, Case(**teacher), settings)
        codes = jobs.wait()
        assert set(codes.values()) == {1}, codes
        for name in codes:
            last = jobs.output(name).strip().splitlines()[-1]
            assert last == f"vcrd.link.errors.HandshakeRefused: the link is refused: {reason}"


def test_students_that_contradict_each_other_are_refused_everywhere(tmp_path):
    settings = link_settings(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.start("student0", run_student, 0, Case(student_padded=50), settings)
        jobs.start("student1", run_student, 1, Case(student_padded=64), settings)
        jobs.world("teacher", 3, run_teacher, Case(), settings)
        codes = jobs.wait()
        assert set(codes.values()) == {1}, codes
        for name in codes:
            last = jobs.output(name).strip().splitlines()[-1]
            assert "HandshakeRefused" in last and "student data rank 0, tensor rank 1 states" in last


def test_a_second_teacher_is_refused(tmp_path):
    settings = link_settings(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.world("student", 2, run_student, Case(), settings)
        jobs.world("teacher", 3, run_teacher, Case(), settings)
        jobs.await_output("teacher0", "asked")
        jobs.world("second", 3, run_teacher, Case(), settings)
        for rank in range(3):
            jobs.processes[f"second{rank}"].join(20)
            last = jobs.output(f"second{rank}").strip().splitlines()[-1]
            assert last.endswith("the link is refused: run 'vcrd' has had a teacher replica 0")


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match=rf"cannot listen at 127.0.0.1:{port}, .*in use"):
            host_store(link_settings(port))


def test_an_address_of_another_machine_is_named():
    with pytest.raises(LinkError, match="cannot listen at 192.0.2.1:29600"):  # reserved for documentation
        host_store(LinkSettings(address="192.0.2.1:29600"))


def test_no_teacher_within_connect_timeout():
    settings = link_settings(free_port(), connect_timeout=0.5)
    with pytest.raises(TeacherLost, match=r"no teacher came to 127.0.0.1:\d+ within 0.5 seconds"):
        StudentLink.connect(settings, **Layout().student(0), store=host_store(settings))


def test_no_student_within_connect_timeout():
    settings = link_settings(free_port(), connect_timeout=0.5)
    with pytest.raises(LinkError, match=r"no store answered at 127.0.0.1:\d+ within 0.5 seconds"):
        TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)
    store = host_store(settings)
    with pytest.raises(StudentLost, match="no student stated its facts"):
        TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)
    del store


@pytest.mark.parametrize("victim", ["teacher0", "teacher2"], ids=["intake", "sender"])
def test_a_killed_teacher_is_lost_to_every_student_rank_at_once(victim, tmp_path):
    case = Case()
    with Jobs(tmp_path) as jobs:
        start(jobs, case)
        jobs.await_output("teacher2", "asked")
        jobs.signal(victim, signal.SIGKILL)
        codes = jobs.wait(LONG / 2)
        all_said(jobs, "student", "closed its connection", case.students)
        for rank in range(case.students):
            assert (
                "TeacherLost: teacher tensor rank" in (out := jobs.output(f"student{rank}"))
                or "first rank" in out
            )
        assert all(codes[f"teacher{rank}"] for rank in range(case.teachers)), codes


def test_a_stopped_teacher_is_lost_after_the_timeout(tmp_path):
    case = Case(idle=1.0)
    with Jobs(tmp_path) as jobs:
        start(jobs, case, timeout=3.0)
        jobs.await_output("student0", "idle")
        for rank in range(case.teachers):
            jobs.signal(f"teacher{rank}", signal.SIGSTOP)
        jobs.processes["student0"].join(LONG / 2)
        jobs.processes["student1"].join(LONG / 2)
        all_said(jobs, "student", "TeacherLost: the teacher did not answer micro-batch 2 within 3 seconds", 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_student_that_is_gone_is_lost_to_every_teacher_rank(number, tmp_path):
    # Tensor rank 1, which never asks anything: it must be missed all the same.
    case = Case(late=2.0)
    with Jobs(tmp_path) as jobs:
        start(jobs, case, timeout=LONG if number == signal.SIGKILL else 5.0)
        jobs.await_output("teacher2", "asked")
        jobs.signal("student1", number)
        for rank in range(case.teachers):
            jobs.processes[f"teacher{rank}"].join(LONG / 2)
        how = (
            "closed its connection"
            if number == signal.SIGKILL
            else "did not take what was sent within 5 seconds"
        )
        all_said(jobs, "teacher", f"StudentLost: student data rank 0, tensor rank 1 {how}", case.teachers)


class Pair:
    """Two ends of a channel in one process: rank 0 is a student, rank 1 a teacher."""

    roster = Roster(data_ranks=(0,), student_tensor_size=1, teacher_tensor_size=1, intake_sender=0)

    def __enter__(self) -> Pair:
        store = dist.HashStore()
        with ThreadPoolExecutor(2) as pool:
            ends = pool.map(lambda rank: Channel(store, rank, 2, "127.0.0.1", LONG), range(2))
            self.student, self.teacher = ends
        return self

    def __exit__(self, *_: object) -> None:
        self.student.close()
        self.teacher.close()


GOOD_RESPONSE = Header(Kind.RESPONSE, 0, sequence=4, batch=2, start=0, stop=9, payload=1)
GOOD_REQUEST = Header(Kind.REQUEST, 0, sequence=4, batch=2)


def changed(header: Header, **changes) -> torch.Tensor:
    return Header(**(vars(header) | changes)).tensor()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(headers.LENGTH, dtype=torch.int64), "does not begin with the link's mark"),
        (changed(GOOD_RESPONSE, kind=9), "kind 9 does not exist"),
        (changed(GOOD_RESPONSE, kind=Kind.REQUEST), "a request from there is not expected"),
        (changed(GOOD_RESPONSE, batch=1 << 62), "out of range"),
        (changed(GOOD_RESPONSE, batch=-1), "out of range"),
        (changed(GOOD_RESPONSE, batch=1 << 40), "is not from 1 to 64 tokens"),
        (changed(GOOD_RESPONSE, sequence=17), "sequence length 17 is not from 1 to 16"),
        (changed(GOOD_RESPONSE, stop=10), "columns 0:10 are not 0:9"),
        (changed(GOOD_RESPONSE, payload=2), "payload code 2 is not 1"),
        (changed(GOOD_RESPONSE, number=1), "number 1 is not the next one, 0"),
        (changed(GOOD_RESPONSE, batch=1), r"shape \(4, 1\) is not \(4, 2\), which was asked for"),
    ],
)
def test_a_malformed_response_is_refused(tensor, reason):
    with Pair() as pair:
        columns, pieces = Shard(0, 9), [Piece(0, 0, 0, 9)]
        inbox = Inbox(pair.student, pair.roster, columns, pieces, payload_named("float16"), 16, 64)
        inbox.expect(0, (4, 2))
        work = pair.teacher.post(tensor, 0, Tag.HEADER)
        with pytest.raises(
            TeacherLost, match=f"teacher tensor rank 0 sent a header that is refused: .*{reason}"
        ):
            inbox.take(0, LONG)
        assert inbox._responses == {}  # nothing was allocated
        inbox.finish(LONG)
        del work


@pytest.mark.parametrize(
    ("tensor", "tokens", "reason"),
    [
        (changed(GOOD_REQUEST, kind=Kind.RESPONSE), None, "a response from there is not expected"),
        (changed(GOOD_REQUEST, batch=1 << 40), None, "is not from 1 to 64 tokens"),
        (changed(GOOD_REQUEST, sequence=0), None, "sequence length 0 is not from 1 to 16"),
        (
            GOOD_REQUEST.tensor(),
            torch.full((2, 4), 9, dtype=torch.int32),
            r"reach from 9 to 9, outside \[0, 9\)",
        ),
    ],
)
def test_a_malformed_request_is_refused(tensor, tokens, reason):
    with Pair() as pair:
        intake = Intake(pair.teacher, pair.roster, 9, 16, 64, credits=2)
        works = [pair.student.post(tensor, 1, Tag.HEADER)]
        if tokens is not None:
            works.append(pair.student.post(tokens, 1, Tag.TOKENS))
        assert intake.take(1, LONG) == []
        assert isinstance(intake.failure, StudentLost)
        text = f"student data rank 0, tensor rank 0 sent a header that is refused: .*{reason}"
        with pytest.raises(StudentLost, match=text):
            raise intake.failure
        intake.finish(LONG)


def test_more_requests_than_credits_are_refused():
    with Pair() as pair:
        intake = Intake(pair.teacher, pair.roster, 9, 16, 64, credits=2)
        tokens = torch.zeros(2, 4, dtype=torch.int32)
        works = []
        for number in range(3):
            works.append(pair.student.post(changed(GOOD_REQUEST, number=number), 1, Tag.HEADER))
            works.append(pair.student.post(tokens, 1, Tag.TOKENS))
        deadline = time.monotonic() + LONG
        while not intake.failure and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "more requests than its 2 credits" in str(intake.failure)
        intake.finish(LONG)


def test_idle_time_is_not_counted():
    """On either side: nothing is asked, nothing under way, for longer than the time-out."""
    settings = link_settings(free_port(), timeout=2.0)
    store = host_store(settings)
    student, teacher = connected(settings, store)
    for number in range(2):
        time.sleep(1.2 * settings.timeout * number)
        exchange(student, teacher, number)
    part(student, teacher)


def test_a_link_that_is_never_closed_ends_with_its_process(tmp_path):
    settings = link_settings(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.start("student", forget_student, settings)
        jobs.start("teacher", forget_teacher, settings)
        codes = jobs.wait(LONG / 2)
        assert codes == {"student": 1, "teacher": 1}, codes
        assert jobs.output("student").strip().endswith("RuntimeError: the training failed")
        assert "StudentLost: student data rank 0, tensor rank 0 closed its connection" in jobs.output(
            "teacher"
        )


def forget_student(settings: LinkSettings) -> None:
    link = StudentLink.connect(settings, **Layout().student(0), store=host_store(settings))
    link.request(torch.zeros(1, 4, dtype=torch.long))
    raise RuntimeError("the training failed")


def forget_teacher(settings: LinkSettings) -> None:
    link = TeacherLink.connect(settings, **Layout().teacher(0, 0), group=None, tensor_group=None)
    while link.next_batch(1) is not None:
        pass


def test_twenty_links_in_a_row_leave_nothing_behind():
    """Half of them part, half of them are dropped without a goodbye."""
    settings = link_settings(free_port())
    store = host_store(settings)
    counts = []
    for number in range(20):
        student, teacher = connected(LinkSettings(**(vars(settings) | {"name": f"run{number}"})), store)
        exchange(student, teacher, 0)
        if number % 2:
            part(student, teacher)
        else:
            teacher.close()
            with pytest.raises(TeacherLost):
                student.request(torch.zeros(1, 4, dtype=torch.long))
                student.receive(1)
            student.close()
        del student, teacher
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    (files, threads), (later_files, later_threads) = counts[3], counts[-1]
    assert later_threads == threads, counts
    # The store's side of a connection closes a little later; one descriptor kept per link would make it 16.
    assert later_files < files + 8, counts
