"""Megatron training outlives its teacher, and the teacher its student, with the same weights in the end."""

from __future__ import annotations

import functools

import jobs
import pytest
import torch
import training_chaos as chaos
from worlds import World, Worlds


@pytest.fixture(scope="module")
def undisturbed():
    """Results by the number of steps."""
    return functools.cache(chaos.quiet)


@pytest.mark.parametrize(("steps", "kills"), [(8, 1), pytest.param(40, 4, marks=pytest.mark.slow)])
def test_a_teacher_killed_again_and_again_changes_no_bit(undisturbed, steps, kills):
    results = chaos.disturbed(steps, kills, seed=7)
    assert chaos.equal(undisturbed(steps), results)
    assert len({tuple(loss.flatten().tolist()) for loss in results[0].curve}) == steps  # it did train


@pytest.mark.parametrize("steps", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_a_student_that_resumes_finds_the_same_teacher_and_its_curve(undisturbed, steps, tmp_path):
    chosen, checkpoint = chaos.settings(), str(tmp_path / "checkpoint")
    with Worlds() as worlds:
        teacher = worlds.start(World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)))
        first = worlds.start(
            World(chaos.train, 2, tensor=2, arguments=(chosen, steps, checkpoint, steps // 2))
        )
        for process in first.processes:
            process.join(100)
        assert [process.exitcode for process in first.processes] == [0, 0]
        again = worlds.start(World(chaos.train, 2, tensor=2, arguments=(chosen, steps, checkpoint, None)))
        resumed, served = worlds.wait(again, teacher)
    assert served[0] >= steps * chaos.MICRO_BATCHES
    assert torch.equal(resumed[0].curve, undisturbed(steps)[0].curve)
    assert chaos.equal(undisturbed(steps), resumed)
