"""Context parallelism through a model: answers from a folder, several teachers, a judge, packed sequences."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import context_parallel_jobs as cp
import jobs
import pytest
import several_jobs as several
import torch
from test_distillation import settings as of_one
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd.settings import DistillSettings


def runs(live: DistillSettings, folder: Path) -> list[DistillSettings]:
    """A student of teacher jobs, one that fills a folder for each teacher, and one that has the folders alone."""
    names = [source.name for source in live.link.teachers()]
    cache = ",".join(f"{name}=cache:{folder}/{name}" if name else f"cache:{folder}" for name in names)
    filling = live.replaced(name="filling", teacher=cache)
    return [live.replaced(name="live"), filling, live.replaced(name="cached", teacher=cache, address=None)]


@pytest.mark.parametrize(
    ("names", "size", "tensor", "changes"),
    [
        (("",), 4, 2, {"payload": "float32"}),
        (("math", "code"), 4, 1, {"payload": "float32"}),
        (("math", "code"), 2, 1, {"payload": "math=float32,code=hidden", "validity": "privileged"}),
        (
            ("",),
            2,
            1,
            {"payload": "float32", "weighting": "gap", "normalization": "mass", "divergence": "jsd"},
        ),
    ],
    ids=["cache", "teachers", "judges", "gap and mass"],
)
def test_students_with_context_parallelism_learn_the_same_from_teachers_and_from_folders(
    names, size, tensor, changes, tmp_path
):
    """With TP 2, with DP 2 and teachers that share micro-batches, with a judge of each teacher, and with weights that
    depend on the micro-batch of both ranks. Against the reference, and bit for bit between the links and the folders;
    rows and packed sequences, some with a context."""
    settings = of_one if names == ("",) else lambda **own: several.settings(names, **own)
    sizes = {"sequence_length": jobs.SEQUENCE, "teacher_context_length": cp.LONGEST}
    live = settings(**sizes, **changes)
    chosen, data = runs(live, tmp_path), size // tensor // cp.SIZE
    ranks, (truth,), *served = run_worlds(
        World(cp.students, size, tensor=0, arguments=(chosen, tensor)),
        World(cp.truth, arguments=(live, data)),
        *[World(cp.teach, arguments=(chosen[:2], name)) for name in names],
    )
    for live, *others in ranks:
        for other in others:
            check_equal(live, other)
    check_against_reference([live for live, *_ in ranks], truth)
    assert all(number > 0 for ((one, other),) in served for number in (one, other))


def check_equal(live: SimpleNamespace, other: SimpleNamespace) -> None:
    assert len(live.losses) == len(other.losses) == cp.COUNT and all(each > 0 for each in other.received)
    assert all(map(torch.equal, live.losses, other.losses))
    for mine, theirs in zip([*live.gradients, live.weights], [*other.gradients, other.weights], strict=True):
        assert all(torch.equal(mine[name], theirs.pop(name)) for name in mine) and not theirs


def check_against_reference(lives: list[SimpleNamespace], truth: SimpleNamespace) -> None:
    for live in lives:
        for number, loss in enumerate(live.losses):
            edges = live.edges[number]
            expected = truth.losses[live.data_rank][number][:, cp.columns_of(live.context_rank, edges)]
            # The weights of the second step have the rounding of the first one.
            tolerance = 2e-5 if number < cp.COUNT // cp.STEPS else 2e-4
            torch.testing.assert_close(loss.double(), expected, atol=tolerance, rtol=tolerance)
    for step, gradients in enumerate(truth.gradients):
        shards = {live.place: live.gradients[step] for live in lives}
        found = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
        for name, expected in gradients.items():
            scale = expected.abs().max()
            torch.testing.assert_close(found[name] / scale, expected / scale, atol=4e-4, rtol=0, msg=name)
