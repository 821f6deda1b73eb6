"""The commands of the pages: run as they stand, or marked with what they need. The first page is typed as a whole."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docker/README.md", *sorted((ROOT / "docs").glob("*.md")))
# By page and place, the test that runs it.
RUN = {
    ("README.md", 0): "tests/demo/test_demo.py::test_demo_distils_and_shows_it",
    ("docs/cluster.md", 1): "tests/slurm/test_slurm.py::test_the_example_of_the_page_runs",
    ("docs/pretraining.md", 0): "tests/megatron/pretrain_jobs.py::CPU",
    **{
        (
            "docs/getting-started.md",
            place,
        ): "tests/docs/test_commands.py::test_the_first_page_does_what_it_says"
        for place in range(5)
    },
}


def blocks(page: Path, language: str = "bash") -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_is_run_by_a_test_or_says_what_it_needs(page):
    for place, text in enumerate(blocks(page)):
        runs = RUN.get((str(page.relative_to(ROOT)), place))
        if runs is None:
            assert text.startswith("# needs "), text
            continue
        file, name = runs.split("::")
        assert name in (ROOT / file).read_text(), runs


def test_every_page_is_in_the_index_and_every_link_leads_somewhere():
    index = (ROOT / "docs/README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_the_call_of_the_readme_runs():
    (text,) = [block for block in blocks(ROOT / "README.md", "python") if "validity_calibrated_kl" in block]
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)
@pytest.mark.slow
def test_the_first_page_does_what_it_says(tmp_path):
    """From top to end in one shell, but for the build, the folder and the ports."""
    text = "".join(blocks(ROOT / "docs/getting-started.md"))
    for word, ours in (
        ("make build PYTHON=python3.12\nsource .venv/cp312/bin/activate\n", "set -e\n"),
        ("RUN=$PWD/first-run", f"RUN={tmp_path}"),
        *((port, str(free_port())) for port in ("29600", "29601", "29602")),
    ):
        assert text.count(word) == 1, word
        text = text.replace(word, ours)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VCRD_")}
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = subprocess.Popen(
        ["bash", "-c", text],
        cwd=ROOT,
        env=kept | paths,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = shell.communicate(timeout=250)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # with its jobs
    assert shell.returncode == 0, out[-4000:]
    assert "0 faults" in out and "[vcrd] iteration       30/" in out
    assert re.search(r"served \d+ micro-batches", (tmp_path / "teacher.log").read_text())
    page = (tmp_path / "records/report.html").read_text(encoding="utf-8")
    assert "1 to 30" in page and "waiting for teacher replica 0" in page and "% forward" in page
