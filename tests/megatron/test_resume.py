"""A run that resumes is the run that was not stopped, to the last bit, however much is asked ahead."""

from __future__ import annotations

import pytest
import torch
from resume_jobs import MICRO_BATCHES, Case, Outcome, serve, stop_and_resume
from test_distillation import settings
from worlds import World, run_worlds

STEPS = 4


def runs(
    cases: dict[str, Case], per_rank: int | None = None, **layout
) -> list[dict[str, dict[str, Outcome]]]:
    """What each rank of the student did, with 2 micro-batches asked ahead and with none."""
    chosen = settings()
    students, _ = run_worlds(
        World(stop_and_resume, arguments=(chosen, cases, STEPS, 2, per_rank), **layout),
        World(serve, arguments=(chosen, cases, STEPS)),
    )
    return students


def check(title: str, found: dict[str, Outcome]) -> None:
    """All runs of a case have the same losses, and evaluate alike."""
    plain = found["plain"]
    assert len(plain.losses) == STEPS
    for name, run in found.items():
        step = STEPS - len(run.losses)
        same(run.losses, plain.losses[step:], f"{title}, {name}")
        same(run.evaluated, plain.evaluated[step:], f"{title}, {name}, evaluated")
        for number, losses in run.repeated.items():
            same([losses], [plain.losses[number]], f"{title}, {name}, again")


def same(some: list[list[torch.Tensor]], others: list[list[torch.Tensor]], name: str) -> None:
    assert len(some) == len(others), name
    for step, (one, other) in enumerate(zip(some, others, strict=True)):
        assert len(one) == len(other), name
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (name, step)


def test_resumed_runs_draw_the_samples_and_the_dropout_of_the_uninterrupted_one():
    cases = {
        "data": Case(evaluate=True),
        "dropout": Case(draws=(), dropout=0.2),
        "both": Case(dropout=0.2, evaluate=True),
        "apart": Case(draws=("numpy", "random"), dropout=0.2),
    }
    (found,) = runs(cases)
    for title, of_case in found.items():
        check(title, of_case)
        losses = [loss for step in of_case["plain"].losses for loss in step]
        assert not any(torch.equal(losses[0], other) for other in losses[1:])
        # Where both draw from one generator nothing can be asked ahead; elsewhere it is, from the second step at the
        # latest, and pending when the run ends.
        assert of_case["whole"].pending[1:] == [0 if title == "both" else 2] * (STEPS - 1)
    assert found["dropout"]["whole"].pending[0] == 2


def test_a_step_that_is_run_again_moves_the_random_state_as_it_did_the_first_time():
    """With fewer micro-batches ahead than may be, of which only one tensor rank knows."""
    cases = {"data": Case(rejected=(1, 2)), "both": Case(dropout=0.2, rejected=(1, 3), evaluate=True)}
    for found in runs(cases, size=2, tensor=2):
        for title, of_case in found.items():
            check(title, of_case)
            # Megatron checks no first step of a process.
            assert of_case["whole"].repeated.keys() == set(cases[title].rejected)


def test_an_interleaved_pipeline_resumes_alike():
    """Each chunk has an iterator, and those that no teacher is asked for draw from the same random state."""
    cases = {"data": Case(evaluate=True), "dropout": Case(draws=(), dropout=0.2)}
    for found in runs(cases, per_rank=2, size=2, pipeline=2, virtual=2):
        for title, of_case in found.items():
            assert all(run.source_back for run in of_case.values())
            if of_case["plain"].losses[0]:  # the last stage
                check(title, of_case)


@pytest.mark.parametrize("rejected", [(), (1, 2)])
def test_a_loader_saves_its_state_as_of_the_micro_batches_that_were_trained_on(rejected):
    cases = {"loader": Case(saves=True, rejected=rejected)}
    (found,) = runs(cases)
    check("loader", found["loader"])
    for name, run in found["loader"].items():
        states = [saved.loader for saved in run.checkpoints]
        steps = range(STEPS - len(run.losses) + 1, STEPS + 1)
        assert states == [{"next": MICRO_BATCHES * step} for step in steps], name
        assert run.source_back, "close() leaves Megatron's iterator as it was found"
    assert found["loader"]["whole"].pending[-1] == 2
