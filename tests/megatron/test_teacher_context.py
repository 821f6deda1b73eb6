"""A teacher that sees more than its student answers as it does alone on each concatenation."""

from __future__ import annotations

import jobs
import pytest
import teacher_context_jobs
import torch
from teacher_context_jobs import LONGEST, cases, part_of
from test_distillation import settings
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face


@pytest.mark.parametrize(
    ("payload", "context_size", "teacher", "tolerance"),
    [
        ("float32", 2, (4, 2, 2), 1e-4),
        ("hidden", 1, (2, 1, 2), 1e-4),
        ("topk", 1, (2, 2, 1), 1e-4),
        ("float16", 1, (1, 1, 1), 1e-2),
        ("logits_8bit", 1, (1, 1, 1), 0.15),
    ],
)
def test_each_answer_is_the_teachers_alone_on_the_concatenation(payload, context_size, teacher, tolerance):
    chosen = settings(
        payload=payload,
        top_k=jobs.TRUE_VOCAB,
        credits=8,
        sequence_length=jobs.SEQUENCE,
        teacher_context_length=LONGEST,
    )
    size, tensor, pipeline = teacher
    step = 2 * context_size if context_size > 1 else 1
    asked = [case for seed in range(2) for packed in (False, True) for case in cases(seed, packed, step)]
    ranks, served, (truth,) = run_worlds(
        World(teacher_context_jobs.ask, context_size, arguments=(chosen, asked, context_size)),
        World(
            teacher_context_jobs.serve, size, tensor=tensor, pipeline=pipeline, arguments=(chosen, len(asked))
        ),
        World(teacher_context_jobs.truths, arguments=([asked],)),
    )
    assert set(served) == {len(asked)}
    seen = sum(len(tokens) for case in asked for tokens, _ in case.contexts)
    assert seen > 50 and any(not tokens for case in asked for tokens, _ in case.contexts)
    for rank, answers in enumerate(ranks):
        for case, answer, logits in zip(asked, answers, truth[0], strict=True):
            expected = part_of(logits, case, rank, context_size).log_softmax(-1)
            if payload == "logits_8bit":  # rounds unlikely tokens away
                answer, expected = answer.exp(), expected.exp()
            assert (answer - expected).abs().max() < tolerance


def check_steps(ranks: list[list], truths: list) -> None:
    """Each variant's losses on the last stage and gradients against the reference's."""
    for number, truth in enumerate(truths):
        found = [rank[number] for rank in ranks]
        assert any(rank.losses for rank in found)
        for rank in found:
            for loss, expected in zip(rank.losses, truth.losses, strict=bool(rank.losses)):
                torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)
        shards = {place: part for rank in found for place, part in rank.gradients.items()}
        gradients = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
        for name, expected in truth.gradients.items():
            scale = expected.abs().max()
            assert scale > 0, name
            torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=2e-4, rtol=0, msg=name)


ROWS, PACKED = cases(5, packed=False), cases(6, packed=True)


def chosen_for_training(**changes):
    return settings(sequence_length=jobs.SEQUENCE, teacher_context_length=LONGEST, credits=2, **changes)


def test_a_student_of_a_linked_teacher_learns_what_the_reference_does():
    chosen, both = chosen_for_training(), [*ROWS, *PACKED]
    ranks, (served,), (truths,) = run_worlds(
        World(teacher_context_jobs.trained, 2, tensor=2, arguments=(chosen, [{"group": both}], False)),
        World(teacher_context_jobs.serve, arguments=(chosen,)),
        World(teacher_context_jobs.references, arguments=(chosen, [(both, jobs.TEACHER)])),
    )
    assert served == len(both)
    check_steps(ranks, truths)


@pytest.mark.parametrize(("tensor", "pipeline", "per_rank"), [(1, 1, None), (2, 2, None), (1, 2, 2)])
def test_a_student_of_a_teacher_in_its_ranks_learns_what_the_reference_does(tensor, pipeline, per_rank):
    chosen = chosen_for_training()
    variants = [
        {"group": group, "payload": payload, "per_rank": per_rank}
        for group in (ROWS, PACKED)
        for payload in ("float32", "hidden")
    ]
    size = tensor * pipeline
    shape = teacher_context_jobs.LOCAL if per_rank is None else teacher_context_jobs.DEEP
    ranks, (truths,) = run_worlds(
        World(
            teacher_context_jobs.trained,
            size,
            tensor=tensor,
            pipeline=pipeline,
            virtual=per_rank,
            arguments=(chosen, variants, True),
        ),
        World(teacher_context_jobs.references, arguments=(chosen, [(v["group"], shape) for v in variants])),
    )
    check_steps(ranks, truths)
