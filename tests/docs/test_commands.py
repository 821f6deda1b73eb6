"""The commands of the pages: run as they stand, or marked with what they need. The first page is typed as a whole.

What a page has its reader install is all that its commands find here (`page_environment`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
from pathlib import Path

import page_environment
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


def typed(python: Path, *command: str, seconds: float = 120) -> subprocess.CompletedProcess:
    """A command in the shell of somebody who activated that environment, from the checkout."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=page_environment.environment(python),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def needed(block: str) -> list[str]:
    """The packages of a block's first line, "# needs one, two and three; and so on"."""
    return re.split(r", | and ", re.match(r"# needs ([\w, -]+)", block)[1])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The interpreter of an environment as `make build` makes it."""
    packages = page_environment.installed_by_make("build")
    return page_environment.create(tmp_path_factory.mktemp("built") / "venv", packages)


def test_an_environment_has_what_its_page_installs_and_nothing_else(built):
    has = (
        "from importlib.util import find_spec as has; import sys; print([bool(has(n)) for n in sys.argv[1:]])"
    )
    names = ("torch", "megatron.core", "vcrd", "matplotlib", "rich", "pytest", "hypothesis", "transformers")
    done = typed(built, "python", "-c", has, *names)
    assert done.stdout == f"{[True] * 5 + [False] * 3}\n", done.stderr
    assert typed(built, "which", "torchrun").stdout == f"{built.parent}/torchrun\n"


def test_a_page_of_a_run_is_drawn_with_what_make_build_installs(built, tmp_path):
    """The last command of the first page; that it finds no records is what it says here."""
    done = typed(built, "python", "-m", "vcrd", "report", str(tmp_path))
    assert "RUN_DIR: " in done.stderr and "needed" not in done.stderr, done.stderr
    drawn = typed(built, "python", "-c", "from vcrd.report import charts, page")
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "script"),
    [
        ("demo", "-m examples.demo"),
        ("demo", "benchmarks/payload.py"),
        ("evidence", "research/run.py"),
        ("evidence", "research/anatomy.py"),
        ("estimators", "research/estimators.py"),
        ("bench-link", "benchmarks/link.py"),
        ("build", "-m benchmarks.gpu.parallel"),
        ("build", "tests/megatron/parallelisms.py"),
    ],
)
def test_what_a_page_starts_finds_its_packages_after_that_make(target, script, tmp_path):
    python = page_environment.create(tmp_path / "venv", page_environment.installed_by_make(target))
    done = typed(python, "python", *script.split(), "--help")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def with_readme(tmp_path_factory) -> Path:
    """What the README's install line and the example for those without Megatron name."""
    shell = blocks(ROOT / "README.md")
    (install,) = [block for block in shell if "pip install" in block]
    (example,) = [block for block in shell if "transformers_distill.py" in block]
    packages = page_environment.with_needs([*needed(install), *needed(example)])
    return page_environment.create(tmp_path_factory.mktemp("readme") / "venv", packages)


def test_the_example_of_the_readme_runs_with_the_packages_that_it_names(with_readme):
    done = typed(with_readme, "python", "examples/transformers_distill.py")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("loss [0-9.]+", done.stdout)) == 30


def test_the_call_of_the_readme_runs(tmp_path):
    """With the packages of its install line alone."""
    (text,) = [block for block in blocks(ROOT / "README.md", "python") if "validity_calibrated_kl" in block]
    (install,) = [block for block in blocks(ROOT / "README.md") if "pip install" in block]
    python = page_environment.create(tmp_path / "venv", page_environment.with_needs(needed(install)))
    done = typed(python, "python", "-c", text)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)
@pytest.mark.slow
def test_the_first_page_does_what_it_says(built, tmp_path):
    """From top to end in one shell, but for the download, the folder and the ports."""
    text = "".join(blocks(ROOT / "docs/getting-started.md"))
    for word, ours in (
        (
            "make build PYTHON=python3.12\nsource .venv/cp312/bin/activate\n",
            f"source {built.parent}/activate\nset -e\n",
        ),
        ("RUN=$PWD/first-run", f"RUN={tmp_path}"),
        *((port, str(free_port())) for port in ("29600", "29601", "29602")),
    ):
        assert text.count(word) == 1, word
        text = text.replace(word, ours)
    shell = subprocess.Popen(
        ["bash", "-c", text],
        cwd=ROOT,
        env=page_environment.environment(built),
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
