"""A teacher of another tokenizer or of other weights: refused, insisted on or named, with every payload."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import link_jobs
import pytest
import torch
from link_jobs import Layout, part
from ports import free_port
from rejoin_jobs import settings_for

from vcrd.link import (
    HandshakeRefused,
    Head,
    Identity,
    LinkSettings,
    StudentLink,
    TeacherLink,
    Tokenizer,
    handshake,
    host_rendezvous,
)
from vcrd.link.handshake import Handshake

PAYLOADS = ["float16", "float32", "logits_8bit", "topk", "hidden"]
MINE = Tokenizer("HuggingFaceTokenizer", 50, "a1" * 32)
OTHER = Tokenizer("HuggingFaceTokenizer", 50, "b2" * 32)
NULL = Tokenizer("NullTokenizer", 50)
OTHERS = (
    "tokenizer is HuggingFaceTokenizer of 50 tokens (vocabulary a1a1a1a1a1a1) for the student and "
    "HuggingFaceTokenizer of 50 tokens (vocabulary b2b2b2b2b2b2) for the teacher, "
    "which give other tokens to the same ids"
)
HANDSHAKE = Handshake(50, 16, "float16", 64, 64, tensor_size=2, copies=2, tokenizer=MINE)
TEACHER = replace(HANDSHAKE, weights="00ab", checkpoint="/old")


def judged(
    student: Handshake, teacher: Handshake, first: Handshake | None = None
) -> tuple[str | None, list[str]]:
    return handshake.refusal(student, teacher, 2, first), handshake.doubts(student, teacher, first)


def with_identity(identity: str, **changes) -> Handshake:
    return replace(HANDSHAKE, identity=identity, **changes)


def test_what_is_equal_is_let_in_without_a_word():
    for identity in ("check", "insist", "warn"):
        assert judged(with_identity(identity), TEACHER, TEACHER) == (None, [])
    # The same vocabulary, kept by another class: Megatron's differ from one version to the next.
    renamed = replace(TEACHER, tokenizer=replace(MINE, kind="PreTrainedTokenizerFast", size=48))
    assert judged(HANDSHAKE, renamed) == (None, [])
    null = with_identity("check", tokenizer=NULL), replace(TEACHER, tokenizer=NULL)
    assert judged(*null) == (None, [])
    assert judged(with_identity("check", tokenizer=None), replace(HANDSHAKE, tokenizer=None)) == (None, [])


def test_another_vocabulary_is_refused_or_named():
    teacher = replace(TEACHER, tokenizer=OTHER)
    for identity in ("check", "insist"):
        refused = f"the link is refused: {OTHERS}; identity 'warn' would let it in"
        assert judged(with_identity(identity), teacher) == (refused, [])
    assert judged(with_identity("warn"), teacher) == (None, [OTHERS])


def test_what_cannot_be_compared_is_named_and_refused_where_somebody_insists():
    teacher = replace(TEACHER, tokenizer=NULL)
    refused, named = judged(HANDSHAKE, teacher)
    assert refused is None and len(named) == 1
    assert named[0].endswith(
        "NullTokenizer of 50 tokens (no vocabulary) for the teacher: these cannot be compared"
    )
    refused, _ = judged(with_identity("insist", tokenizer=None), replace(teacher, weights=""))
    for missing in (
        "the student states no tokenizer with a vocabulary",
        "the teacher states no tokenizer with a vocabulary",
        "the teacher states no digest of its weights",
    ):
        assert f"identity is 'insist', and {missing}" in refused


def test_other_weights_than_the_first_teachers_are_refused_or_named():
    teacher = replace(TEACHER, weights="00cd", checkpoint="")
    said = "this teacher has the weights 00cd, the first of this run 00ab (/old)"
    refused, named = judged(HANDSHAKE, teacher, TEACHER)
    assert refused == f"the link is refused: {said}; identity 'warn' would let it in" and named == []
    assert judged(with_identity("warn"), teacher, TEACHER) == (None, [said])
    assert (
        judged(HANDSHAKE, teacher, None)
        == judged(HANDSHAKE, teacher, replace(TEACHER, weights=""))
        == (None, [])
    )
    unknown = "this teacher's weights are not known, the first of this run has 00ab (/old)"
    assert judged(HANDSHAKE, replace(TEACHER, weights=""), TEACHER) == (None, [unknown])


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": 1},
        {"tokenizer": {"kind": "x"}},
        {"tokenizer": {"kind": "", "size": 1, "digest": ""}},
        {"tokenizer": {"kind": "x" * 201, "size": 1, "digest": ""}},
        {"tokenizer": {"kind": "x", "size": True, "digest": ""}},
        {"tokenizer": {"kind": "x", "size": 1 << 40, "digest": ""}},
        {"tokenizer": {"kind": "x", "size": 1, "digest": "G"}},
        {"weights": 7},
        {"weights": "a" * 65},
        {"checkpoint": "x" * 201},
        {"checkpoint": None},
        {"identity": "trust"},
        {"identity": []},
    ],
)
def test_statements_of_the_wrong_kind_are_refused(change):
    assert handshake.read(TEACHER.plain(), "teacher") == TEACHER
    with pytest.raises(HandshakeRefused, match="handshake is not that of protocol"):
        handshake.read(TEACHER.plain() | change, "teacher")


def test_the_setting_is_one_of_three():
    with pytest.raises(ValueError, match=": expected one of check, insist, warn, got 'trust'"):
        LinkSettings(identity="trust")


def teacher_of(settings: LinkSettings, layout: Layout, replica: int = 0, **stated) -> TeacherLink:
    """stated: its tokenizer and weights. With the payload "hidden" its output layer is the same in any case."""
    head = {"head": Head(4, "float32"), "head_weight": torch.ones(50, 4)}
    return TeacherLink.connect(
        settings,
        **layout.teacher(replica, 0),
        group=None,
        tensor_group=None,
        identity=Identity(**stated),
        **(head if settings.payload == "hidden" else {}),
    )


def exchange(student: StudentLink, teacher: TeacherLink, number: int) -> None:
    (request,) = teacher.next_batch(1)
    width = 4 if teacher._settings.payload == "hidden" else 50
    teacher.respond(request, torch.ones(4, 1, width, device=link_jobs.device()))
    student.receive(number)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_teacher_that_comes_back_with_other_weights_is_refused_and_the_right_one_let_in(payload, caplog):
    settings, layout = settings_for(free_port(), payload=payload, top_k=5), Layout()
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(StudentLink.connect, settings, **layout.student(0), tokenizer=MINE)
        teacher = teacher_of(settings, layout, weights=5, checkpoint="/run/a", tokenizer=MINE)
        student = coming.result()
        student.request(torch.zeros(1, 4, dtype=torch.long))
        exchange(student, teacher, 0)
        teacher.close()
        student.request(torch.zeros(1, 4, dtype=torch.long))
        waiting = pool.submit(student.receive, 1)
        sentence = (
            r"^the link is refused: this teacher has the weights 0{15}6 \(/run/b\), the first of this run 0{15}5 "
            r"\(/run/a\); identity 'warn' would let it in$"
        )
        with pytest.raises(HandshakeRefused, match=sentence):
            teacher_of(settings, layout, weights=6, checkpoint="/run/b", tokenizer=MINE)
        assert (
            "teacher replica 0 is refused: the link is refused: this teacher has the weights" in caplog.text
        )
        with pytest.raises(
            HandshakeRefused, match="^the link is refused: tokenizer is HuggingFaceTokenizer of 50"
        ):
            teacher_of(settings, layout, weights=5, tokenizer=OTHER)
        assert not waiting.done()
        right = teacher_of(settings, layout, weights=5, tokenizer=MINE)
        (request,) = right.next_batch(1)
        assert request.number == 1
        width = 4 if payload == "hidden" else 50
        right.respond(request, torch.ones(4, 1, width, device=link_jobs.device()))
        waiting.result()
    part(student, right)
    rendezvous.close()


def test_with_a_warning_it_is_let_in_and_both_jobs_say_so_once(caplog):
    settings, layout = settings_for(free_port(), payload="float16", identity="warn"), Layout()
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(StudentLink.connect, settings, **layout.student(0), tokenizer=MINE)
        first = teacher_of(settings, layout, weights=5, tokenizer=OTHER)
        student = coming.result()
        for number, weights in enumerate((5, 6, 6)):
            if number:
                first.close()
                first = teacher_of(settings, layout, weights=weights, tokenizer=OTHER)
            student.request(torch.zeros(1, 4, dtype=torch.long))
            exchange(student, first, number)
    said = [record.getMessage() for record in caplog.records]
    # Both jobs are in this process.
    assert said.count(f"teacher replica 0: {OTHERS}") == 2
    other = "teacher replica 0: this teacher has the weights 0000000000000006, the first of this run 0000000000000005"
    assert said.count(other) == 2
    part(student, first)
    rendezvous.close()


def test_replicas_of_other_weights_are_refused_with_their_students():
    settings, layout = settings_for(free_port(), payload="float16"), Layout(student_data=2, replicas=2)
    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(2) as pool:
        students = [pool.submit(StudentLink.connect, settings, **layout.student(rank)) for rank in range(2)]
        first = teacher_of(settings, layout, 0, weights=5)
        with pytest.raises(
            HandshakeRefused, match="this teacher has the weights 0{15}6, the first of this run 0{15}5"
        ):
            teacher_of(settings, layout, 1, weights=6)
        with pytest.raises(
            HandshakeRefused, match="this teacher has the weights 0{15}6, the first of this run 0{15}5"
        ):
            students[1].result()
        part(students[0].result(), first)
    rendezvous.close()


def replica_states(rank: int, settings: LinkSettings, layout: Layout) -> None:
    """A replica of two stages whose ranks each know their own share; rank 0 knows the tokenizer."""
    own = {"tokenizer": MINE, "checkpoint": "/run/a"} if rank == 0 else {}
    link = TeacherLink.connect(
        settings,
        **layout.teacher(0, rank),
        group=torch.distributed.group.WORLD,
        tensor_group=None,
        identity=Identity(weights=40 + rank, **own),
    )
    print(f"stated {link._handshake.weights} {link._handshake.tokenizer} {link._handshake.checkpoint}")
    assert link.next_batch(1) is None
    link.close()


def student_leaves(settings: LinkSettings, layout: Layout) -> None:
    rendezvous = host_rendezvous(settings)
    link = StudentLink.connect(settings, **layout.student(0), tokenizer=MINE)
    teacher = link._connections.session.teacher
    assert (teacher.weights, teacher.tokenizer, teacher.checkpoint) == (f"{81:016x}", MINE, "/run/a")
    link.close()
    rendezvous.close()


def test_a_replica_states_the_sum_of_its_ranks_and_what_rank_0_knows(tmp_path):
    settings, layout = settings_for(free_port(), payload="float16"), Layout(pipeline=1)
    with link_jobs.Jobs(tmp_path) as jobs:
        jobs.world("teacher", 2, replica_states, settings, layout)
        jobs.start("student", student_leaves, settings, layout)
        jobs.succeed()
        for rank in range(2):
            assert f"stated {81:016x} {MINE} /run/a" in jobs.output(f"teacher{rank}")
