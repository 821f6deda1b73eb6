"""The self-distillation example: a quick run, with the solution in the teacher's context and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.on_policy.problems import LENGTH, draw, is_right, micro_batches, solution
from examples.verified.arithmetic import encode

ROOT = Path(__file__).resolve().parents[2]


def test_a_hint_stands_before_the_prompt_and_only_the_response_counts():
    problems = draw(4, torch.Generator().manual_seed(1))
    texts = [solution(problem) for problem in problems]
    assert all(map(is_right, problems, texts))
    (batch,) = micro_batches(problems, texts, 4, hints=texts[::-1])
    assert {value.shape for value in batch.values()} == {(4, 2 * LENGTH)}
    for row, (problem, text, hint) in enumerate(zip(problems, texts, texts[::-1], strict=True)):
        whole = encode(hint + problem.prompt + text)
        assert batch["tokens"][row, : len(whole)].tolist() == whole
        counted = batch["loss_mask"][row] != 0
        assert batch["labels"][row][counted].tolist() == encode(text)
    (plain,) = micro_batches(problems, texts, 4)
    assert plain["tokens"].shape == (4, LENGTH)


@pytest.mark.slow
def test_the_command_trains_from_a_copy_that_sees_the_solution(tmp_path):
    for arguments in ("--tensor 2", "--tensor 2 --blind"):
        command = (
            "torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 "
            f"-m examples.self_distillation {arguments} --quick --out {tmp_path}"
        )
        ended = subprocess.run(
            [sys.executable, "-m", *command.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    seeing, blind = (json.loads((tmp_path / f"results{end}.json").read_text()) for end in ("", "-blind"))
    for results in (seeing, blind):
        assert len(results["alone"]) == len(results["with a solution"]) == 3
    # The copy is renewed before each round, so without a solution it is the student itself in the first update.
    assert 0 <= blind["divergence"][0] < 0.5 * seeing["divergence"][0]
    assert "round 2: alone" in ended.stdout
