"""The FP8 check without FP8: its messages, its report, and its run with bfloat16 on the CPU."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worlds import World, run_worlds

from benchmarks.gpu import fp8, process, stages
from benchmarks.gpu.results import ROOT
from vcrd.megatron.compatibility import refuse_delayed_scaling


def found(monkeypatch, *missing: str) -> None:
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in missing else importlib.machinery.ModuleSpec(name, None),
    )


def test_it_says_why_it_does_not_run(monkeypatch):
    found(monkeypatch, "transformer_engine")
    assert fp8.reason_to_skip() == "Transformer Engine is not installed"
    assert fp8.run() == {"passed": None, "how": "Transformer Engine is not installed"}
    found(monkeypatch, "megatron")
    assert fp8.reason_to_skip() == "megatron-core is not installed"
    found(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fp8.reason_to_skip().endswith("finds no usable GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert fp8.reason_to_skip() == "FP8 needs compute capability 8.9, this GPU has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert fp8.reason_to_skip() is None


def test_it_reports_the_difference_and_fails_on_values_that_are_not_finite():
    bf16 = {"losses": [3.0, 2.0], "gradient_norm": 1.0}
    result = fp8.summary(bf16, {"tensorwise": {"losses": [3.0, 2.1], "gradient_norm": 1.5}})
    assert result["passed"] is True
    assert result["fp8"]["tensorwise"]["relative_difference"] == pytest.approx(0.05)
    assert fp8.lines(result).splitlines() == [
        "bf16: loss 2.00000 nat per token, gradient norm 1",
        "fp8 tensorwise: loss 2.10000 nat per token, gradient norm 1.5, +0.10000 nat, +5.00 %",
    ]
    for broken in (
        {"losses": [math.nan, 2.1], "gradient_norm": 1.0},
        {"losses": [2.0], "gradient_norm": math.inf},
        "RuntimeError: no such recipe",
    ):
        result = fp8.summary(bf16, {"tensorwise": broken})
        assert result["passed"] is False
        assert fp8.lines(result).endswith(
            "a recipe did not run, gave a number that is not finite, or did not learn"
        )
    assert "fp8 tensorwise: RuntimeError: no such recipe" in fp8.lines(result)


def test_a_recipe_that_fails_is_one_line_of_the_report():
    def fails(recipe):
        raise RuntimeError("not on this GPU\nand more")

    assert fp8.tried(fails, "blockwise") == "RuntimeError: not on this GPU"


def test_a_teacher_may_have_every_recipe_of_a_teacher():
    for recipe in fp8.RECIPES:
        refuse_delayed_scaling(SimpleNamespace(fp8="hybrid", fp8_recipe=fp8.of_teacher(recipe)))


def test_a_reason_makes_the_stage_unavailable(monkeypatch):
    def run(command, seconds, show=False, **environment):
        path = Path(command[command.index("--json") + 1])
        path.write_text(json.dumps({"passed": None, "how": "FP8 needs compute capability 8.9"}))
        return process.Outcome(0, 1.0, "")

    monkeypatch.setattr(stages, "run", run)
    for stage in stages.STAGES:
        if stage.name.startswith("fp8"):
            found = stage.work(60)
            assert (found.passed, found.how) == (None, "FP8 needs compute capability 8.9")


def test_training_must_lower_the_loss(monkeypatch):
    learns = {"losses": [3.0] * 4 + [2.0] * 26, "gradient_norm": 1.0}
    stays = {"losses": [3.0] * 30, "gradient_norm": 1.0}
    monkeypatch.setattr(fp8, "reason_to_skip", lambda: None)
    monkeypatch.setattr(fp8, "one_rank", contextlib.nullcontext)
    monkeypatch.setattr(fp8, "train", lambda recipe: learns)
    result = fp8.run(training=True)
    assert result["passed"] is True
    assert all(run["loss_difference"] == 0 for run in result["fp8"].values())
    monkeypatch.setattr(fp8, "train", lambda recipe: stays if recipe == "blockwise" else learns)
    assert fp8.run(training=True)["passed"] is False
    monkeypatch.setattr(fp8, "measure", lambda recipe: stays)
    assert fp8.run()["passed"] is True, "a micro-batch teaches nothing"


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)
def test_the_script_exits_with_0_without_transformer_engine():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.fp8"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "Transformer Engine is not installed\n"), done.stderr


def test_its_models_and_steps_run_on_the_cpu_with_local_layers():
    (result,), (trained,) = run_worlds(
        World(fp8.measure, arguments=(None, False)), World(fp8.train, arguments=(None, False, 8))
    )
    assert len(result["losses"]) == fp8.STEPS
    assert all(loss > 0.1 and math.isfinite(loss) for loss in result["losses"])
    assert max(result["losses"]) == pytest.approx(min(result["losses"]), rel=1e-4), "no weight changes"
    assert 0 < result["gradient_norm"] < math.inf
    assert len(trained["losses"]) == 8 and fp8.lowered(trained)
    assert trained["losses"][0] == pytest.approx(result["losses"][0], rel=1e-4), "the same models and tokens"
