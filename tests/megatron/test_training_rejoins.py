"""Megatron training outlives its teacher, and the teacher its student, with the same weights in the end."""

from __future__ import annotations

import jobs
import torch
import training_chaos as chaos
from worlds import World, Worlds

STEPS = 40


def test_a_teacher_killed_again_and_again_changes_no_bit():
    undisturbed = chaos.quiet(STEPS)
    results = chaos.disturbed(STEPS, kills=4, seed=7)
    assert chaos.equal(undisturbed, results)
    assert len({tuple(loss.flatten().tolist()) for loss in results[0].curve}) == STEPS  # it did train


def test_a_student_that_resumes_finds_the_same_teacher_and_its_curve(tmp_path):
    chosen, checkpoint = chaos.settings(), str(tmp_path / "checkpoint")
    with Worlds() as worlds:
        teacher = worlds.start(World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)))
        first = worlds.start(
            World(chaos.train, 2, tensor=2, arguments=(chosen, STEPS, checkpoint, STEPS // 2))
        )
        for process in first.processes:
            process.join(100)
        assert [process.exitcode for process in first.processes] == [0, 0]
        again = worlds.start(World(chaos.train, 2, tensor=2, arguments=(chosen, STEPS, checkpoint, None)))
        resumed, served = worlds.wait(again, teacher)
    assert served[0] >= STEPS * chaos.MICRO_BATCHES
    undisturbed = chaos.quiet(STEPS)
    assert torch.equal(resumed[0].curve, undisturbed[0].curve)
    assert chaos.equal(undisturbed, resumed)
