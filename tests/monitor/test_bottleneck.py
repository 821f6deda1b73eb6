"""The message about waiting, from counters of a real link: a slow teacher, a slow network, a lost teacher."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from link_jobs import Layout, connected
from ports import free_port
from waiting import wait_until

from vcrd.link import LinkSettings, StudentLink, TeacherLink, host_rendezvous
from vcrd.link.connection import Connection
from vcrd.link.student import Waits
from vcrd.megatron.metrics import Row, by_replica
from vcrd.monitor.bottleneck import Setup, Wait, cause, idle_sentence, sentence

SETUP = Setup("float16", 75968, 64, 1.0, credits=2, replicas=2, data_ranks=8)
SLOW = Wait(1, share=0.31, arriving=0.02, while_lost=0.0, late=0.9, bytes_per_second=3e8)
ANSWERS = 6
LONG = 60.0


@contextmanager
def link(**settings):
    chosen = LinkSettings(address=f"127.0.0.1:{free_port()}", timeout=30, credits=1, **settings)
    rendezvous = host_rendezvous(chosen)
    student, teacher = connected(chosen)
    try:
        yield chosen, student, teacher
    finally:
        student.close()
        teacher.close()
        rendezvous.close()


def serve(teacher: TeacherLink, before_each: Callable[[], None] = lambda: None) -> None:
    while (requests := teacher.next_batch(1)) is not None:
        before_each()
        for request in requests:
            teacher.respond(request, torch.zeros(16, 4, Layout().teacher_padded))


def waits(student: StudentLink, before_each: Callable[[int], None] = lambda number: None) -> Waits:
    """The waits of a student. before_each: called between a request and the wait for its answer."""
    for number in range(ANSWERS):
        student.request(torch.zeros(4, 16, dtype=torch.long))
        before_each(number)
        student.receive(number)
    return student.waits


def test_a_slow_teacher_is_not_reported_as_a_slow_network():
    asked = threading.Semaphore(0)

    def think() -> None:
        asked.acquire()  # the student is about to wait
        time.sleep(0.2)

    with link() as (_, student, teacher), ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, teacher, think)
        found = waits(student, lambda number: asked.release())
        student.close()
        serving.result()
    assert found.seconds > 0.1 * ANSWERS and found.answers == found.late == ANSWERS
    assert found.arriving < 0.5 * found.seconds and found.while_lost == 0
    assert found.seconds == student.waits.seconds


def test_a_slow_network_is_not_reported_as_a_slow_teacher(monkeypatch):
    """The bytes of an answer arrive slowly: the sender stops between two pieces."""
    whole, asked = Connection._send_all, threading.Semaphore(0)

    def trickling(self, view, seconds):
        if len(view) < 4000:
            return whole(self, view, seconds)
        for begin in range(0, len(view), 2000):
            whole(self, view[begin : begin + 2000], seconds)
            time.sleep(0.05)

    monkeypatch.setattr(Connection, "_send_all", trickling)
    with link() as (_, student, teacher), ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, teacher, asked.acquire)
        found = waits(student, lambda number: asked.release())
        student.close()
        serving.result()
    assert found.late == ANSWERS
    assert 0.5 * found.seconds < found.arriving <= found.seconds


def test_answers_that_have_arrived_are_not_late():
    with link() as (_, student, teacher), ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, teacher)
        found = waits(
            student,
            lambda number: wait_until(
                lambda: student._reassembly.complete > number, LONG, "the answer is there"
            ),
        )
        student.close()
        serving.result()
    assert found.answers == ANSWERS and found.late == 0


def test_a_lost_teacher_is_not_reported_as_a_slow_one():
    asked = threading.Event()
    with link(connect_timeout=30.0) as (chosen, student, teacher):
        places = {**Layout().teacher(0, 0), "group": None, "tensor_group": None}
        teacher.close()

        def come_back() -> None:
            asked.wait()
            time.sleep(1.0)
            again = TeacherLink.connect(chosen, **places)
            serve(again)
            again.close()

        thread = threading.Thread(target=come_back)
        thread.start()
        student.request(torch.zeros(4, 16, dtype=torch.long))
        asked.set()
        student.receive(0)
        found = student.waits
        student.close()
        thread.join()
    assert found.while_lost > 0.5 * found.seconds > 0.3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "teacher"),
        ({"arriving": 0.9}, "link"),
        ({"late": 0.2}, "bursts"),
        ({"arriving": 0.9, "while_lost": 0.6}, "lost"),
    ],
)
def test_the_cause(changes, expected):
    assert cause(replace(SLOW, **changes)) == expected


@pytest.mark.parametrize(
    ("wait", "setup", "end"),
    [
        ({}, {}, "which had not begun to answer; try more teacher replicas than 2"),
        (
            {},
            {"replicas": 8},
            "; try replicas of more GPUs, because each data rank has its own replica already",
        ),
        ({}, {"credits": 0}, "; try credits 2, because nothing is asked ahead with credits 0"),
        ({"late": 0.2}, {}, "; most answers came in time: try credits 4, to even out bursts"),
        (
            {"arriving": 0.9},
            {},
            "the link is full (0.3 GB/s into the rank that waited longest); try payload logits_8bit",
        ),
        ({"arriving": 0.9}, {"payload": "float32"}, "; try payload float16"),
        ({"arriving": 0.9, "share": 0.6}, {}, "; try payload hidden"),
        ({"arriving": 0.9, "share": 0.6}, {"columns": 9000}, "; try payload topk"),
        (
            {"arriving": 0.9, "share": 0.6},
            {"columns": 9000, "temperature": 2.0},
            "; try payload logits_8bit, which may not be enough, or a faster interface",
        ),
        (
            {"arriving": 0.9},
            {"payload": "topk"},
            "no payload is smaller: try a faster interface, or more tensor ranks",
        ),
        ({"while_lost": 0.9}, {}, "which was lost and came back; its own log says why"),
    ],
)
def test_the_advice_follows_from_the_cause(wait, setup, end):
    said = sentence(replace(SLOW, **wait), replace(SETUP, **setup))
    assert said.startswith("student waited ") and "% of the step for teacher replica 1" in said
    assert said.endswith(end)


def test_a_short_wait_gives_no_message():
    assert sentence(replace(SLOW, share=0.049), SETUP) is None
    assert idle_sentence(0, 0.4) is None
    assert idle_sentence(3, 0.6) == (
        "teacher replica 3 was idle 60 % of the time: it could serve more students, or use fewer GPUs"
    )


def test_the_rank_that_waited_longest_counts_for_each_replica():
    nan = float("nan")
    rows = [
        Row(1.0, 0.5, 0.0, 10, 5, 1e6, 0.0, 2),
        Row(2.0, 0.5, 0.0, 10, 10, 1e6, 1.0, 2),
        Row(3.0, 3.0, 0.0, 10, 10, 2e6, 1.0, 2),
        Row(0.0, 0.0, 0.0, 0, 0, 0.0, nan, 0),
    ]
    first, second = by_replica(rows, 10.0)
    assert first == Wait(0, 0.1, 0.5, 0.0, 0.5, 1e5)
    assert second == Wait(1, 0.3, 1.0, 0.0, 1.0, 2e5)
