"""Runs tests for `make gpu-check` and reports how each ended, also if the run was cut off."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.process import Outcome, run
from benchmarks.gpu.results import Finding, without_paths

# For one test. Shorter than a stage, so that pytest names a test that hangs before the stage is cut off.
SECONDS_OF_A_TEST = 60


def summary(lines: Sequence[str]) -> dict:
    """From the lines of test_log: names of tests by outcome, and of those that had not ended."""
    tests: dict[str, dict] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the last line, if the process was killed while writing
            continue
        test = tests.setdefault(entry["test"], {"outcomes": [], "seconds": 0.0, "why": "", "ended": False})
        if entry["event"] == "end":
            test["ended"] = True
        elif entry["event"] != "start":
            test["outcomes"].append(entry["outcome"])
            test["seconds"] += entry["seconds"]
            test["why"] = test["why"] or entry["why"]
            # After a worker died, no process writes that its test has ended.
            test["ended"] |= entry["event"] not in ("setup", "call", "teardown")

    def ended(test: dict) -> str | None:
        for outcome in ("timed out", "failed", "skipped"):
            if outcome in test["outcomes"]:
                return outcome
        return "passed" if test["ended"] else None

    by_outcome: dict[str | None, list[str]] = {}
    for name in sorted(tests):
        by_outcome.setdefault(ended(tests[name]), []).append(name)
    failed, timed_out = by_outcome.get("failed", []), by_outcome.get("timed out", [])
    return {
        "failed": failed,
        "timed_out": timed_out,
        "running_at_the_end": by_outcome.get(None, []),
        "skipped": {name: without_paths(tests[name]["why"])[-200:] for name in by_outcome.get("skipped", [])},
        "why": {name: without_paths(tests[name]["why"]) for name in [*timed_out, *failed][:20]},
        "passed": {name: round(tests[name]["seconds"], 1) for name in by_outcome.get("passed", [])},
    }


def sentence(outcome: Outcome, found: dict) -> str:
    """How the run ended, with the names of tests that did not pass."""
    parts = [f"{len(found['passed'])} passed"]
    for key, what in (("failed", "failed"), ("timed_out", "timed out"), ("running_at_the_end", "not ended")):
        if found[key]:
            parts.append(f"{len(found[key])} {what}: {', '.join(found[key][:5])}")
    if found["skipped"]:
        parts.append(f"{len(found['skipped'])} skipped")
    return f"{outcome.how}; {'; '.join(parts)}"


def run_tests(paths: Sequence[str], seconds: float, workers: int, keyword: str | None = "cuda") -> Finding:
    """keyword: for pytest -k. Exactly the tests on CUDA tensors have "cuda" in their names."""
    command = ["-m", "pytest", *paths, "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.test_log"]
    command += ["-k", keyword] if keyword else []
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "tests"
        environment = {
            "VCRD_TEST_LOG": str(log),
            "PYTEST_TIMEOUT": str(SECONDS_OF_A_TEST),
            # Each worker would otherwise start as many threads as there are cores.
            "OMP_NUM_THREADS": "1",
        }
        outcome = run([sys.executable, *command], seconds, **environment)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = summary(lines)
    wrong = found["failed"] or found["timed_out"] or found["running_at_the_end"]
    passed = outcome.ended_well and bool(found["passed"]) and not wrong
    figures = {"command": f"python {' '.join(command)}", **found}
    if not (passed or found["failed"] or found["timed_out"]):
        figures["output"] = without_paths(outcome.tail())
    text = without_paths("\n".join([*found["why"].values(), "" if passed else outcome.tail(8)])).strip()
    return Finding(passed, sentence(outcome, found), figures, text)


def workers(most: int) -> int:
    """Processes that share the GPU; each test also needs a core for the reference in float64."""
    return max(1, min(most, (os.cpu_count() or 1) // 2))
