"""Every payload over layouts drawn at random, and the teacher's output layer over several epochs; real processes."""

from __future__ import annotations

import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import draw
import pytest
import torch
import torch.distributed as dist
from draw import Batch, Drawn
from link_jobs import Jobs, Layout, device
from ports import free_port

from vcrd.link import (
    HandshakeRefused,
    Head,
    LinkSettings,
    StudentLink,
    TeacherLink,
    host_rendezvous,
    teacher_session,
)
from vcrd.link.connection import HEADER_BYTES

SHAPES = [Batch(2, 12), Batch(1, 12, (0, 4, 4, 12)), Batch(3, 4), Batch(1, 8, (0, 8)), Batch(1, 4)]
# Shards of padding only, on either side; a vocabulary of one token; more ranks than columns.
EMPTY = dict(
    student_tensor=3, student_context=2, teacher_tensor=4, vocab=5, student_padded=12, teacher_padded=16
)
CORNERS = {
    "top k and empty shards": Drawn(Layout(**EMPTY), "topk", 5, 2, 2, "bfloat16", None, SHAPES),
    "hidden and empty shards": Drawn(
        Layout(**EMPTY, pipeline=1), "hidden", 1, 2, 2, "float16", Head(3, "float16"), SHAPES
    ),
    "logits and empty shards": Drawn(Layout(**EMPTY), "logits_8bit", 1, 1, 1, "float32", None, SHAPES),
    "one token": Drawn(
        Layout(student_tensor=2, teacher_tensor=2, vocab=1, teacher_padded=6),
        "topk",
        1,
        1,
        1,
        "float32",
        None,
        SHAPES,
    ),
    "k as large as the vocabulary": Drawn(
        Layout(teacher_tensor=3, student_data=2, vocab=11), "topk", 11, 3, 2, "float16", None, SHAPES
    ),
    "every size at once": Drawn(
        Layout(
            student_tensor=2,
            student_context=2,
            student_data=2,
            teacher_tensor=3,
            pipeline=1,
            replicas=2,
            vocab=50,
        ),
        "hidden",
        1,
        2,
        3,
        "bfloat16",
        Head(16, "bfloat16", 0.5, 20.0),
        SHAPES,
    ),
}


@pytest.mark.usefixtures("each_transport")
@pytest.mark.parametrize("payload", ["float16", "float32", "logits_8bit", "topk", "hidden"])
def test_each_rank_receives_its_part_of_the_truth_and_what_the_plan_says(payload, tmp_path):
    dice = random.Random(f"{payload} 2026")
    failed = draw.run([draw.draw(dice, payload) for _ in range(4)], tmp_path)
    assert not failed, "\n".join(failed.values())


@pytest.mark.usefixtures("each_transport")
def test_corners(tmp_path):
    failed = draw.run(list(CORNERS.values()), tmp_path)
    assert not failed, "\n".join(failed.values())


def test_the_draw_reaches_every_payload_and_every_kind_of_layout():
    dice = random.Random(5)
    cases = [draw.draw(dice) for _ in range(300)]
    assert {case.payload for case in cases} == {"float16", "float32", "logits_8bit", "topk", "hidden"}
    for name in ("student_tensor", "student_context", "student_data", "teacher_tensor", "replicas"):
        assert len({getattr(case.layout, name) for case in cases}) >= 3, name
    batches = [batch for case in cases for batch in case.batches]
    assert any(batch.rows > 1 for batch in batches) and any(len(batch.edges) > 3 for batch in batches)
    several = [case for case in cases if case.layout.student_context > 1 and case.layout.student_tensor > 1]
    assert any(batch.edges for case in several for batch in case.batches)


# The teacher's output layer: it travels once, in whatever layout the teacher comes back.

HIDDEN = Drawn(
    Layout(
        student_tensor=2, student_context=2, teacher_tensor=2, vocab=51, student_padded=60, teacher_padded=64
    ),
    "hidden",
    1,
    1,
    1,
    "bfloat16",
    Head(16, "bfloat16", 0.5),
    [Batch(2, 8), Batch(2, 8)],
)


