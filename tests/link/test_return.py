"""Both jobs in one process: what a teacher that comes back must be, and what may happen in the moment when it does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from link_jobs import Layout, connected, exchange, part, true_logits
from listening import link_threads
from patience import wait_shortly
from ports import free_port
from rejoin_jobs import settings_for

from vcrd.link import (
    HandshakeRefused,
    Head,
    LinkError,
    LinkSettings,
    StudentLink,
    TeacherLink,
    TeacherLost,
    host_rendezvous,
)
from vcrd.link.respond import ResponseSender
from vcrd.link.student_connections import StudentConnections


def teacher_of(settings: LinkSettings, layout: Layout, **more) -> TeacherLink:
    return TeacherLink.connect(settings, **layout.teacher(0, 0), group=None, tensor_group=None, **more)


def test_a_teacher_that_comes_back_with_another_vocabulary_is_refused_and_the_student_waits_on(caplog):
    settings = settings_for(free_port(), payload="float16")
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    exchange(student, teacher, 0)
    teacher.close()
    student.request(torch.zeros(1, 4, dtype=torch.long))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(student.receive, 1)
        for layout, reason in [
            (Layout(vocab=49), "vocab_size is 50 for the student and 49 for the teacher"),
            (Layout(sequence=8), "sequence_length is 16 for the student and 8 for the teacher"),
            (Layout(replicas=2), "2 teacher replicas are more than the student's 1 data ranks"),
        ]:
            with pytest.raises(HandshakeRefused, match=f"^the link is refused: .*{reason}$"):
                teacher_of(settings, layout)
            assert reason in caplog.text  # the student's operator sees it too
            assert not waiting.done()
        right = teacher_of(settings, Layout())
        (request,) = right.next_batch(1)
        assert request.number == 1
        right.respond(request, torch.zeros(4, 1, 50))
        assert waiting.result().logits.shape == (4, 1, 50)
    part(student, right)
    rendezvous.close()


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_an_answer_that_one_rank_lacks_is_sent_to_that_rank_alone(monkeypatch):
    """The teacher is lost between the two: the rank that has the answer would refuse it from the next one."""
    settings, layout = settings_for(free_port()), Layout(student_tensor=2)
    logits = true_logits(torch.zeros(1, 4), layout.vocab)
    rendezvous, post = host_rendezvous(settings), ResponseSender.post
    with ThreadPoolExecutor(2) as pool:
        coming = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        lost = teacher_of(settings, layout)
        students = [student.result() for student in coming]
        students[0].request(torch.zeros(1, 4, dtype=torch.long))
        (request,) = lost.next_batch(1)
        monkeypatch.setattr(ResponseSender, "post", lambda self, response: post(self, response[:1]))
        lost.respond(request, logits)
        assert torch.equal(students[0].receive(0).logits, logits[..., :25])
        lost.close()
        monkeypatch.undo()
        teacher = teacher_of(settings, layout)
        students[0].request(torch.zeros(1, 4, dtype=torch.long))
        for number in range(2):
            (request,) = teacher.next_batch(1)
            assert request.number == number
            teacher.respond(request, logits)
        assert torch.equal(students[1].receive(0).logits, logits[..., 25:])
        for rank, columns in enumerate((slice(0, 25), slice(25, 50))):
            assert torch.equal(students[rank].receive(1).logits, logits[..., columns])
            assert students[rank]._connections.session.epoch == 2
        for student in students:
            student.close()
    assert teacher.next_batch(1) is None
    teacher.close()
    rendezvous.close()


def test_a_teacher_that_comes_back_with_another_output_layer_is_refused(caplog):
    settings = settings_for(free_port(), payload="hidden")
    rendezvous = host_rendezvous(settings)
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    right = dict(head=Head(4, "float32"), head_weight=weight)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(StudentLink.connect, settings, **Layout().student(0))
        teacher = teacher_of(settings, Layout(), **right)
        student = coming.result()
        answer_hidden(student, teacher, 0, weight)
        teacher.close()
        student.request(torch.zeros(1, 4, dtype=torch.long))
        waiting = pool.submit(student.receive, 1)
        wrong = [
            dict(head=Head(4, "float32"), head_weight=weight + 1),
            dict(head=Head(4, "float32", scale=2.0), head_weight=weight),
            dict(head=Head(5, "float32"), head_weight=torch.zeros(50, 5)),
        ]
        for head in wrong:
            with pytest.raises(HandshakeRefused, match="^the link is refused: the teacher came back with "):
                teacher_of(settings, Layout(), **head)
            assert not waiting.done()
        assert caplog.text.count("the teacher came back with ") == len(wrong)
        received = student.bytes_received
        teacher = teacher_of(settings, Layout(), **right)
        (request,) = teacher.next_batch(1)
        teacher.respond(request, torch.ones(4, 1, 4))
        assert torch.equal(waiting.result().weight, weight)
        assert student.bytes_received - received < weight.numel() * 4  # it was not sent again
    part(student, teacher)
    rendezvous.close()


def answer_hidden(student: StudentLink, teacher: TeacherLink, number: int, weight: torch.Tensor) -> None:
    student.request(torch.zeros(1, 4, dtype=torch.long))
    (request,) = teacher.next_batch(1)
    teacher.respond(request, torch.ones(4, 1, 4))
    got = student.receive(number)
    assert torch.equal(got.weight, weight) and torch.equal(got.states, torch.ones(4, 1, 4))


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
@pytest.mark.parametrize("comes_back", [False, True])
def test_closing_while_a_teacher_is_waited_for_leaves_nothing_behind(comes_back, monkeypatch):
    """Also when one comes back in that very moment, on a machine that is slow to begin threads."""
    start = threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        if thread.name == "vcrd-link-reader":
            time.sleep(0.02)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    for delay in (0.0, 0.005, 0.01, 0.02, 0.03):
        settings = settings_for(free_port(), payload="float16", timeout=20, connect_timeout=20)
        rendezvous = host_rendezvous(settings)
        student, teacher = connected(settings)
        teacher.close()
        student.request(torch.zeros(1, 4, dtype=torch.long))
        with ThreadPoolExecutor(2) as pool:
            short = LinkSettings(**(vars(settings) | {"connect_timeout": 0.5}))
            coming = pool.submit(teacher_of, short, Layout()) if comes_back else None
            waiting = pool.submit(student.receive, 0)
            time.sleep(delay)
            student.close()
            rendezvous.close()
            with pytest.raises(LinkError, match="the link is closed"):
                waiting.result()
            if coming is not None:
                end(coming)
        assert link_threads() == []


def end(coming) -> None:
    """A teacher that came may find that the student has parted, or that it is gone."""
    try:
        teacher = coming.result()
    except LinkError:
        return
    try:
        assert not teacher.next_batch(1)
    except LinkError:
        pass
    teacher.close()


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
def test_teacher_lost_is_raised_again_by_whatever_comes_after():
    settings = settings_for(free_port(), payload="float16")
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    wait_shortly(student, 0.1)
    exchange(student, teacher, 0)
    teacher.close()
    student.request(torch.zeros(1, 4, dtype=torch.long))
    for act in (
        lambda: student.receive(1),
        lambda: student.receive(1),
        lambda: student.request(torch.zeros(1, 4).long()),
    ):
        with pytest.raises(TeacherLost, match=r"none came back within 0.1 seconds \(connect_timeout\)"):
            act()
    student.close()
    rendezvous.close()


@pytest.mark.usefixtures("each_transport_in_one_process_at_leisure")
def test_two_teachers_that_come_back_at_once_do_not_hold_each_other_up(monkeypatch):
    """The second one must not be welcome too while the first one's admission is under way: it would wait in vain for
    the other ranks of the student, which nobody would tell of it."""
    settings = settings_for(free_port(), payload="float16")
    rendezvous = host_rendezvous(settings)
    student, teacher = connected(settings)
    keep = StudentConnections._keep_request_receiver
    arrived, go_on, said = threading.Event(), threading.Event(), []

    def slowly(self, *arguments) -> None:
        arrived.set()
        assert go_on.wait(60)
        keep(self, *arguments)

    def requests(self, hello, answer=StudentConnections._admit_teacher):
        reply = answer(self, hello)
        said.append((hello["epoch"], reply[0]["state"]))
        return reply

    monkeypatch.setattr(StudentConnections, "_keep_request_receiver", slowly)
    monkeypatch.setattr(StudentConnections, "_admit_teacher", requests)
    teacher.close()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(teacher_of, settings, Layout())
        assert arrived.wait(60)
        second = pool.submit(teacher_of, LinkSettings(**(vars(settings) | {"connect_timeout": 3})), Layout())
        with pytest.raises(LinkError, match="still has a teacher replica 0"):
            later = threading.Timer(1.0, go_on.set)
            later.start()
            second.result()
        later.join()
        assert [state for _, state in said if state == "welcome"] == ["welcome"], said
        exchange(student, first.result(), 0)
    part(student, first.result())
    rendezvous.close()
