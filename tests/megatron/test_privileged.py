"""Privileged validity in training: the teacher is distilled without its context, and judges with it."""

from __future__ import annotations

import privileged_jobs
import pytest
import teacher_context_jobs as contexts
import torch
from privileged_jobs import some
from test_distillation import settings
from test_teacher_context import check_steps, chosen_for_training
from worlds import World, run_worlds

from vcrd.cache.files import Cache
from vcrd.megatron.external_validity import ExternalValidity

ROWS, PACKED = some(5, packed=False), some(6, packed=True)
BOTH = [*ROWS, *PACKED]


def chosen(**changes):
    return chosen_for_training(validity="privileged", **changes)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "per_rank"),
    [(1, 1, None), (2, 2, None), (1, 2, 2)],
)
def test_a_teacher_in_the_same_ranks_judges_as_the_reference_does(tensor, pipeline, per_rank):
    variants = [
        {"group": group, "payload": payload, "per_rank": per_rank, "packs": group is PACKED}
        for group, payload in ((ROWS, "float32"), (PACKED, "hidden"))
    ]
    shape = contexts.LOCAL if per_rank is None else contexts.DEEP
    ranks, (truths,) = run_worlds(
        World(
            privileged_jobs.trained,
            tensor * pipeline,
            tensor=tensor,
            pipeline=pipeline,
            virtual=per_rank,
            arguments=(chosen(), variants, True),
        ),
        World(
            privileged_jobs.references, arguments=(chosen(), [(each["group"], shape) for each in variants])
        ),
    )
    check_steps(ranks, truths)


@pytest.mark.parametrize("payload", ["float32", pytest.param("hidden", marks=pytest.mark.slow)])
def test_context_parallel_ranks_with_a_teacher_in_them_have_their_part_of_the_losses(payload):
    asked, group = chosen(payload=payload), [*some(7, packed=False), *some(8, packed=True, step=4)]
    ranks, ((truth,),) = run_worlds(
        World(privileged_jobs.beside_context_ranks, 2, tensor=0, arguments=(asked, group)),
        World(privileged_jobs.references, arguments=(asked, [(group, contexts.LOCAL)])),
    )
    for rank, losses in enumerate(ranks):
        for case, loss, whole in zip(group, losses, truth.losses, strict=True):
            expected = contexts.part_of(whole.t(), case, rank, 2).t()
            torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fused_head", ["off", "on"])
def test_a_linked_teacher_is_asked_twice_and_judges_as_the_reference_does(fused_head):
    asked = chosen(fused_head=fused_head)
    ranks, (served,), (truths,) = run_worlds(
        World(privileged_jobs.trained, 2, tensor=2, arguments=(asked, [{"group": BOTH}], False)),
        World(contexts.serve, arguments=(asked,)),
        World(privileged_jobs.references, arguments=(asked, [(BOTH, contexts.jobs.TEACHER)])),
    )
    assert served == 2 * len(BOTH)
    check_steps(ranks, truths)


def test_a_micro_batch_without_a_context_is_refused_on_every_rank():
    asked = chosen()
    local, linked, _ = run_worlds(
        World(contexts.refusals, 2, tensor=2, arguments=(asked, [{}], True)),
        World(contexts.refusals, 2, tensor=2, arguments=(asked, [{}], False)),
        World(contexts.serve, arguments=(asked,)),
    )
    for (sentence,), (other,) in (local, linked):
        assert sentence == other
        assert sentence.startswith(
            "vcrd_teacher_context: expected in every micro-batch with validity 'privileged'"
        )


def test_settings_that_leave_no_judge_are_refused():
    with pytest.raises(
        ValueError, match="TEACHER_CONTEXT_LENGTH.*: expected more than 0 with validity 'priv.*got 0"
    ):
        settings(validity="privileged")
    with pytest.raises(ValueError, match="verifier: expected none with the settings' validity 'privileged'"):
        ExternalValidity(chosen(), "tokens", lambda *actions: actions)


def fill(asked, folder: str, by_link: bool) -> list[int]:
    """Sequences that were written and found, of a cache for a training with a judge."""
    from vcrd.megatron import fill_cache, fill_cache_by_link

    batches = privileged_jobs.micro_batches(BOTH)
    if by_link:
        filled = fill_cache_by_link(batches, folder, asked)
    else:
        filled = fill_cache(contexts.model(), batches, folder, asked)
    return list(filled[:2])


def test_a_cache_that_is_filled_for_a_judge_has_both_answers(tmp_path):
    asked, here, there = chosen(payload="float32"), tmp_path / "here", tmp_path / "there"
    (one,), (other,), (served,) = run_worlds(
        World(fill, arguments=(asked, str(here), False)),
        World(fill, arguments=(asked, str(there), True)),
        World(contexts.serve, arguments=(asked,)),
    )
    assert one == other and served == 2 * len(BOTH) and one[0] > sum(len(case.contexts) for case in BOTH)
    cached = asked.replaced(address=None, teacher=f"cache:{here}")
    assert sorted(Cache(here).keys()) == sorted(Cache(there).keys())
    ranks, (truths,) = run_worlds(
        World(privileged_jobs.trained, 2, tensor=2, arguments=(cached, [{"group": BOTH}], False)),
        World(privileged_jobs.references, arguments=(asked, [(BOTH, contexts.jobs.TEACHER)])),
    )
    check_steps(ranks, truths)
