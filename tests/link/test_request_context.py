"""Tokens that only the teacher sees: over the link as they were, limited on both ends, and never in an answer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from link_jobs import Layout, connected, part, true_logits
from ports import free_port
from rejoin_jobs import settings_for

from vcrd.link import LinkSettings, TeacherLink, host_rendezvous
from vcrd.link.handshake import Handshake, refusal
from vcrd.link.question import NO_CONTEXT, Context, check_context
from vcrd.link.requests import Request

VOCAB, SEQUENCE, LONGEST = 50, 16, 5


def settings(**changes) -> LinkSettings:
    return replace(settings_for(free_port(), payload="float32"), teacher_context_length=LONGEST, **changes)


def context(tokens: list[int], places: list[int]) -> Context:
    return Context(torch.tensor(tokens, dtype=torch.int64), torch.tensor(places, dtype=torch.int64))


ASKED = [
    (torch.arange(8).view(2, 4), (), NO_CONTEXT),
    (torch.arange(8).view(2, 4), (), context([49, 0, 7], [0, 0, 7])),
    (torch.arange(8).view(2, 4), (), context([3] * 10, [0, 1, 2, 3, 3, 4, 5, 6, 7, 7])),
    (torch.arange(20).view(1, 20), (0, 12, 20), context([3] * 10, [0] * 5 + [12] * 5)),
]


def check(request: Request, number: int) -> None:
    tokens, edges, sent = ASKED[number]
    assert request.number == number and torch.equal(request.tokens, tokens)
    assert request.boundaries.tolist() == list(edges)
    for mine, theirs in zip(request.context, sent, strict=True):
        assert mine.dtype == torch.int64 and torch.equal(mine, theirs)


def test_a_context_arrives_as_it_was_and_again_at_a_teacher_that_comes_back():
    chosen = settings(credits=4)
    rendezvous = host_rendezvous(chosen)
    student, teacher = connected(chosen)
    for tokens, edges, sent in ASKED:
        student.request(tokens, edges, sent)
    respond(teacher, taken(teacher, 1))
    student.receive(0)
    teacher.close()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(student.receive, 1)
        teacher = TeacherLink.connect(chosen, **Layout().teacher(0, 0), group=None, tensor_group=None)
        respond(teacher, taken(teacher, len(ASKED) - 1))
        waiting.result()
    for number in (2, 3):
        assert student.receive(number).logits.shape[:2] == ASKED[number][0].T.shape
    part(student, teacher)
    rendezvous.close()


def taken(teacher: TeacherLink, count: int) -> list[Request]:
    found: list[Request] = []
    while len(found) < count:
        found += teacher.next_batch(count - len(found))
    for request in found:
        check(request, request.number)
    return found


def respond(teacher: TeacherLink, requests: list[Request]) -> None:
    for request in requests:
        teacher.respond(request, true_logits(request.tokens, VOCAB))


def test_requests_of_one_shape_share_a_batch_whatever_their_contexts():
    chosen = settings(credits=4)
    rendezvous = host_rendezvous(chosen)
    student, teacher = connected(chosen)
    arrived = threading.Event()
    whole = teacher._sessions[0].requests._changed.notify_all
    receiver = teacher._sessions[0].requests
    receiver._changed.notify_all = lambda: (arrived.set() if len(receiver._queue) == 3 else None, whole())
    for tokens, edges, sent in ASKED[:3]:
        student.request(tokens, edges, sent)
    assert arrived.wait(60)
    respond(teacher, requests := teacher.next_batch(3))
    assert [request.number for request in requests] == [0, 1, 2]
    for request in requests:
        check(request, request.number)
    for number in range(3):
        logits = student.receive(number).logits.log_softmax(-1)
        torch.testing.assert_close(logits, true_logits(ASKED[number][0], VOCAB).log_softmax(-1))
    part(student, teacher)
    rendezvous.close()


def test_an_answer_has_the_same_bytes_with_a_context():
    chosen = settings()
    rendezvous = host_rendezvous(chosen)
    student, teacher = connected(chosen)
    received = []
    for number, asked in enumerate(ASKED[:3]):
        before = student.bytes_received
        student.request(*asked)
        respond(teacher, taken(teacher, 1))
        student.receive(number)
        received.append(student.bytes_received - before)
    assert received[1] == received[2] > 8 * VOCAB * 4
    part(student, teacher)
    rendezvous.close()


WRONG = [
    (context([1], [0, 0]), r"teacher_context: expected tokens \[c\] and as many places, got \[1\] and \[2\]"),
    (Context(torch.tensor([[1]]), torch.tensor([[0]])), r"teacher_context: expected tokens \[c\]"),
    (
        Context(torch.tensor([1.0]), torch.tensor([0])),
        "teacher_context: expected integers, got torch.float32",
    ),
    (context([50], [0]), r"teacher_context: expected tokens in \[0, 50\), got 50 to 50"),
    (context([-1], [0]), r"teacher_context: expected tokens in \[0, 50\), got -1 to -1"),
    (context([1], [8]), r"teacher_context: expected ascending places in \[0, 8\), got \[8\]"),
    (context([1, 1], [3, 2]), r"teacher_context: expected ascending places in \[0, 8\), got \[3, 2\]"),
    (
        context([1] * 6, [4] * 6),
        r"teacher_context: expected at most 5 tokens per sequence, by VCRD_TEACHER_CONTEXT_LENGTH .*, got 6",
    ),
]


def test_a_wrong_context_is_one_sentence_and_nothing_is_sent():
    chosen = settings()
    rendezvous = host_rendezvous(chosen)
    student, teacher = connected(chosen)
    for wrong, sentence in WRONG:
        with pytest.raises(ValueError, match=sentence):
            student.request(ASKED[0][0], (), wrong)
    tokens, edges, right = ASKED[1]
    student.request(*ASKED[0])
    student.request(tokens, edges, right)
    respond(teacher, taken(teacher, 2))
    for number in range(2):
        student.receive(number)
    part(student, teacher)
    rendezvous.close()


def test_the_longest_sequence_counts_and_not_the_whole():
    def checked(edges: list[int], places: list[int], batch: int = 1, most: int = 64) -> None:
        sent = context([0] * len(places), places)
        check_context(sent, batch, 16 // batch, edges, vocab_size=1, longest=2, most=most)

    checked([], [0, 15])
    checked([], [0, 1, 8, 15], batch=2)
    checked([0, 4, 4, 16], [0, 3, 4, 15])
    checked([], [0, 1], batch=16, most=32)
    with pytest.raises(ValueError, match="at most 2 tokens per sequence, .*, got 3"):
        checked([], [0, 1, 7, 8], batch=2)
    with pytest.raises(ValueError, match="at most 2 tokens per sequence, .*, got 3"):
        checked([0, 4, 4, 16], [0, 4, 4, 15])
    with pytest.raises(ValueError, match="at most 47 tokens that the teacher sees in a micro-batch, got 48"):
        checked([], [3, 3], batch=16, most=47)
    with pytest.raises(ValueError, match="at most 17 tokens that the teacher sees in a micro-batch, got 18"):
        checked([0, 16], [3, 3], most=17)


@pytest.mark.parametrize(("positions", "fits"), [(0, True), (21, True), (20, False), (16, False)])
def test_a_teacher_that_is_too_short_is_refused_by_name(positions, fits):
    student = Handshake(50, 16, "float16", 64, 64, tensor_size=1, copies=1, teacher_context_length=LONGEST)
    teacher = Handshake(50, 16, "float16", 64, 64, tensor_size=1, copies=1, positions=positions)
    sentence = refusal(student, teacher, 1)
    if fits:
        assert sentence is None
    else:
        assert sentence == (
            "the link is refused: teacher_context_length 5 of the student beside sequences of 16 needs 21 positions, "
            f"and the teacher's model has {positions}"
        )
    assert refusal(replace(student, teacher_context_length=0), teacher, 1) is None


def test_a_student_that_stated_no_context_sends_none():
    chosen = replace(settings(), teacher_context_length=0)
    rendezvous = host_rendezvous(chosen)
    student, teacher = connected(chosen)
    with pytest.raises(ValueError, match="expected at most 0 tokens per sequence"):
        student.request(*ASKED[1])
    student.close()
    assert teacher.next_batch(1) is None
    teacher.close()
    rendezvous.close()
