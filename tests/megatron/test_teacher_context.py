"""A teacher that sees more than its student answers as it does alone on each concatenation."""

from __future__ import annotations

import jobs
import pytest
import teacher_context_jobs
import torch
from teacher_context_jobs import LONGEST, cases, part_of
from test_distillation import settings
from worlds import World, run_worlds


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
