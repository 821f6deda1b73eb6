"""Every way in which the link can fail ends in one sentence, a non-zero exit, and nothing left behind.

What a teacher outlives or is outlived by stands in test_rejoin.py, strangers in test_wire.py.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from link_jobs import Jobs, Layout, connected, exchange, part, true_logits
from listening import link_threads
from patience import wait_shortly
from ports import free_port
from waiting import wait_until

from vcrd.link import (
    LinkError,
    LinkSettings,
    StudentLink,
    StudentLost,
    TeacherLink,
    TeacherLost,
    host_rendezvous,
)
from vcrd.link import connection as wire
from vcrd.link.connection import Listener
from vcrd.link.rendezvous import listen

LONG = 60.0  # a time-out that no test here may reach
UNANSWERED = 2  # the tests' teacher answers the micro-batches before this one


def link_settings(port: int, **changes) -> LinkSettings:
    times = dict.fromkeys(("timeout", "connect_timeout"), LONG)
    return LinkSettings(**({"address": f"127.0.0.1:{port}"} | times | changes))


class Case(Layout):
    """A layout, and what its processes do. protocol: the version that they speak."""

    def __init__(self, protocol: int = wire.PROTOCOL, **layout) -> None:
        super().__init__(**({"student_tensor": 2, "teacher_tensor": 2, "pipeline": 1} | layout))
        self.protocol = protocol


def run_student(rank: int, case: Case, settings: LinkSettings) -> None:
    wire.PROTOCOL = case.protocol
    rendezvous = host_rendezvous(settings) if rank == 0 else None
    link = None
    try:
        link = StudentLink.connect(settings, **case.student(rank))
        for number in range(UNANSWERED + 1):
            if rank % case.student_tensor == 0:
                link.request(torch.zeros(1, 4, dtype=torch.long))
            link.receive(number)
    finally:
        close_and_say_so(link, rendezvous)


def run_teacher(rank: int, case: Case, settings: LinkSettings) -> None:
    wire.PROTOCOL = case.protocol
    last = list(range(case.pipeline, case.teachers))
    tensor_group = dist.new_group(last)
    link = None
    try:
        link = TeacherLink.connect(
            settings, **case.teacher(0, rank), group=dist.group.WORLD, tensor_group=tensor_group
        )
        if case.patience is not None:
            wait_shortly(link, case.patience)
        while (batch := link.next_batch(1)) is not None:
            for request in batch:
                answer(link, request, case, rank)
    finally:
        close_and_say_so(link)


def answer(link: TeacherLink, request, case: Case, rank: int) -> None:
    if request.number == UNANSWERED:
        print("asked", flush=True)
    elif rank >= case.pipeline:
        logits = torch.zeros(4, 1, case.teacher_padded)
        logits[..., : case.vocab] = true_logits(request.tokens, case.vocab)
        link.respond(request, logits.chunk(case.teacher_tensor, -1)[rank - case.pipeline])


def close_and_say_so(*links) -> None:
    for link in links:
        if link is not None:
            link.close()
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("vcrd")]
    print(f"closed, threads left: {names}", flush=True)


def all_said(jobs: Jobs, side: str, text: str, ranks: int) -> None:
    """Every rank of a side ended with exit status 1, this sentence in the last line, and its link closed."""
    for rank in range(ranks):
        name = f"{side}{rank}"
        output = jobs.output(name)
        assert jobs.processes[name].exitcode == 1, f"{name}: {jobs.processes[name].exitcode}\n{output}"
        assert text in output.strip().splitlines()[-1], output
        assert "closed, threads left: []" in output


# Jobs that do not fit, or do not meet.


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "reason"),
    [
        ({"vocab": 50}, {"vocab": 49}, {}, "vocab_size is 50 for the student and 49 for the teacher"),
        (
            {"sequence": 16},
            {"sequence": 8},
            {"payload": "float32"},
            "sequence_length is 16 for the student and 8 for the teacher; "
            "payload is float16 for the student and float32 for the teacher",
        ),
        ({"protocol": 1}, {"protocol": 2}, {}, "protocol version is 1 for the student and 2 for the teacher"),
        (
            {"student_data": 1},
            {"replicas": 2},
            {},
            "2 teacher replicas are more than the student's 1 data ranks",
        ),
    ],
    ids=["vocabulary", "two reasons", "protocol", "replicas"],
)
def test_a_mismatch_is_refused_with_one_sentence_on_both_sides(student, teacher, settings, reason, tmp_path):
    port = free_port()
    with Jobs(tmp_path) as jobs:
        jobs.world("student", 2, run_student, Case(**student), link_settings(port))
        jobs.world("teacher", 3, run_teacher, Case(**teacher), link_settings(port, **settings))
        jobs.wait()
        for side, ranks in (("student", 2), ("teacher", 3)):
            all_said(jobs, side, f"vcrd.link.errors.HandshakeRefused: the link is refused: {reason}", ranks)
            assert jobs.output(f"{side}0").strip().endswith(reason)


def test_students_that_contradict_each_other_are_refused_everywhere(tmp_path):
    settings = link_settings(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.start("student0", run_student, 0, Case(student_padded=50), settings)
        jobs.start("student1", run_student, 1, Case(student_padded=64), settings)
        jobs.world("teacher", 3, run_teacher, Case(), settings)
        jobs.wait()
        all_said(
            jobs, "student", "HandshakeRefused: the link is refused: student data rank 0, tensor rank", 2
        )
        all_said(
            jobs, "teacher", "HandshakeRefused: the link is refused: student data rank 0, tensor rank", 3
        )


def test_two_students_at_one_place_are_refused():
    settings = link_settings(free_port())
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(2) as pool:
        place = Case().student(0)
        coming = [pool.submit(StudentLink.connect, settings, **place) for _ in range(2)]
        for each in coming:
            with pytest.raises(LinkError, match="two ranks connected as student data rank 0, tensor rank 0"):
                each.result()
    rendezvous.close()


def test_replicas_that_contradict_each_other_are_refused():
    settings = link_settings(free_port())
    rendezvous = host_rendezvous(settings)
    layout = Layout(student_data=2)
    with ThreadPoolExecutor(3) as pool:
        students = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        first = join_as_teacher(settings, layout)
        contradicting = Layout(replicas=2)
        with pytest.raises(LinkError, match="one teacher replica counts 1 replicas, another 2"):
            join_as_teacher(settings, contradicting, replica=1)
        for each in students:
            each.result().close()
    assert first.next_batch(1) is None
    first.close()
    rendezvous.close()


def join_as_teacher(settings: LinkSettings, layout: Layout, replica: int = 0) -> TeacherLink:
    return TeacherLink.connect(settings, **layout.teacher(replica, 0), group=None, tensor_group=None)


def test_a_second_teacher_waits_and_then_gives_up():
    settings = link_settings(free_port())
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    reason = r"tensor rank 0 still has a teacher replica 0 at .* within 1 seconds \(connect_timeout\)"
    with pytest.raises(StudentLost, match=reason):
        join_as_teacher(LinkSettings(**(vars(settings) | {"connect_timeout": 1})), Layout())
    exchange(student, teacher, 0)
    part(student, teacher)
    rendezvous.close()


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match=rf"127.0.0.1:{port} cannot be listened at, .*in use"):
            host_rendezvous(link_settings(port))


def test_an_address_of_another_machine_is_named():
    with pytest.raises(
        LinkError, match="192.0.2.1:29600 cannot be listened at"
    ):  # reserved for documentation
        host_rendezvous(LinkSettings(address="192.0.2.1:29600"))
    with pytest.raises(LinkError, match="the host 'nowhere.invalid' cannot be resolved"):
        host_rendezvous(LinkSettings(address="nowhere.invalid:29600"))


def test_no_rendezvous_within_connect_timeout():
    settings = link_settings(free_port(), connect_timeout=0.5)
    with pytest.raises(
        LinkError, match=r"the student's ranks did not all meet to 127.0.0.1:\d+ within 0.5 seconds"
    ):
        StudentLink.connect(settings, **Layout().student(0))
    with pytest.raises(StudentLost, match=r"nobody answered at 127.0.0.1:\d+ within 0.5 seconds"):
        join_as_teacher(settings, Layout())


def test_nobody_on_the_other_side_within_connect_timeout():
    settings = link_settings(free_port(), connect_timeout=0.5)
    rendezvous = host_rendezvous(settings)
    with pytest.raises(
        StudentLost, match=r"the student's ranks did not all come at 127.0.0.1:\d+ within 0.5"
    ):
        join_as_teacher(settings, Layout())
    with pytest.raises(TeacherLost, match=r"no teacher came to 127.0.0.1:\d+ within 0.5 seconds"):
        StudentLink.connect(settings, **Layout().student(0))
    rendezvous.close()


def test_a_replica_that_does_not_come_is_named():
    settings = link_settings(free_port(), connect_timeout=5)
    rendezvous = host_rendezvous(settings)
    layout = Layout(student_data=2, replicas=2)
    with ThreadPoolExecutor(3) as pool:
        coming = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        teacher = join_as_teacher(settings, layout, replica=1)
        with pytest.raises(TeacherLost, match="teacher replica 0 did not come to .* within 5 seconds"):
            coming[0].result()
        part(coming[1].result(), teacher)
    rendezvous.close()


def test_a_student_that_lets_nobody_finish_joining_is_given_up():
    """It says welcome to the first rank of the teacher, again and again, and never to one that would send."""
    settings = link_settings(free_port(), connect_timeout=1)
    states = {"requests": "welcome", "sender": "over"}
    student = Listener(
        listen("127.0.0.1", 0),
        "",
        lambda hello: ({"state": states[hello["role"]]}, lambda connection: connection.close()),
    )
    with ThreadPoolExecutor(1) as pool:
        known = pool.submit(register, settings, student.address)
        rendezvous = host_rendezvous(settings)
        known.result()
        with pytest.raises(
            StudentLost, match=r"could not be joined at .* within 1 seconds.*: student data rank 0"
        ):
            join_as_teacher(settings, Layout())
    student.close()
    rendezvous.close()


def register(settings: LinkSettings, address: tuple[str, int]) -> None:
    from vcrd.link.handshake import Handshake
    from vcrd.link.rendezvous import ask_until

    handshake = Handshake.of(
        settings, vocab_size=50, sequence_length=16, padded_vocab_size=50, tensor_size=1, copies=1, credits=2
    )
    hello = {"role": "student", "place": [0, 0, 0], "address": address, "handshake": handshake.plain()}
    assert ask_until(settings, hello, lambda reply: reply["state"] == "ready", LONG)[0]


def test_a_rendezvous_that_talks_nonsense_ends_every_rank_of_the_teacher(tmp_path):
    port = free_port()
    settings = link_settings(port)
    rendezvous = Listener(
        listen("127.0.0.1", port),
        "",
        lambda hello: ({"state": "ready", "handshake": {}, "addresses": []}, None),
    )
    with Jobs(tmp_path) as jobs:
        jobs.world("teacher", 3, run_teacher, Case(), settings)
        jobs.wait()
        reason = "HandshakeRefused: the link is refused: the student's handshake cannot be read"
        all_said(jobs, "teacher", reason, 3)
    rendezvous.close()


# What ends one side while the other stands.


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_a_student_that_is_gone_is_waited_for_and_then_lost_to_every_teacher_rank(tmp_path):
    # Tensor rank 1, which never asks anything: it must be missed all the same.
    case, settings = Case(patience=2.0), link_settings(free_port())
    with Jobs(tmp_path) as jobs:
        jobs.world("student", case.students, run_student, case, settings)
        jobs.world("teacher", case.teachers, run_teacher, case, settings)
        jobs.await_output("teacher2", "asked")
        jobs.signal("student1", signal.SIGKILL)
        jobs.wait()
        all_said(jobs, "student", "LinkError: student data rank 0, tensor rank 1 is gone", 1)
        all_said(jobs, "teacher", "StudentLost: student data rank 0, tensor rank", case.teachers)
        all_said(jobs, "teacher", "closed its connection, and nobody answered at", case.teachers)
        all_said(jobs, "teacher", "within 2 seconds (connect_timeout)", case.teachers)


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
def test_idle_time_is_not_counted():
    """On either side: nothing is asked, nothing under way, for longer than every time-out."""
    settings = link_settings(free_port(), timeout=3.0)
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    for link in (student, teacher):
        wait_shortly(link, 3.0)
    for number in range(2):
        time.sleep(4.0 * number)
        exchange(student, teacher, number)
    part(student, teacher)
    rendezvous.close()


@pytest.mark.usefixtures("each_transport_at_leisure")
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
    rendezvous = host_rendezvous(settings)
    link = StudentLink.connect(settings, **Layout().student(0))
    link.request(torch.zeros(1, 4, dtype=torch.long))
    raise RuntimeError(f"the training failed{'' if rendezvous else '?'}")


def forget_teacher(settings: LinkSettings) -> None:
    link = join_as_teacher(settings, Layout())
    wait_shortly(link, 1.0)
    while link.next_batch(1) is not None:
        pass


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
def test_a_link_that_is_forgotten_leaves_nothing_behind():
    settings = link_settings(free_port())
    rendezvous = host_rendezvous(settings)
    before = len(link_threads())
    student, teacher = connected(settings)
    exchange(student, teacher, 0)
    del student, teacher
    wait_until(lambda: len(link_threads()) == before, LONG, "its threads end", link_threads)
    rendezvous.close()


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
def test_twenty_links_in_a_row_leave_nothing_behind():
    """Half of them part, half of them are dropped without a goodbye."""
    settings = link_settings(free_port())
    rendezvous = host_rendezvous(settings)
    counts = []
    for number in range(20):
        student, teacher = connected(replace(settings, name=f"run{number}"))
        wait_shortly(student, 0.05)
        exchange(student, teacher, 0)
        if number % 2:
            part(student, teacher)
        else:
            teacher.close()
            student.request(torch.zeros(1, 4, dtype=torch.long))
            with pytest.raises(
                TeacherLost, match="teacher replica 0 is lost .*, and none came back within 0.05"
            ):
                student.receive(1)
            student.close()
        del student, teacher
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    rendezvous.close()
    assert set(counts[3:]) == {counts[3]}, counts
