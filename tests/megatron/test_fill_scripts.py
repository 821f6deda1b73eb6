"""The scripts fill a cache from the data of a training, and the training from it has the losses of the live link."""

from __future__ import annotations

import importlib.util
import re

import pretrain_jobs
import pytest
import torch
from pretrain_jobs import Run

from vcrd.cache.files import Cache
from vcrd.link.plan import Shard, Span

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)

STEPS = 3
SEQUENCES = STEPS * 8  # of a global batch


def contents(folder) -> dict[bytes, torch.Tensor]:
    cache, found = Cache(folder), {}
    for key in cache.keys():
        found[key] = torch.empty(cache.rows_of(key), 127)
        cache.read(key, [Span(0, len(found[key]))], Shard(0, 127), [found[key]])
    return found


def figures(before: str, said: str) -> tuple[int, int]:
    """Sequences written, and found, in the line that begins so."""
    written, found = re.search(
        rf"^{before}(\d+) sequences written \((\d+) more were there\)", said, re.MULTILINE
    ).groups()
    return int(written), int(found)


@pytest.mark.slow
def test_a_filled_cache_trains_as_the_live_teacher(tmp_path):
    live = pretrain_jobs.curve(tmp_path, Run(), STEPS)
    served, inside = tmp_path / "served", tmp_path / "inside"
    steps = f"--train-iters {STEPS} --eval-interval {STEPS}"
    load = f"--load {tmp_path / 'teacher'}"
    student, teacher = f"{pretrain_jobs.STUDENT} {steps}", f"{pretrain_jobs.TEACHER} {load}"
    fill = f"{student} --tensor-model-parallel-size 2 --vcrd-fill-cache {served}"
    said = pretrain_jobs.train(tmp_path, fill, f"{teacher} --global-batch-size 1", processes=4)
    assert (
        sum(figures(f"{served}: ", said)) == SEQUENCES
    )  # Megatron's mock data has the same sequence more than once
    # With the data of the student, and the architecture of the teacher.
    inside_args = f"{teacher} {pretrain_jobs.TRAINING} {steps} --seed 1234 --vcrd-fill-cache {inside}"
    said = pretrain_jobs.train(tmp_path, inside_args, "", 1, 0, script="examples/serve_teacher.py")
    written, found = figures(f"{inside}: data-parallel rank 0: ", said)
    assert written + found == SEQUENCES
    by_link, by_model = contents(served), contents(inside)
    assert by_link.keys() == by_model.keys() and len(by_link) == written > SEQUENCES / 2
    assert all(torch.equal(by_link[key], by_model[key]) for key in by_link)
    weights = f"--load {tmp_path / 'student'} --finetune --no-load-optim --no-load-rng"
    from_cache = f"{student} {weights} --vcrd-address none --vcrd-teacher cache:{served}"
    said = pretrain_jobs.train(tmp_path, f"{from_cache} --tensor-model-parallel-size 2", "", 2, 0)
    assert pretrain_jobs.losses(said, STEPS) == pytest.approx(live, rel=1e-6)
