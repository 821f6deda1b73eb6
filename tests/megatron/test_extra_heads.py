"""Multi-token prediction: a teacher's extra heads do not run, a student's keep their own loss."""

from __future__ import annotations

import extra_heads_jobs
import jobs
import pytest
import torch
from test_distillation import settings
from worlds import World, run_worlds


@pytest.mark.parametrize(
    ("payload", "layout"), [("float32", {}), ("hidden", {}), ("float32", {"size": 2, "pipeline": 2})]
)
def test_a_teacher_with_extra_heads_serves_its_main_head(payload, layout):
    chosen = settings(payload=payload)
    (student,), served, (truth,) = run_worlds(
        World(jobs.student_job, arguments=(chosen, 2)),
        World(extra_heads_jobs.serve, arguments=(chosen,), **layout),
        World(jobs.direct, arguments=(chosen, 2)),
    )
    for loss, expected in zip(student.distilled, truth.distilled, strict=True):
        torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)
    for rank in served:
        assert rank.served == 4 and rank.ran == [] and rank.as_before
    assert served[-1].has_heads


@pytest.mark.parametrize(("payload", "ranks"), [("float32", 1), ("hidden", 1), ("float32", 2)])
def test_a_teacher_with_extra_heads_in_the_same_ranks_is_as_one_without(payload, ranks):
    chosen = settings(payload=payload)
    found, expected = run_worlds(
        *(
            World(
                extra_heads_jobs.beside,
                ranks,
                pipeline=ranks,
                arguments=(chosen, extra_heads_jobs.TEACHER, extra),
            )
            for extra in (True, False)
        )
    )
    assert found[-1].has_heads and not expected[-1].has_heads
    assert len(found[-1].losses) == 2
    for mine, other in zip(found, expected, strict=True):
        assert mine.ran == []
        for loss, without in zip(mine.losses, other.losses, strict=True):
            torch.testing.assert_close(loss, without, atol=1e-6, rtol=1e-6)
        assert mine.gradients.keys() == other.gradients.keys()
        for name, gradient in mine.gradients.items():
            torch.testing.assert_close(gradient, other.gradients[name], atol=1e-5, rtol=1e-5)


def test_a_student_with_extra_heads_is_taught_in_its_main_head_alone():
    chosen = settings()
    (student,), _, (truth,) = run_worlds(
        World(extra_heads_jobs.student, arguments=(chosen,)),
        World(extra_heads_jobs.serve, arguments=(chosen,)),  # both have some
        World(jobs.direct, arguments=(chosen, 2)),
    )
    for loss, expected in zip(student.distilled, truth.distilled, strict=True):
        torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)
    heads = [name for name in student.gradients if name.startswith("mtp.")]
    assert heads
    for name in heads:
        assert student.gradients[name].abs().max() > 0
        torch.testing.assert_close(
            student.gradients[name], student.plain_gradients[name], atol=1e-6, rtol=1e-5
        )
    assert any(not torch.allclose(g, student.plain_gradients[n]) for n, g in student.gradients.items())
