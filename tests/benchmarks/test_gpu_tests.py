"""`make gpu-check` reports the name and outcome of each test, also if the run was cut off or crashed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import process
from benchmarks.gpu.tests import run_tests, summary

TESTS = """
import os, pathlib, threading
import pytest

HERE = pathlib.Path(__file__).parent

def test_good_cuda(): pass
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_bad(device): assert device == "nothing", "what is wrong"
def test_left_out_cuda(): pytest.skip("no kernels")
"""
TIMES_OUT = """
@pytest.mark.timeout(0.05)
def test_slow_cuda(): threading.Event().wait()
"""
HANGS = """
def test_hangs_cuda():
    log = pathlib.Path(os.environ["VCRD_TEST_LOG"])
    while log.read_text().count('"event": "end"') < {others}: pass
    (HERE / "hangs").touch()
    threading.Event().wait()
"""
DIES = """
def test_dies_cuda(): os._exit(3)
"""
WORKERS = [
    1,
    pytest.param(2, marks=pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="no xdist")),
]


def path_of(folder: Path, *parts: str) -> str:
    path = folder / "test_some.py"
    path.write_text("".join(parts))
    return str(path)


def names(tests) -> list[str]:
    return [name.rpartition("::")[2] for name in tests]


@pytest.mark.parametrize("workers", WORKERS)
def test_failed_and_timed_out_tests_are_named_separately(tmp_path, workers):
    found = run_tests([path_of(tmp_path, TESTS, TIMES_OUT)], 300, workers)
    assert found.passed is False
    assert names(found.figures["failed"]) == ["test_bad[cuda]"], "the one on the CPU does not run"
    assert names(found.figures["timed_out"]) == ["test_slow_cuda"]
    assert names(found.figures["passed"]) == ["test_good_cuda"]
    assert names(found.figures["skipped"]) == ["test_left_out_cuda"]
    assert found.figures["running_at_the_end"] == []
    assert any("what is wrong" in why for why in found.figures["why"].values())
    assert (
        "1 failed: " in found.how and "1 timed out: " in found.how and found.how.startswith("exit status 1")
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_a_run_that_is_cut_off_names_the_running_test(tmp_path, monkeypatch, workers):
    # The clock reaches the limit when only the last test still runs, so that a slow machine does not matter.
    hangs = tmp_path / "hangs"
    clock = SimpleNamespace(monotonic=lambda: 1000.0 if hangs.exists() else 0.0)
    monkeypatch.setattr(process, "time", clock)
    found = run_tests([path_of(tmp_path, TESTS, HANGS.format(others=3))], 90, workers)
    assert found.passed is False and found.how.startswith("cut off after 1000 s; 1 passed; 1 failed: ")
    assert names(found.figures["running_at_the_end"]) == ["test_hangs_cuda"]
    assert names(found.figures["failed"]) == ["test_bad[cuda]"]
    assert names(found.figures["passed"]) == ["test_good_cuda"]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_names_are_kept_if_the_process_dies(tmp_path, workers):
    found = run_tests([path_of(tmp_path, TESTS, DIES)], 300, workers)
    assert found.passed is False
    died = found.figures["failed" if workers > 1 else "running_at_the_end"]
    assert "test_dies_cuda" in names(died)


def test_a_run_without_tests_does_not_pass(tmp_path):
    good = "def test_good_cuda(): pass\n"
    assert run_tests([path_of(tmp_path, good)], 300, 1).passed is True
    none = run_tests([path_of(tmp_path, "def test_of_the_cpu(): pass\n")], 300, 1)
    assert none.passed is False and none.how.startswith("exit status 5; 0 passed")
    assert "deselected" in none.figures["output"]


def test_an_incomplete_line_is_ignored():
    lines = ['{"event": "start", "test": "a"}', '{"event": "call", "test": "a", "outc']
    assert summary(lines)["running_at_the_end"] == ["a"]
