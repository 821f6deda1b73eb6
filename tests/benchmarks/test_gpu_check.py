"""The queue of `make gpu-check` without a GPU: the due stages, their order, their time limits, their results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import wait_until

from benchmarks.gpu import check, results
from benchmarks.gpu.process import Outcome
from benchmarks.gpu.results import Finding
from benchmarks.gpu.stages import STAGES, Stage

SOURCES = ("LICENSE",)
MACHINE = {
    "torch": "2",
    "gpu": True,
    "facts": {
        "device": "a GPU",
        "driver_version": "1.2",
        "cores": 4,
        "packages": [],
        "date": "",
        "python": "",
    },
    "versions": {"torch": "2"},
    "kernels": None,
}
PASSES = Finding(True, "exit status 0", {"milliseconds": 1.5})
FAILS = Finding(False, "exit status 1")


class Bench:
    """A queue of stages that take no time and advance a clock."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.now, self.ran, self.limits = folder, 0.0, [], {}
        self.machine = dict(MACHINE)
        monkeypatch.setattr(check, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(check, "usable_machine", lambda: self.machine)
        monkeypatch.setattr(check, "probe", lambda *_: self.machine)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(results, "commit", lambda: {"commit": "abc", "dirty": False})

    def stage(self, name: str, finding: Finding = PASSES, takes: float = 10, **settings) -> Stage:
        def work(seconds: float) -> Finding:
            self.ran.append(name)
            self.limits[name] = seconds
            self.now += takes
            return finding

        return Stage(name, f"{name} works.", work, SOURCES, **{"expected": 5, **settings})

    def run(self, *stages: Stage, arguments: tuple[str, ...] = (), seconds: float = 1000) -> int:
        self.ran.clear()
        started, self.now = self.now, self.now
        build = [] if any(stage.name == "build" for stage in stages) else [self.stage("build")]
        given = ["--results", str(self.folder), "--seconds", str(seconds), *arguments]
        status = check.main(given, [*build, *stages])
        assert self.now >= started
        return status

    def result(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    def state(self, stage: Stage) -> str:
        return check.Entry.of(stage, self.folder).state


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    return Bench(tmp_path / "gpu", monkeypatch)


def without_a_gpu() -> dict:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_one_line_says_that_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--results", str(tmp_path / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, env=without_a_gpu(), timeout=200)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpu-check: torch ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "gpu").exists()


def test_it_says_why_its_interpreter_cannot_be_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "run", lambda *_: Outcome(1, 5.0, "Traceback\nImportError: no torch\n"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert check.main(["--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("cannot be used: ImportError: no torch\n")


def test_an_extension_that_cannot_be_loaded_is_built_again(monkeypatch):
    first = json.dumps({**MACHINE, "kernels": "vcrd._C crashes the process that loads it"})
    for output, kernels in (
        (f"a warning\n{first}\nSegmentation fault", "vcrd._C crashes the process that loads it"),
        (f"{first}\n{json.dumps(MACHINE)}\n", None),
    ):
        monkeypatch.setattr(check, "run", lambda *_, output=output: Outcome(-11, 5.0, output))
        assert check.usable_machine()["kernels"] == kernels


def test_the_list_needs_neither_a_gpu_nor_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["stage", "state", "date", "device", "proves"]
    assert [row.split()[0] for row in rows] == [stage.name for stage in STAGES]


def test_the_list_shows_the_state_of_each_stage(bench, capsys):
    stages = [bench.stage("fast"), bench.stage("wrong", FAILS), bench.stage("later")]
    bench.run(*stages[:2])
    capsys.readouterr()
    assert bench.run(*stages, arguments=("--list",)) == 0 and not bench.ran
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [
        ["build", "passed"],
        ["fast", "passed"],
        ["wrong", "failed"],
        ["later", "missing"],
    ]
    assert rows[2][3:5] == ["a", "GPU"] and rows[4][2:4] == ["-", "-"]


def test_a_result_has_the_machine_the_versions_and_the_date(bench):
    assert bench.run(bench.stage("fast")) == 0
    found = bench.result("fast")
    assert found.pop("date").endswith("+00:00")
    assert found == {
        "stage": "fast",
        "proves": "fast works.",
        "passed": True,
        "how": "exit status 0",
        "seconds": 10,
        "commit": "abc",
        "dirty": False,
        "sources": results.digest(SOURCES),
        "device": "a GPU",
        "driver": "1.2",
        "versions": {"torch": "2"},
        "machine": {"cores": 4},
        "figures": {"milliseconds": 1.5},
    }


def test_a_result_has_no_folder_of_the_machine(bench):
    where = f"{results.ROOT}/csrc/bind.cpp of {sys.prefix}/bin/python and {Path.home()}/x"
    bench.run(bench.stage("wrong", Finding(False, where, {"output": [where]})))
    found = bench.result("wrong")
    assert found["how"] == found["figures"]["output"][0]
    assert str(results.ROOT) not in found["how"] and f"{Path.home()}/" not in found["how"]
    assert found["how"].startswith("csrc/bind.cpp of ")


def test_a_passed_stage_runs_again_only_after_its_code_changes(bench, monkeypatch):
    stages = [bench.stage("fast"), bench.stage("wrong", FAILS)]
    assert bench.run(*stages) == 1 and bench.ran == ["fast", "wrong"]
    assert bench.run(*stages) == 1 and bench.ran == ["wrong"]
    monkeypatch.setattr(results, "digest", lambda sources: "another")
    assert [bench.state(stage) for stage in stages] == ["stale", "stale"]
    assert bench.run(*stages) == 1 and bench.ran == ["fast", "wrong"]


def test_one_changed_byte_or_a_new_file_makes_a_result_stale(tmp_path):
    (tmp_path / "csrc").mkdir()
    for name in ("csrc/a.h", "csrc/b.h", "setup.py"):
        (tmp_path / name).write_text(name)
    patterns = ("csrc/**/*", "setup.py", "!csrc/b.h")
    before = results.digest(patterns, tmp_path)
    assert [path.name for path in results.files(patterns, tmp_path)] == ["a.h", "setup.py"]
    (tmp_path / "csrc/b.h").write_text("left out")
    (tmp_path / "csrc/a.h").touch()
    assert results.digest(patterns, tmp_path) == before
    assert results.state({"sources": before, "passed": True}, before) == "passed"
    (tmp_path / "csrc/a.h").write_text("csrc/a.i")
    changed = results.digest(patterns, tmp_path)
    assert results.state({"sources": before, "passed": True}, changed) == "stale"
    (tmp_path / "csrc/c.h").touch()
    assert results.digest(patterns, tmp_path) != changed


def test_a_result_that_cannot_be_read_is_missing(tmp_path):
    (tmp_path / "fast.json").write_text('{"passed": tr')
    assert results.read(tmp_path, "fast") is None
    assert results.state(None, "any") == "missing"


def test_stages_that_failed_with_the_same_code_run_last(bench):
    wrong, absent = bench.stage("wrong", FAILS), bench.stage("absent", Finding(None, "no such tool"))
    assert bench.run(wrong, absent) == 1
    bench.run(absent, wrong, bench.stage("new"), bench.stage("other"))
    assert bench.ran == ["new", "other", "wrong", "absent"]


def test_a_stage_that_does_not_fit_is_left_out_and_a_shorter_one_runs(bench, capsys):
    stages = [
        bench.stage("first", takes=60),
        bench.stage("long", expected=50),
        bench.stage("short", takes=30),
    ]
    assert bench.run(*stages, seconds=100) == 0
    assert bench.ran == ["first", "short"]
    assert bench.limits == {"first": 90, "short": 100 - check.MARGIN - 60}
    assert not (bench.folder / "long.json").exists()
    printed = capsys.readouterr().out
    assert "takes about 50 s, 38 s were left" in printed
    assert "3 passed, 1 not run in 90 s" in printed


def test_the_time_of_the_last_pass_decides_whether_a_stage_fits(bench, monkeypatch):
    stage = bench.stage("slow", takes=70)
    bench.run(stage)
    monkeypatch.setattr(results, "digest", lambda sources: "another")
    assert bench.run(stage, seconds=60) == 0 and bench.ran == []
    assert bench.run(stage, seconds=75) == 0 and bench.ran == ["slow"]


def test_a_stage_that_took_its_whole_limit_still_fits(bench, monkeypatch):
    stage = bench.stage("slow", takes=90.4)
    bench.run(stage)
    monkeypatch.setattr(results, "digest", lambda sources: "another")
    assert bench.run(stage) == 0 and bench.ran == ["slow"]


def test_a_named_stage_runs_whatever_its_state(bench):
    stages = [bench.stage("fast"), bench.stage("other")]
    bench.run(*stages)
    assert bench.run(*stages, arguments=("--stage", "fast")) == 0
    assert bench.ran == ["fast"]
    with pytest.raises(SystemExit):
        bench.run(*stages, arguments=("--stage", "unknown"))


def test_an_unavailable_stage_is_no_failure_and_keeps_an_earlier_result(bench):
    stage = bench.stage("tool", tool="a-tool-that-nobody-has")
    assert bench.run(stage) == 0 and bench.ran == []
    assert bench.state(stage) == "unavailable"
    assert "a-tool-that-nobody-has" in bench.result("tool")["how"]
    module = bench.stage("module", modules=("vcrd_absent.core",))
    assert bench.run(module) == 0 and bench.ran == []
    assert bench.result("module")["how"] == "vcrd_absent.core is not installed"
    measured = bench.stage("profile")
    bench.run(measured)
    refused = bench.stage("profile", Finding(None, "no access"))
    assert bench.run(refused, arguments=("--stage", "profile")) == 0 and bench.ran == ["profile"]
    assert bench.result("profile")["figures"] == {"milliseconds": 1.5}


def test_an_exception_in_a_stage_fails_only_that_stage(bench):
    broken = Stage("broken", "Nothing.", lambda seconds: 1 / 0, SOURCES)
    assert bench.run(broken, bench.stage("fast")) == 1
    assert bench.ran == ["fast"] and bench.result("broken")["how"].startswith("ZeroDivisionError")


def test_an_existing_build_is_used(bench):
    build = bench.stage("build")
    assert bench.run(build, bench.stage("fast")) == 0
    assert bench.ran == ["fast"]
    assert bench.result("build")["figures"]["built"].startswith("before this run")
    assert bench.run(build, arguments=("--stage", "build")) == 0 and bench.ran == ["build"]


def test_a_build_that_cannot_be_used_is_built_again(bench, monkeypatch):
    monkeypatch.setattr(check, "probe", lambda *_: MACHINE)
    bench.machine["kernels"] = "csrc/merge.h changed since vcrd._C was built"
    assert bench.run(bench.stage("build", limit=300), bench.stage("fast")) == 0
    assert bench.ran == ["build", "fast"] and bench.limits["build"] == 300


def test_nothing_runs_without_a_build(bench, monkeypatch):
    bench.machine["kernels"] = "vcrd._C is not built for this interpreter"
    assert bench.run(bench.stage("build", FAILS), bench.stage("fast")) == 1
    assert bench.ran == ["build"]
    assert bench.run(bench.stage("build"), bench.stage("fast")) == 1, "it was built, and still cannot be used"
    assert bench.ran == ["build"] and bench.result("build")["how"].startswith("built, but vcrd._C is not")
    assert bench.run(bench.stage("build"), bench.stage("fast"), seconds=6) == 0
    assert bench.ran == [], "there is no time for it"


def test_a_result_is_written_atomically(tmp_path, monkeypatch):
    results.write(tmp_path, "fast", {"passed": True})
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.write(tmp_path, "fast", {"passed": False})
    assert [path.name for path in tmp_path.iterdir()] == ["fast.json"]
    assert results.read(tmp_path, "fast") == {"passed": True}


def test_the_commit_comes_from_git_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VCRD_COMMIT", "given")
    assert results.commit(tmp_path) == {"commit": "given", "dirty": None}
    monkeypatch.delenv("VCRD_COMMIT")
    assert results.commit(tmp_path) == {"commit": "unknown", "dirty": None}
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    results.write(tmp_path / "docs/performance/gpu", "fast", {})
    assert results.commit(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert results.commit(tmp_path) == {"commit": head, "dirty": True}


ENDS_ON_SIGTERM = """
import signal, sys
from benchmarks.gpu import process
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
process.run(["bash", "-c", "sleep 300 & echo $! > {path}.part; mv {path}.part {path}; wait"], 300)
"""


@pytest.mark.parametrize("ended_by", ["its limit", "a signal", "its own end"])
def test_no_process_of_a_stage_outlives_it(tmp_path, monkeypatch, ended_by):
    path = tmp_path / "process"
    if ended_by == "a signal":
        command = [sys.executable, "-c", ENDS_ON_SIGTERM.format(path=path)]
        queue = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(results.ROOT)})
        wait_until(path.exists, 60, "the stage began")
        queue.terminate()
        assert queue.wait(timeout=60) == 143
    else:
        from benchmarks.gpu import process

        # The clock reaches the limit when the stage has begun, so that a slow machine does not matter.
        clock = SimpleNamespace(monotonic=lambda: 1000.0 if path.exists() else 0.0)
        end = "exit 3" if ended_by == "its own end" else "wait"
        if end == "wait":
            monkeypatch.setattr(process, "time", clock)
        script = f"sleep 300 & echo $! > {path}.part; mv {path}.part {path}; echo begun; {end}"
        outcome = process.run(["bash", "-c", script], 500)
        assert outcome.returncode == (3 if end != "wait" else None)
        assert outcome.how == ("exit status 3" if end != "wait" else "cut off after 1000 s")
    wait_until(lambda: not runs(int(path.read_text())), 60, "its child ended")


def runs(process: int) -> bool:
    """Whether the process runs. A zombie does not."""
    try:
        stat = (Path("/proc") / str(process) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
