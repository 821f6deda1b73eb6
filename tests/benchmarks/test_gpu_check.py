"""`make gpu-check` where there is no GPU: what it says, what it writes, and that nothing outlives its limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_check

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STEPS = ("build", "tests", "benchmark", "fp8", "sanitizer")


def without_a_gpu() -> dict:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_says_in_one_sentence_that_there_is_no_gpu(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=without_a_gpu(), timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpu-check: torch ")
    assert not path.exists()


def test_the_benchmark_says_that_there_is_no_gpu():
    command = [sys.executable, str(BENCHMARKS / "loss.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_a_gpu(), timeout=120)
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr


def run_main(monkeypatch, path: Path, **steps) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run", lambda *_: gpu_check.Outcome(0, 0.0, '{"device": "a GPU"}'))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--json", str(path)])
    for name in STEPS:
        monkeypatch.setattr(
            gpu_check, name, steps.get(name, lambda _: ({"passed": True, "seconds": 1}, "fine"))
        )
    return gpu_check.main()


def test_writes_one_record_of_all_steps(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    absent = {"passed": None, "how": "it is not on the PATH"}
    assert run_main(monkeypatch, path, sanitizer=lambda _: (absent, "")) == 0
    written = json.loads(path.read_text())
    assert written["passed"] and written["machine"] == {"device": "a GPU"}
    assert [written[name]["passed"] for name in STEPS] == [True, True, True, True, None]


def test_goes_on_after_failed_tests_and_fails_in_the_end(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    assert run_main(monkeypatch, path, tests=lambda _: ({"passed": False}, "one failed")) == 1
    written = json.loads(path.read_text())
    assert not written["passed"] and written["benchmark"]["passed"]


def test_stops_where_nothing_was_built(monkeypatch, tmp_path):
    path = tmp_path / "out.json"
    assert run_main(monkeypatch, path, build=lambda _: ({"passed": False}, "no compiler")) == 1
    assert set(json.loads(path.read_text())) == {"machine", "build", "seconds", "passed"}


def test_steps_share_the_time(monkeypatch, tmp_path):
    given = {}

    def step(name: str):
        def work(seconds: float):
            given[name] = seconds
            return {"passed": True}, ""

        return work

    run_main(monkeypatch, tmp_path / "out.json", **{name: step(name) for name in STEPS})
    assert gpu_check.SECONDS <= 480
    assert (
        given["build"] == pytest.approx(gpu_check.SECONDS - gpu_check.AFTER_BUILD, abs=2)
        and given["sanitizer"] <= gpu_check.SECONDS
    )


def test_ends_what_runs_too_long_with_its_children():
    outcome = gpu_check.run(["bash", "-c", "sleep 300 & echo $!; wait"], 1)
    assert outcome.returncode is None
    assert outcome.summary()["how"] == "cut off by the time limit"
    # The kernel ends what was killed when it next gives it a turn.
    until = time.monotonic() + 60
    while runs(int(outcome.output)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs(int(outcome.output))


def runs(process: int) -> bool:
    """False too for what has ended and waits to be collected by whoever inherited it."""
    try:
        stat = (Path("/proc") / str(process) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def test_counts_tests():
    alone = """
tests/loss/a.py::test_good[cuda-bfloat16] PASSED                 [ 33%]
tests/loss/a.py::test_bad[cuda] FAILED                           [ 66%]
tests/loss/b.py::test_worse ERROR                                [ 70%]
tests/loss/b.py::test_left_out[a b] SKIPPED (no GPU)             [ 80%]
tests/loss/b.py::test_cut_off
"""
    expected = {
        "passed_tests": 1,
        "passed_on_cuda": 1,
        "skipped": 1,
        "failed": ["tests/loss/a.py::test_bad[cuda]", "tests/loss/b.py::test_worse"],
    }
    assert gpu_check.count_tests(alone) == expected
    workers = """
tests/loss/a.py::test_good[cuda-bfloat16]
[gw0] [ 33%] PASSED tests/loss/a.py::test_good[cuda-bfloat16]
[gw1] [ 66%] FAILED tests/loss/a.py::test_bad[cuda]
[gw1] [ 70%] ERROR tests/loss/b.py::test_worse
[gw0] [100%] SKIPPED tests/loss/b.py::test_left_out[a b]
FAILED tests/loss/a.py::test_bad[cuda] - AssertionError
"""
    assert gpu_check.count_tests(workers) == expected


def test_what_failed_is_named_also_where_the_run_is_cut_off(monkeypatch):
    def run(command, seconds, show=False, **environment):
        if "pytest" not in command:
            return gpu_check.Outcome(0, 0.0, "")
        text = (
            "tests/loss/a.py::test_bad[cuda] FAILED [ 1%]\n"
            + "tests/loss/a.py::test_good[cuda] PASSED [ 2%]\n" * 40
        )
        return gpu_check.Outcome(None, seconds, text)

    monkeypatch.setattr(gpu_check, "run", run)
    result, text = gpu_check.tests(10)
    assert result["passed"] is False and result["how"] == "cut off by the time limit"
    assert result["failed"] == ["tests/loss/a.py::test_bad[cuda]"] and result["passed_on_cuda"] == 40
    assert text.startswith("failed: tests/loss/a.py::test_bad[cuda]\n")
