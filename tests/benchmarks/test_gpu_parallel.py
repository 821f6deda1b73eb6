"""Sequence and context parallelism compared with one rank, on the CPU; an error in a layout is found."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from worlds import World, run_worlds

from benchmarks.gpu import parallel, ranks
from benchmarks.gpu.parallel import ALONE, CASES, RANKS, STEPS
from benchmarks.gpu.results import ROOT


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A trial after all jobs have run, as in the script."""
    trial = parallel.trial("cpu", tmp_path_factory.mktemp("trial"))
    run_worlds(*(World(work, size, arguments=(trial,)) for work, size in parallel.JOBS.values()))
    return trial


def test_every_layout_has_the_losses_and_gradients_of_one_rank(trial):
    result = parallel.compared(trial)
    assert result["passed"] is True, result
    assert list(result["cases"]) == [case.name for case in CASES]
    assert len({*result["one rank"]["loss"]}) == STEPS and min(result["one rank"]["norm"]) > 0.1
    assert any(case.tensor > 1 and case.linked for case in CASES)
    assert any(case.context > 1 and case.linked for case in CASES)


@pytest.mark.parametrize("key", ["loss", "figure", "norm", "gradients"])
@pytest.mark.parametrize("value", [1.001, math.nan])
def test_a_difference_on_one_rank_in_one_step_fails_the_case(trial, key, value):
    path = trial.folder / f"{CASES[1].name}.{RANKS - 1}.found"
    before = path.read_bytes()
    found = torch.load(path)
    step = found["steps"][-1]
    if key == "gradients":
        step[key]["decoder.final_layernorm.weight"] *= value
    else:
        step[key] *= value
    torch.save(found, path)
    try:
        result = parallel.compared(trial)
    finally:
        path.write_bytes(before)
    assert result["passed"] is False
    assert [name for name, case in result["cases"].items() if not case["passed"]] == [CASES[1].name]


def unmarked_norms(trial) -> None:
    """Removes the mark, so that Megatron does not sum the gradient of a norm over the tensor ranks."""
    import cpu_layers

    class Norm(cpu_layers.Norm):
        def __init__(self, *args, **rest):
            super().__init__(*args, **rest)
            self.weight.sequence_parallel = False

    cpu_layers.Norm = Norm
    parallel.train(CASES[2], trial)


def test_a_gradient_that_no_rank_sums_is_found(trial):
    paths = [trial.folder / f"{CASES[2].name}.{rank}.found" for rank in range(RANKS)]
    before = [path.read_bytes() for path in paths]
    try:
        run_worlds(World(unmarked_norms, RANKS, arguments=(trial,)))
        found = parallel.differences(CASES[2], trial)
    finally:
        for path, content in zip(paths, before, strict=True):
            path.write_bytes(content)
    assert found["passed"] is False and found["gradient"] > 0.3
    assert "norm" in found["of the gradient of"]
    # The error is larger than rounding: the limit for bfloat16 finds it too.
    assert found["gradient"] > parallel.LIMITS[torch.bfloat16][1]


def test_a_case_that_did_not_end_is_reported(tmp_path, trial):
    empty = parallel.trial("cpu", tmp_path)
    assert parallel.compared(empty) == {"passed": False, "error": "one rank did not end"}
    (tmp_path / f"{ALONE.name}.0.found").write_bytes((trial.folder / f"{ALONE.name}.0.found").read_bytes())
    found = parallel.compared(empty)
    assert found["passed"] is False
    assert all(case == {"passed": False, "error": "did not end"} for case in found["cases"].values())


def test_the_first_process_that_fails_ends_the_others():
    waits = ["-c", "import signal; signal.pause()"]
    how = ranks.run_together({"first": waits, "second": ["-c", "raise SystemExit(3)"]}, 60)
    assert how == "second ended with exit status 3"
    assert ranks.run_together({"first": waits}, 0.1) == "first did not end within 0.1 seconds"
    assert ranks.run_together({"first": ["-c", "pass"]}, 60) is None


def test_each_process_is_a_separate_host_for_nccl(tmp_path):
    names = ("student0", "student1")
    write = "import os, sys; open(sys.argv[1], 'w').write(os.environ['NCCL_HOSTID'] + os.environ['NCCL_RAS_ENABLE'])"
    paths = [tmp_path / name for name in names]
    commands = {name: ["-c", write, str(path)] for name, path in zip(names, paths, strict=True)}
    assert ranks.run_together(commands, 60) is None
    assert [path.read_text() for path in paths] == ["host-student00", "host-student10"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["parallel"], ["nccl", "ranks"]], ids=lambda command: command[0])
def test_the_script_runs_on_the_cpu(command, tmp_path):
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"benchmarks.gpu.{command[0]}",
            *command[1:],
            "--device",
            "cpu",
            "--json",
            str(path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(path.read_text()).get("passed", True) is True
