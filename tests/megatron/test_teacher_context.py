"""A teacher that sees more than its student answers as it does alone on each concatenation."""

from __future__ import annotations

import re

import jobs
import pytest
import teacher_context_jobs
import torch
from teacher_context_jobs import LONGEST, cases, part_of
from test_distillation import settings
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd.megatron.teacher_context import CONTEXT_KEY, POSITIONS_KEY


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
    own = {"sequence_length": jobs.SEQUENCE, "teacher_context_length": LONGEST, "credits": 2}
    return settings(**{**own, **changes})


def test_a_student_of_a_linked_teacher_learns_what_the_reference_does():
    chosen, both = chosen_for_training(), [*ROWS, *PACKED]
    ranks, (served,), (truths,) = run_worlds(
        World(teacher_context_jobs.trained, 2, tensor=2, arguments=(chosen, [{"group": both}], False)),
        World(teacher_context_jobs.serve, arguments=(chosen,)),
        World(teacher_context_jobs.references, arguments=(chosen, [(both, jobs.TEACHER)])),
    )
    assert served == len(both)
    check_steps(ranks, truths)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "per_rank"), [(1, 1, None), (2, 2, None), (1, 2, 2), (1, 4, None)]
)
def test_a_student_of_a_teacher_in_its_ranks_learns_what_the_reference_does(tensor, pipeline, per_rank):
    chosen = chosen_for_training()
    variants = [
        {"group": group, "payload": payload, "per_rank": per_rank, "packs": group is PACKED}
        for group in (ROWS, PACKED)
        for payload in ("float32", "hidden")
    ]
    size = tensor * pipeline
    shape = teacher_context_jobs.local_shape(per_rank or 1, pipeline)
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


WRONG = [
    ({CONTEXT_KEY: torch.zeros(2, 2)}, "vcrd_teacher_context: expected integers .*, got torch.float32"),
    ({CONTEXT_KEY: [[1]]}, "vcrd_teacher_context: expected .* a list of 2 tensors .*, got 1"),
    ({POSITIONS_KEY: [[1], []]}, "vcrd_teacher_context: expected in the micro-batch, beside .*, got none"),
    (
        {CONTEXT_KEY: [[1] * (LONGEST + 1), []]},
        f"teacher_context: expected at most {LONGEST} tokens per sequence, by VCRD_TEACHER_CONTEXT_LENGTH .*, got 10",
    ),
    (
        {CONTEXT_KEY: [[jobs.TRUE_VOCAB], []]},
        r"teacher_context: expected tokens in \[0, 45\), got 45 to 45",
    ),
]
ROUTED = ({"vcrd_teacher": [0, 0]}, "vcrd_teacher: expected none with a teacher in the same ranks, got some")


def test_wrong_fields_are_refused_on_every_rank_alike():
    chosen = chosen_for_training()
    wrongs = [wrong for wrong, _ in [*WRONG, ROUTED]]
    local, none, linked, _ = run_worlds(
        World(teacher_context_jobs.refusals, 2, tensor=2, arguments=(chosen, wrongs, True)),
        World(
            teacher_context_jobs.refusals,
            2,
            tensor=2,
            arguments=(chosen.replaced(teacher_context_length=0), [{CONTEXT_KEY: [[1], []]}], True),
        ),
        World(teacher_context_jobs.refusals, 2, tensor=2, arguments=(chosen, wrongs[:1], False)),
        World(teacher_context_jobs.serve, arguments=(chosen,)),
    )
    for ranks in (local, none, linked):
        assert ranks[0] == ranks[1]
    for found, (_, sentence) in zip([*local[0], *linked[0]], [*WRONG, ROUTED, WRONG[0]], strict=True):
        assert re.match(sentence, found), found
    assert none[0][0].startswith("teacher_context: expected at most 0 tokens per sequence")


def test_a_stage_that_does_not_know_the_context_does_not_guess_a_mask():
    variant = {
        "group": ROWS[1:],
        "mask_between": torch.zeros(1, 1, jobs.SEQUENCE, jobs.SEQUENCE, dtype=torch.bool),
    }
    sentence = (
        "data_iterator: expected a micro-batch with vcrd_teacher_context to be drawn on the last stage, and on a stage "
        "that is given packed_seq_params or packing_kwargs or attention_mask, got none on a stage that is given "
        "attention_mask"
    )
    arguments = (chosen_for_training(), [variant], True)
    with pytest.raises(AssertionError, match=sentence):
        run_worlds(World(teacher_context_jobs.trained, 4, pipeline=4, arguments=arguments))


def test_a_teacher_in_the_same_ranks_needs_positions_for_the_context():
    chosen = chosen_for_training(teacher_context_length=LONGEST + 1)
    ((found,),) = run_worlds(World(teacher_context_jobs.refusals, arguments=(chosen, [{}], True)))
    assert found == ["teacher: expected sequences of up to 22 tokens, got a model of 21"]


def test_the_context_has_no_logits():
    chosen = settings(credits=8, sequence_length=jobs.SEQUENCE, teacher_context_length=LONGEST)
    asked = [*ROWS, *PACKED]
    _, (shapes,) = run_worlds(
        World(teacher_context_jobs.ask, arguments=(chosen, asked)),
        World(teacher_context_jobs.shapes_of_logits, arguments=(chosen, asked)),
    )
    assert shapes == [[jobs.SEQUENCE, len(case.tokens), jobs.TEACHER.vocab_size] for case in asked]


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": "float32"},
        {"payload": "hidden"},
        {"payload": "float32", "weighting": "gap", "normalization": "mass", "divergence": "jsd"},
    ],
    ids=["float32", "hidden", "gap and mass"],
)
def test_context_parallel_ranks_with_a_teacher_have_their_part_of_the_losses(changes):
    chosen = chosen_for_training(**changes)
    group = [*cases(7, packed=False, step=4), *cases(8, packed=True, step=4)]
    ranks, ((truth,),) = run_worlds(
        World(teacher_context_jobs.beside_context_ranks, 2, tensor=0, arguments=(chosen, group)),
        World(teacher_context_jobs.references, arguments=(chosen, [(group, teacher_context_jobs.LOCAL)])),
    )
    for rank, losses in enumerate(ranks):
        for case, loss, whole in zip(group, losses, truth.losses, strict=True):
            expected = part_of(whole.t(), case, rank, 2).t()
            torch.testing.assert_close(loss.double(), expected, atol=5e-5, rtol=5e-5)


def test_the_output_layer_of_two_ranks_multiplies_the_students_positions():
    (ranks,) = run_worlds(World(teacher_context_jobs.picked_logits, 2, tensor=2))
    assert ranks == [[(True, True), (True, True)]] * 2
