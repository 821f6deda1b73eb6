"""The pretraining script on megatron.training: the layout of neither job changes the loss curve."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pretrain_jobs
import pytest
from pretrain_jobs import Run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)

STEPS = 4
LAYOUTS = {
    "tensor x pipeline": Run(
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        2,
        "--pipeline-model-parallel-size 2",
    ),
    "interleaved, with the teacher in its ranks": Run(
        2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 0
    ),
    "data, distributed optimizer": Run(2, "--use-distributed-optimizer", 2, "--tensor-model-parallel-size 2"),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A folder with the initial weights, and the curve of one student process and one teacher process."""
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, pretrain_jobs.curve(folder, Run(), STEPS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "tensor x pipeline" else pytest.mark.slow) for name in LAYOUTS],
)
def test_a_layout_changes_no_loss(one_process, name):
    folder, expected = one_process
    assert expected[0] > 0.1 and expected[-1] != expected[0], "a curve that could show a difference"
    assert pretrain_jobs.curve(folder, LAYOUTS[name], STEPS) == pytest.approx(expected, rel=1e-5)


def test_both_scripts_state_the_tokenizer_of_their_arguments(one_process):
    folder, _ = one_process
    student = f"{pretrain_jobs.STUDENT} --train-iters 2 --eval-interval 2"
    teacher = f"{pretrain_jobs.TEACHER} --global-batch-size 1 --load {folder / 'teacher'}"
    said = pretrain_jobs.train(folder, student, f"{teacher} --vocab-size 126")
    assert (
        said.count(
            "tokenizer is NullTokenizer of 127 tokens (no vocabulary) for the student and NullTokenizer of 126 tokens "
            "(no vocabulary) for the teacher: these cannot be compared"
        )
        == 1
    )
    assert "tokenizer: not known" not in said


def test_help_shows_the_arguments_of_both():
    command = [sys.executable, "examples/pretrain_vcrd.py", "--help"]
    done = subprocess.run(command, cwd=pretrain_jobs.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--vcrd-sharpness" in done.stdout and "--tensor-model-parallel-size" in done.stdout
    assert "--vcrd-secret " not in done.stdout
