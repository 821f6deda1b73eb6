"""The demo from its command line to its results, with few and short sequences."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import page_environment
from ports import free_port
from rich.console import Console

from examples.demo.__main__ import run
from examples.demo.settings import DemoSettings

ROOT = Path(__file__).parents[2]
STEPS = 6


def test_demo_distils_and_shows_it(demo_cache, tmp_path):
    """With the packages that `make demo` installs."""
    python = page_environment.create(tmp_path / "venv", page_environment.installed_by_make("demo"))
    output = tmp_path / "results"
    command = [
        str(python),
        "-m",
        "examples.demo",
        "--fast",
        "--steps",
        str(STEPS),
        "--port",
        str(free_port()),
    ]
    command += ["--output", str(output), "--cache", str(demo_cache)]
    environment = page_environment.environment(python)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    logs = "".join(path.read_text()[-2000:] for path in (output / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert str(output) in done.stdout.replace("\n", "") and "before" in done.stdout

    results = json.loads((output / "results.json").read_text())
    before, after = results["held_out"]["before"], results["held_out"]["after"]
    assert after["divergence"] < 0.8 * before["divergence"]
    assert before["tokens"] == after["tokens"] > 50
    assert [step["number"] for step in results["training"]] == list(range(STEPS))
    for figures in (before, after, *(step["figures"] for step in results["training"])):
        assert all(math.isfinite(value) for value in figures.values() if not isinstance(value, list))
        assert 0.1 <= figures["weight"] <= 1.9 and 0 <= figures["agreement"] <= 1
        assert sum(figures["validity_histogram"]) == figures["tokens"]
    assert before["link_bytes"] > 0 and sum(step["figures"]["link_bytes"] for step in results["training"]) > 0

    picture = (output / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    check_page((output / "page.html").read_text(), before["tokens"])
    report = (output / "report.html").read_text()
    assert f"1 to {STEPS}" in report and "2 ranks: pipeline 2" in report and "Weights in a text" in report
    assert (output / ".gitignore").read_text() == "*\n"


def test_the_layout_of_one_gpu_distils_in_bfloat16(demo_cache, tmp_path):
    """One process in each job and bfloat16, as with --gpu, on the CPU."""
    settings = replace(
        DemoSettings(output=str(tmp_path / "results"), cache=str(demo_cache), port=free_port()).on_one_gpu(),
        gpu=False,
        steps=STEPS,
        micro_batches=1,
        micro_batch_size=2,
        sequence_length=96,
        held_out=2,
    )
    said = io.StringIO()
    run(Console(file=said, width=200), settings)
    assert "1 pipeline stages" in said.getvalue() and "1 tensor ranks" in said.getvalue()
    results = json.loads((settings.folder / "results.json").read_text())
    before, after = results["held_out"]["before"], results["held_out"]["after"]
    assert after["divergence"] < 0.9 * before["divergence"]
    report = (settings.folder / "report.html").read_text()
    assert f"1 to {STEPS}" in report


def check_page(page: str, tokens: int) -> None:
    assert not re.search(r"""(src|href)=["']?(http|//|file)""", page), "the page must be self-contained"
    assert not re.search("@(DATA|CHARTS|COLOURS|FOOTER)@", page) and page.count("<svg") == 3
    data = json.loads(re.search(r"const page = (\{.*\});\n", page).group(1).replace("<\\/", "</"))
    for stage in ("before", "after"):
        rows = [row for problem in data["problems"] for row in problem[stage]]
        assert len(rows) == tokens and all(len(row) == len(data["fields"]) for row in rows)
        validity = [row[data["fields"].index("relative_validity")] for row in rows]
        assert all(0 <= value <= 1 for value in validity) and len(set(validity)) > 10
    for problem in data["problems"]:
        assert problem["text"] and "<|im" not in problem["text"]
        assert len(problem["written"]) == len(problem["after"])
        steps = [row[data["fields"].index("step")] for row in problem["after"]]
        assert steps == sorted(steps) and steps[0] == 0