def run_student(rank: int, port: int) -> None:
    settings, place = HIDDEN.settings(port, "epochs"), HIDDEN.layout.student(rank)
    rendezvous = host_rendezvous(settings) if rank == 0 else None
    link = StudentLink.connect(settings, **place, device=device())
    wanted = epoch = 0
    for number, _ in enumerate(HIDDEN.batches):
        while not (
            (session := link._connections.session) and session.epoch > epoch and link._connections.linked
        ):
            time.sleep(0.02)  # the next teacher
        epoch = session.epoch
        dist.barrier()
        if link._place.is_request_leader:
            link.request(draw.tokens_of(HIDDEN, 0, number))
        draw.check(HIDDEN, place, number, draw.on_cpu(link.receive(number)))
        once = replace(HIDDEN, batches=HIDDEN.batches[number : number + 1])
        wanted += draw.bytes_wanted(link, once, place, layer=number == 0)
        assert link.bytes_received == wanted, (number, link.bytes_received, wanted)
        dist.barrier()
        print(f"received {number}", flush=True)
    link.close()
    dist.barrier()
    if rendezvous:
        rendezvous.close()


def run_teacher(rank: int, port: int, layout: Layout, head: Head, change: float) -> None:
    drawn = replace(HIDDEN, layout=layout)
    place = layout.teacher(0, rank)
    last = dist.new_group(list(range(layout.pipeline, layout.teachers)))
    weight = draw.head_rows(drawn, place) + change
    link = TeacherLink.connect(
        HIDDEN.settings(port, "epochs"),
        **place,
        group=dist.group.WORLD,
        tensor_group=last if place["place"].is_last_stage else None,
        **(dict(head=head, head_weight=weight) if place["place"].is_last_stage else {}),
    )
    print("serves", flush=True)
    while (batch := link.next_batch(1)) is not None:
        for request in batch:
            if place["place"].is_last_stage:
                link.respond(request, draw.states_of(drawn, 0, request.number).to(device()))
    link.close()


@pytest.mark.usefixtures("each_transport_at_leisure")
def test_a_teacher_that_comes_back_in_another_layout_sends_nothing_of_the_same_output_layer(tmp_path):
    port, layout, head = free_port(), HIDDEN.layout, HIDDEN.head
    other = replace(layout, teacher_tensor=3, pipeline=1, teacher_padded=66)
    with Jobs(tmp_path) as jobs:
        jobs.world("student", layout.students, run_student, port)
        jobs.world("first", layout.teachers, run_teacher, port, layout, head, 0.0)
        jobs.await_output("student0", "received 0")
        for rank in range(layout.teachers):
            jobs.kill(f"first{rank}")
        refused = {
            "weights": (other, head, 0.5, "came back with another output layer than before"),
            "scale": (other, replace(head, scale=2.0), 0.0, "the teacher came back with Head"),
        }
        for name, (changed, wrong, change, message) in refused.items():
            jobs.world(name, changed.teachers, run_teacher, port, changed, wrong, change)
            for rank in range(changed.teachers):
                jobs.processes[f"{name}{rank}"].join(60)
                output = jobs.output(f"{name}{rank}")
                assert "HandshakeRefused" in output and message in output, output
        jobs.world("second", other.teachers, run_teacher, port, other, head, 0.0)
        names = [f"student{rank}" for rank in range(layout.students)]
        names += [f"second{rank}" for rank in range(other.teachers)]
        jobs.wait()
        failed = {name: jobs.output(name) for name in names if jobs.processes[name].exitcode != 0}
        assert not failed, "\n".join(failed.values())


