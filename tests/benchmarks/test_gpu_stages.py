"""The stages of `make gpu-check`: short, unique, complete, with existing files, and the same as on the page."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import device_table
import loss
from benchmarks.gpu import process, stages
from benchmarks.gpu.results import ROOT, files
from benchmarks.gpu.stages import LIMIT, STAGES, Script

NAMES = [stage.name for stage in STAGES]


def shards() -> list[str]:
    """The files of the stages that run tests on CUDA tensors. Tests over NCCL have another keyword."""
    tests = [stage.work for stage in STAGES if isinstance(stage.work, stages.Tests)]
    return [path for work in tests if work.keyword == "cuda" for path in work.paths]


def on_cuda(path: Path) -> bool:
    """Whether the file has tests on CUDA tensors: they use the fixture `device`, or the file is only about CUDA."""
    tree = ast.parse(path.read_text())
    taken = {
        argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args
    }
    marked = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return path.name.startswith("test_cuda") or "device" in taken or "on_device" in taken | marked


def test_names_are_unique_and_valid_file_names():
    assert NAMES[0] == "build" and len(set(NAMES)) == len(NAMES)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in NAMES)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_is_short_and_names_its_claim_and_its_files(stage):
    assert stage.proves.endswith(".") and "\n" not in stage.proves
    longer = {
        "build": stages.LIMIT_OF_THE_BUILD,
        "nccl-alive": stages.LIMIT_OF_THE_LOOK,
        "demo": stages.LIMIT_OF_THE_DEMO,
        "language-model": stages.LIMIT_OF_THE_MODEL,
    }
    assert stage.limit == longer.get(stage.name, LIMIT) and LIMIT <= 90
    assert 0 < stage.expected <= stage.limit
    for pattern in stage.sources:
        assert files([pattern.removeprefix("!")]), f"{pattern} matches no file"
    if isinstance(stage.work, Script):
        script = stage.work.command[0]
        if script == "-m":
            script = f"{stage.work.command[1].replace('.', '/')}.py"
        assert ROOT / script in files(stage.sources) or script.endswith("loss.py")
    if isinstance(stage.work, stages.Tests):
        assert {ROOT / path for path in stage.work.paths} <= set(files(stage.sources))
        # tests/conftest.py imports hypothesis for every test.
        assert set(stage.modules) - {"nccl"} == {"pytest", "hypothesis"}
        assert ("nccl" in stage.modules) == ("nccl" in stage.work.keyword)


def test_every_test_of_the_loss_on_cuda_tensors_belongs_to_one_stage():
    found = [*(ROOT / "tests/loss").glob("test_*.py"), *(ROOT / "tests/link").glob("test_cuda*.py")]
    wanted = sorted(path.relative_to(ROOT).as_posix() for path in found if on_cuda(path))
    assert sorted(shards()) == wanted
    assert "tests/loss/test_cuda.py" in wanted and "tests/loss/test_lanes.py" not in wanted


def test_a_stage_is_stale_by_its_own_tests_only():
    rows, topk = (
        next(stage for stage in STAGES if stage.name == f"kernels-{name}") for name in ("rows", "topk")
    )
    assert ROOT / "tests/loss/test_topk.py" not in files(rows.sources)
    assert ROOT / "tests/loss/test_topk.py" in files(topk.sources)
    for shared in (
        "tests/loss/cases.py",
        "tests/loss/conftest.py",
        "csrc/merge.h",
        "vcrd/loss/divergence.py",
    ):
        assert ROOT / shared in files(rows.sources), shared
    assert ROOT / "vcrd/monitor/telemetry.py" not in files(rows.sources)


def test_the_benchmarks_together_have_every_shape_once():
    commands = [stage.work.command for stage in STAGES if stage.name.startswith("benchmark")]
    options = [loss.parse(list(command[1:])) for command in commands]
    assert all(option.device == "cuda" and option.limit <= 60 for option in options)
    found = [device_table.parse_shape(shape) for option in options for shape in option.shapes]
    cases = device_table.default_cases(["bfloat16"], 1)
    assert sorted(found) == sorted((case.tokens, case.columns, case.vocab) for case in cases)


def test_the_page_has_the_same_stages():
    page = (ROOT / "docs/performance.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+?) \| (\d+) s \|", page, re.MULTILINE)
    assert [name for name, _, _ in rows] == NAMES
    for stage, (_, proves, limit) in zip(STAGES, rows, strict=True):
        assert (proves, int(limit)) == (stage.proves.removesuffix("."), stage.limit), stage.name


def script(tmp_path: Path, text: str) -> Script:
    path = tmp_path / "script.py"
    path.write_text(f"import json, sys\npath = sys.argv[sys.argv.index('--json') + 1]\n{text}")
    return Script((str(path),))


def test_the_file_of_a_script_is_its_result(tmp_path, capsys):
    good = script(tmp_path, "print('a line')\njson.dump({'machine': 1, 'ms': 2}, open(path, 'w'))")
    found = good(60)
    assert found.passed is True and found.figures.pop("command").startswith("python ")
    assert found.figures == {"ms": 2} and "a line" in capsys.readouterr().out
    absent = script(tmp_path, "json.dump({'passed': None, 'how': 'no counters'}, open(path, 'w'))")(60)
    assert (absent.passed, absent.how) == (None, "no counters")
    wrong = script(tmp_path, "json.dump({'passed': False, 'ms': 3}, open(path, 'w'))\nsys.exit(1)")(60)
    assert wrong.passed is False and wrong.how == "exit status 1" and wrong.figures["ms"] == 3
    silent = script(tmp_path, "print('nothing measured')")(60)
    assert silent.passed is False and silent.figures["output"] == "nothing measured"


def test_results_from_before_a_script_was_cut_off_are_kept(tmp_path, monkeypatch):
    written = {"cases": [1]}

    def run(command, seconds, show=False, **environment):
        Path(command[-1]).write_text(json.dumps(written))
        return process.Outcome(None, seconds, "the second case began")

    monkeypatch.setattr(stages, "run", run)
    found = Script(("benchmarks/loss.py",))(90)
    assert found.passed is False and found.how == "cut off after 90 s"
    assert found.figures["cases"] == [1] and found.figures["output"] == "the second case began"


def test_a_test_that_takes_minutes_fits_into_its_stage():
    """It has its own limit instead of the 60 seconds of every other test of a stage."""
    import test_long_after as look

    (stage,) = (stage for stage in STAGES if stage.name == "nccl-alive")
    (limit,) = (mark.args[0] for mark in look.pytestmark if mark.name == "timeout")
    assert 60 <= (look.STEPS - look.DIES_SENDING) * look.PAUSE["nccl"] < limit < stage.limit
    assert look.STEPS * look.PAUSE["nccl"] < stage.expected


def test_an_error_of_the_sanitizer_fails_the_stage(monkeypatch):
    commands = []

    def run(command, seconds, **environment):
        commands.append((command, environment))
        return process.Outcome(9, 5.0, "Invalid __global__ read\nERROR SUMMARY: 1 error")

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(stages, "tool", lambda name: f"/cuda/bin/{name}")
    found = stages.sanitizer(60)
    assert found.passed is False and "1 error" in found.figures["output"]
    ((command, environment),) = commands
    assert command[0] == "/cuda/bin/compute-sanitizer" and command[-2:] == ["-m", "benchmarks.gpu.small_case"]
    assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_the_small_case_of_the_sanitizer_runs():
    from benchmarks.gpu import small_case

    small_case.main("cpu")


def test_a_tool_is_found_in_the_toolkit_too(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "a-tool"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert stages.tool("a-tool") == str(path)
    assert stages.tool("another-tool") is None


def test_the_queue_imports_no_torch():
    assert "torch" not in {
        name.split(".")[0]
        for path in ("check", "stages", "results", "process", "tests", "build")
        for node in ast.walk(ast.parse((ROOT / f"benchmarks/gpu/{path}.py").read_text()))
        for name in imported(node)
    }
    assert "torch" in sys.modules, "the tests do"


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_the_language_model_continues_in_the_next_call(monkeypatch):
    """It ends itself in time, in the same folder each time; unfinished is not passed."""
    commands = []

    def run(command, seconds, show=False, **environment):
        commands.append(command)
        finding = {"passed": None, "how": "3 of 48 runs are finished"}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(finding))
        return process.Outcome(0, 1.0, "")

    monkeypatch.setattr(stages, "run", run)
    found = [stages.language_model(seconds) for seconds in (100.0, 80.0)]
    assert [(each.passed, each.how) for each in found] == [(None, "3 of 48 runs are finished")] * 2
    options = [dict(zip(command[2:-2:2], command[3:-2:2], strict=True)) for command in commands]
    assert [each.pop("--seconds") for each in options] == ["75", "55"]
    assert options[0] == options[1] and options[0]["--config"] == "gpu" and NAMES[-1] == "language-model"
