"""Students on a GPU. Collected only with a GPU."""

from __future__ import annotations

import json
import random

import pytest
import torch

from compared import named
from configs import CONFIGS
from data import draw
from lm import compare
from methods import OWN, TRACES
from runs import family_of
from train import correct, distil, student_of, teacher_of
from verifiers import Verifier

SIZES, RATE = CONFIGS["tiny"], 1e-3


@pytest.mark.parametrize("regime", [TRACES, OWN])
def test_students_on_the_gpu_equal_those_on_the_cpu(regime, tmp_path):
    """After a few steps of every method, with wrong verdicts."""
    family, found, solved = family_of("arithmetic"), {}, {}
    for device in ("cpu", "cuda"):
        # Written on the CPU, and read on the GPU.
        teacher = teacher_of(family, SIZES, tmp_path / "teacher.pt", print, device)
        student = student_of(family, SIZES, 0, tmp_path / "student.pt", print, device)
        chosen = [method for method in named("usual") if regime in method.regimes]
        students = distil(chosen, regime, family, teacher, student, SIZES, 0, RATE, Verifier(0.1))
        assert students.device.type == device
        found[device] = torch.cat([each.detach().cpu().flatten() for each in students.parameters()])
        solved[device] = correct(students, draw(family, random.Random(3), 4, held=True))
    # If a gradient is close to zero, rounding decides the step of AdamW. Nearly all gradients are larger.
    apart = (found["cuda"] - found["cpu"]).abs()
    assert apart.quantile(0.95) < RATE / 10, apart.quantile(torch.tensor([0.5, 0.9, 0.95, 0.99]))
    assert [len(row) for row in solved["cuda"]] == [len(row) for row in solved["cpu"]]


def test_the_comparison_with_a_language_model_runs_on_a_gpu(tmp_path):
    for device in ("cpu", "cuda"):
        command = ["--config", "tiny", "--device", device, "--out", str(tmp_path / device), "--most", "8"]
        assert compare.main(command) == 0
    found = [json.loads((tmp_path / device / "lm.json").read_text()) for device in ("cpu", "cuda")]
    assert [len(each["students"]) for each in found] == [8, 8]
    # The trainings differ by rounding. The random numbers are the same.
    on_cpu, on_gpu = ([each["tokens"] for each in content["students"]] for content in found)
    assert on_gpu == pytest.approx(on_cpu, rel=0.2)
