"""Weights that depend on the micro-batches of all ranks are the same in every layout, through the plug."""

from __future__ import annotations

import jobs
import pooled_jobs
import pytest
import torch
from pooled_jobs import STEPS, Layout
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd.settings import DistillSettings

CHOSEN = [
    DistillSettings(vocab_size=jobs.TRUE_VOCAB, **changes)
    for changes in (
        {"weighting": "gap", "divergence": "jsd"},
        {"weighting": "gap", "validity": "scores", "normalization": "mass", "fused_head": "on"},
        {"normalization": "mean", "ce_weight": 0.2},
    )
]


@pytest.fixture(scope="module")
def truths():
    ((found,),) = run_worlds(World(pooled_jobs.truths, arguments=(CHOSEN,)))
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(data=2),
        pytest.param(Layout(tensor=2, data=2), marks=pytest.mark.slow),
        Layout(pipeline=2, data=2),
        pytest.param(Layout(tensor=2, pipeline=2), marks=pytest.mark.slow),
        pytest.param(Layout(pipeline=2, data=2, per_rank=2), marks=pytest.mark.slow),
    ],
    ids=lambda layout: f"tp{layout.tensor}-pp{layout.pipeline}-dp{layout.data}-{layout.per_rank}",
)
def test_losses_and_gradients_equal_those_of_one_process(layout, truths):
    (ranks,) = run_worlds(
        World(
            pooled_jobs.runs,
            layout.size,
            layout.tensor,
            layout.pipeline,
            layout.per_rank,
            arguments=(CHOSEN, layout),
        )
    )
    for number, truth in enumerate(truths):
        found = [rank[number] for rank in ranks]
        rows = pooled_jobs.ROWS // layout.data
        losses = [each for each in found if each.losses is not None]
        assert len(losses) == layout.tensor * layout.data
        for each in losses:
            mine = slice(each.rank * rows, (each.rank + 1) * rows)
            for loss, expected in zip(each.losses, truth.losses, strict=True):
                torch.testing.assert_close(loss.double(), expected[mine], atol=5e-5, rtol=5e-5)
        for step in range(STEPS):
            shards = {place: part for each in found for place, part in each.gradients[step].items()}
            gradients = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
            assert gradients.keys() == truth.gradients[step].keys()
            for name, expected in truth.gradients[step].items():
                scale = expected.abs().max().clamp(min=1e-3)
                torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=3e-4, rtol=0)


def test_a_resumed_step_has_the_losses_and_gradients_of_the_run_bit_for_bit():
    (ranks,) = run_worlds(World(pooled_jobs.resumed, 2, arguments=(CHOSEN[1],)))
    for whole, again in ranks:
        assert len(again.losses) == pooled_jobs.MICRO_BATCHES
        for loss, expected in zip(again.losses, whole.losses[-len(again.losses) :], strict=True):
            assert torch.equal(loss, expected)
        for place, expected in whole.gradients[-1].items():
            for name, gradient in expected.items():
                assert torch.equal(again.gradients[-1][place][name], gradient), name
