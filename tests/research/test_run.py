"""The comparison from its command line to its tables, with tiny models."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import run
import runs
import tables
from compared import named
from configs import CONFIGS
from methods import OWN, TRACES

SCRIPT = Path(run.__file__)
# The default methods and their prefixes.
USUAL = {method.name: method.regimes for method in named("usual")}
JUDGED = USUAL.keys() & set(runs.JUDGED)
OWN_TASK = """
import random
from problems import END, Line, Problem

def copying(draw, longer):
    text = "".join(draw.choice("abc") for _ in range(6 if longer else 3))
    return Problem(f"{text}?", Line((f"{text}{END}",)))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, str]:
    """A folder of results of two tasks, one of them from an outside module, and the output."""
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "outside.py").write_text(OWN_TASK)
    command = [sys.executable, str(SCRIPT), "--config", "tiny", "--out", str(folder), "--jobs", "2"]
    command += ["--tasks", "arithmetic,outside:copying"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_every_method_trains_a_student_of_each_seed_on_each_task(results):
    folder, said = results
    content = json.loads((folder / "tiny.json").read_text())
    seen: dict[tuple, int] = {}
    for each in content["runs"]:
        for method, solved in each["solved"].items():
            # Eight problems of the usual length, two longer ones: two digits each.
            assert {length: len(bits) for length, bits in solved.items()} == {"usual": 2, "longer": 2}
            key = (each["task"], each["regime"], each["wrong"], method)
            seen[key] = seen.get(key, 0) + 1
    assert set(seen.values()) == {2}  # seeds
    for task in ("arithmetic", "outside:copying"):
        for regime in (TRACES, OWN):
            names = {name for name, regimes in USUAL.items() if regime in regimes}
            assert {key[3] for key in seen if key[:3] == (task, regime, 0.0)} == names
        for wrong in runs.WRONG:
            assert {key[3] for key in seen if key[:3] == (task, OWN, wrong)} == JUDGED
    assert {each["rate"] for each in content["runs"]} <= {1e-3, 3e-3}
    assert "runs in" in said


@pytest.mark.slow
def test_the_same_command_gives_the_same_results(results, tmp_path):
    """For some methods, which then have the stack for themselves."""
    folder, _ = results
    arguments = ["--config", "tiny", "--out", str(tmp_path), "--jobs", "1", "--tasks", "arithmetic"]
    run.main([*arguments, "--methods", "forward KL;label, shuffled"])
    whole, part = (json.loads((place / "tiny.json").read_text()) for place in (folder, tmp_path))

    def of(content: dict, regime: str) -> dict:
        return {
            (each["seed"], method): (each["rate"], solved)
            for each in content["runs"]
            for method, solved in each["solved"].items()
            if (each["task"], each["regime"], each["wrong"]) == ("arithmetic", regime, 0.0)
        }

    few = of(part, TRACES)
    assert set(few) == {(seed, name) for seed in range(2) for name in ("forward KL", "label, shuffled")}
    assert few == {key: value for key, value in of(whole, TRACES).items() if key in few}


@pytest.mark.slow
def test_the_same_command_continues_after_an_interruption(results, tmp_path):
    folder, _ = results
    whole = json.loads((folder / "tiny.json").read_text())
    shutil.copytree(folder, tmp_path / "again")
    lost = sorted((tmp_path / "again" / "runs").glob("*.json"))[::2]
    for each in [*lost, tmp_path / "again" / "tiny.json"]:
        each.unlink()
    kept = [path for place in ("models", "runs") for path in (tmp_path / "again" / place).rglob("*.*")]
    kept = {path: path.stat().st_mtime_ns for path in kept}
    run.main(["--config", "tiny", "--out", str(tmp_path / "again"), "--jobs", "1", "--tasks", "arithmetic"])
    content = json.loads((tmp_path / "again" / "tiny.json").read_text())

    def without_times(runs: list[dict]) -> list[dict]:
        return [{**each, "seconds": 0} for each in runs if each["task"] == "arithmetic"]

    assert without_times(content["runs"]) == without_times(whole["runs"])
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_workers_end_when_the_command_is_killed(tmp_path):
    command = [sys.executable, str(SCRIPT), "--config", "tiny", "--steps", "100000", "--out", str(tmp_path)]
    running = subprocess.Popen([*command, "--tasks", "arithmetic"], stdout=subprocess.PIPE, text=True)
    try:
        assert "arithmetic: " in running.stdout.readline()
        workers = psutil.Process(running.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        running.kill()
    running.wait(60)
    _, alive = psutil.wait_procs(workers, 60)
    assert not alive


def test_the_tables_have_the_numbers_of_the_results(results):
    folder, said = results
    command = [sys.executable, str(SCRIPT.with_name("tables.py")), str(folder / "tiny.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout in said
    for part in (
        "Prefixes of the teacher's solutions",
        "Prefixes of the student's own",
        "Verifiers that err",
    ):
        assert f"## {part}\n" in done.stdout
    assert re.search(r"^\| label, shuffled \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \|$", done.stdout, re.MULTILINE)
    assert "| arithmetic | outside:copying | mean |" in done.stdout
    for regime in (TRACES, OWN):
        drawn = (folder / "tiny" / f"methods-{regime}.svg").read_text()
        names = {name for name, regimes in USUAL.items() if regime in regimes} - {"forward KL"}
        assert all(f">{html.escape(name, quote=False)}<" in drawn for name in names)
    drawn = (folder / "tiny" / "verifiers.svg").read_text()
    assert all(f">{html.escape(name, quote=False)}<" in drawn for name in JUDGED)


def test_packed_results_are_unpacked():
    bits = "0110100110"
    record = runs.packed(
        {"solved": {"m": {length: bits for length in runs.LENGTHS}}, "regime": "own", "wrong": 0.0}
    )
    content = {"runs": [{**record, "task": "t", "seed": 0}], "problems": {"usual": 10, "longer": 10}}
    assert "".join(str(int(bit)) for bit in tables.Results(content).solved("own", "m")[0, 0]) == bits


def test_the_interval_of_a_difference_contains_it():
    rng = np.random.default_rng(1)
    base = (rng.random((3, 5, 400)) < 0.4).astype(float)
    better = np.maximum(base, rng.random((3, 5, 400)) < 0.1)
    mean, low, high = tables.difference(better, base)
    assert mean == pytest.approx((better - base).mean()) and low < mean < high
    assert low > 0.03 and high < 0.1
    assert tables.shown((mean, low, high)).startswith("**+")
    same = tables.difference(base, base)
    assert same == (0.0, 0.0, 0.0) and tables.shown(same) == "+0.0 (+0.0 to +0.0)"
    # Different seeds make it wider.
    unsure = base.copy()
    unsure[:, 0] = 1.0
    _, low, high = tables.difference(unsure, base)
    assert high - low > 0.1


def test_the_interval_covers_the_true_difference():
    """About ninety-five of a hundred intervals contain a known difference."""
    rng = np.random.default_rng(2)
    held = 0
    for number in range(100):
        skill = 0.5 + 0.1 * rng.standard_normal((2, 8, 1))  # of each seed's student
        a = rng.random((2, 8, 60)) < skill + 0.05
        b = rng.random((2, 8, 60)) < skill
        _, low, high = tables.difference(a.astype(float), b.astype(float), seed=number)
        held += low <= 0.05 <= high
    assert 86 <= held <= 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "juggling"], "--tasks: expected names of"),
        (["--tasks", "nowhere:sorting"], "got 'nowhere:sorting'"),
        (["--methods", "magic"], "--methods: expected names among"),
        (["--wrong", "0.1,2"], "--wrong: expected numbers between 0 and 1, separated by ',', got '0.1,2'"),
        (["--first-seed", "997"], "--first-seed: expected seeds from 0 on without 999"),
        (["--wrong-symbols", "1"], "--wrong-symbols: expected numbers between 0 and 1, separated by ','"),
        (["--wrong", "few"], "--wrong: expected numbers between 0 and 1, separated by ',', got 'few'"),
        pytest.param(
            *(["--device", "cuda"], "--device: expected a GPU that torch can use for 'cuda', got none"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_wrong_name_is_an_error(arguments, says, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run.main([*arguments, "--out", str(tmp_path / "none")])
    assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_best_rate_solves_the_most_over_all_tasks_and_is_the_smallest_of_equal_ones():
    def record(task: str, rate: float, **solved: float) -> dict:
        return {"task": task, "regime": "own", "rate": rate, "solved": solved}

    tuned = [
        *(record("s", 3.0, a=0.5, b=0.2), record("s", 1.0, a=0.5, b=0.1), record("s", 2.0, a=0.4, b=0.3)),
        *(record("t", 3.0, a=0.5, b=0.5), record("t", 1.0, a=0.5, b=0.3), record("t", 2.0, a=0.5, b=0.3)),
    ]
    assert runs.best_rates(tuned) == {"own": {"a": 1.0, "b": 3.0}}


def test_the_requested_seeds_and_wrong_verdicts_are_used():
    tuned = [{"task": "t", "regime": "own", "rate": 1e-3, "solved": {"JSD": 0.5, "scores, gate": 0.5}}]
    found = runs.final_runs(tuned, CONFIGS["tiny"], 3, [(0.2, False), (0.1, True)])
    assert [(each.seed, each.wrong, each.systematic, each.methods) for each in found] == [
        (3, wrong, systematic, names)
        for wrong, systematic, names in (
            (0.0, False, ("JSD", "scores, gate")),
            (0.2, False, ("scores, gate",)),
            (0.1, True, ("scores, gate",)),
        )
    ]


@pytest.mark.slow
def test_a_command_with_further_methods_uses_the_stored_results(results, tmp_path):
    folder, _ = results
    shutil.copytree(folder, tmp_path / "again")
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "again" / "runs").iterdir()}
    arguments = ["--config", "tiny", "--out", str(tmp_path / "again"), "--jobs", "1", "--tasks", "arithmetic"]
    arguments += ["--prefixes", "own", "--wrong", "0.1", "--wrong-symbols", "0.2", "--name", "more"]
    run.main([*arguments, "--methods", "JSD; scores, gate; JSD x gap, kept"])
    made = set((tmp_path / "again" / "runs").iterdir()) - set(stored)
    # The new method: two rates, and for each seed three verifiers. The gate: one of the verifiers for each seed.
    assert len(made) == (2 + 2 * 3) + 2 * 1
    assert all(path.stat().st_mtime_ns == when for path, when in stored.items())
    whole, part = (json.loads((tmp_path / "again" / f"{name}.json").read_text()) for name in ("tiny", "more"))

    def of(content: dict) -> dict:
        return {
            (each["seed"], each["wrong"], method): solved
            for each in content["runs"]
            for method, solved in each["solved"].items()
            if (each["task"], each["regime"], each["systematic"]) == ("arithmetic", OWN, False)
            and method in ("JSD", "scores, gate")
        }

    shared = of(part)
    assert len(shared) == 2 * 3 and shared == {
        key: value for key, value in of(whole).items() if key in shared
    }
    assert part["underspecified"]["arithmetic"]["symbols"] > 1
    text = tables.page(tables.Results(part))
    assert "| 0 % | 10 % | 20 %, always the same symbols |" in text


def test_gains_are_by_the_choice_that_a_family_leaves():
    """Two families of four problems; the method gains in the one with a choice, its control in the other."""
    solved = {
        ("free", "JSD"): "8",
        ("free", "JSD x accepted mass, kept"): "e",
        ("free", "JSD x accepted mass, kept, shuffled"): "8",
        ("fixed", "JSD"): "c",
        ("fixed", "JSD x accepted mass, kept"): "8",
        ("fixed", "JSD x accepted mass, kept, shuffled"): "f",
    }
    runs_ = [
        {
            **{"task": task, "seed": 0, "regime": OWN, "wrong": 0.0, "systematic": False},
            "solved": {
                name: {length: digit + "0" for length in tables.LENGTHS}
                for (of, name), digit in solved.items()
                if of == task
            },
        }
        for task in ("free", "fixed")
    ]
    measured = {"free": {"entropy": 0.5}, "fixed": {"entropy": 0.0}}
    for each in measured.values():
        each |= {"steps": 1 + each["entropy"], "symbols": 1 + each["entropy"]}
    results = tables.Results(
        {"runs": runs_, "problems": dict.fromkeys(tables.LENGTHS, 4), "underspecified": measured}
    )
    head, _, first, second = tables.families(results, OWN).splitlines()
    assert head == "| family | correct next steps | symbols | entropy, nats | JSD x accepted mass, kept |"
    assert first.startswith("| fixed | 1.00 | 1.00 | 0.00 | -25.0 (")
    assert second.startswith("| free | 1.50 | 1.50 | 0.50 | +50.0 (")
    rows = {line.split(" | ")[0]: line for line in tables.by_choice(results, OWN).splitlines()}
    assert rows["| method"] == "| method | with a choice, against JSD | without, against JSD |"
    assert rows["| JSD"] == "| JSD |  |  |"
    with_choice, without = (cell[:5] for cell in rows["| JSD x accepted mass, kept"].split(" | ")[1:])
    assert (with_choice, without) == ("+50.0", "-25.0")
    (row,) = tables.against_controls({"gain": results}).splitlines()[2:]
    assert re.fullmatch(r"\| JSD x accepted mass, kept, shuffled \| -12.5 \(.*\) \|", row)