def test_a_damaged_output_layer_is_refused_and_sent_again(monkeypatch, caplog):
    settings = LinkSettings(
        address=f"127.0.0.1:{free_port()}", payload="hidden", timeout=30, connect_timeout=30
    )
    head, weight, states = Head(8, "float32"), torch.randn(50, 8), torch.randn(4, 1, 8)
    layout = Layout(vocab=len(weight))
    real, digests = teacher_session.digest_of, []

    def wrong_at_first(rows: torch.Tensor) -> str:
        digests.append(real(rows))
        return "0" * 64 if len(digests) == 1 else digests[-1]

    def teach() -> None:
        """As any teacher does: an epoch that is lost begins anew while the next request is waited for, so the first
        request may come twice, in the epoch that is about to be lost and in the next."""
        place = layout.teacher(0, 0) | dict(group=None, tensor_group=None)
        teacher = TeacherLink.connect(settings, **place, head=head, head_weight=weight)
        while (requests := teacher.next_batch(1)) is not None:
            teacher.respond(requests[0], states)
        teacher.close()

    monkeypatch.setattr(teacher_session, "digest_of", wrong_at_first)
    rendezvous = host_rendezvous(settings)
    with caplog.at_level(logging.WARNING, "vcrd"), ThreadPoolExecutor(1) as pool:
        teaching = pool.submit(teach)
        student = StudentLink.connect(settings, **layout.student(0))
        student.request(torch.zeros(1, 4, dtype=torch.long))
        got = student.receive(0)
        received = student.bytes_received
        student.close()
        teaching.result()
    assert "a part of the output layer arrived damaged: its SHA-256 differs" in caplog.text
    assert len(digests) == 2
    assert torch.equal(got.weight, weight) and torch.equal(got.states, states)
    answer = HEADER_BYTES + 4 * 8 * 4
    at_least = 2 * (50 * 8 * 4 + HEADER_BYTES) + HEADER_BYTES + answer
    # Of the first epoch, the word that all connections stand and an answer may come before it ends, or not.
    assert received - at_least in (0, HEADER_BYTES, answer, HEADER_BYTES + answer)
    rendezvous.close()


def test_what_the_head_is_must_fit_the_payload_and_the_weight():
    settings = LinkSettings(payload="hidden")
    place = Layout().teacher(0, 0) | dict(group=None, tensor_group=None)
    head = Head(8, "float32")
    for given, message in [
        ({}, "head, head_weight: expected both on the last stage with the payload 'hidden', got None"),
        ({"head": head, "head_weight": torch.zeros(50, 7)}, r"head_weight: expected float32 \[50, 8\], got"),
        (
            {"head": head, "head_weight": torch.zeros(50, 8).bfloat16()},
            r"head_weight: expected float32 \[50, 8\], got",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            TeacherLink.connect(settings, **place, **given)
    with pytest.raises(ValueError, match="head: expected None with the payload 'float16', got Head"):
        TeacherLink.connect(LinkSettings(), **place, head=head, head_weight=torch.zeros(50, 8))


def test_k_beyond_the_vocabulary_is_refused_with_the_same_sentence_on_both_sides():
    settings, layout = LinkSettings(payload="topk", top_k=51), Layout(vocab=50)
    message = "top_k: expected at most vocab_size 50, got 51"
    with pytest.raises(ValueError, match=message):
        StudentLink.connect(settings, **layout.student(0))
    with pytest.raises(ValueError, match=message):
        TeacherLink.connect(settings, **layout.teacher(0, 0), group=None, tensor_group=None)


def test_unequal_k_is_named_on_both_sides():
    address = f"127.0.0.1:{free_port()}"
    student = LinkSettings(address=address, payload="topk", top_k=4, connect_timeout=30)
    rendezvous, layout = host_rendezvous(student), Layout()
    message = "top_k is 4 for the student and 8 for the teacher"
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(
            TeacherLink.connect,
            replace(student, top_k=8),
            **layout.teacher(0, 0),
            **dict(group=None, tensor_group=None),
        )
        with pytest.raises(HandshakeRefused, match=message):
            StudentLink.connect(student, **layout.student(0))
        with pytest.raises(HandshakeRefused, match=message):
            coming.result()
    rendezvous.close()
