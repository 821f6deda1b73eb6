"""The commands of the pages: a test runs each one, or it says what it needs. The first page runs as a whole.

The commands find only the packages that their page installs (`page_environment`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import page_environment
import pytest
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(
        ROOT / name
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
)
# By page and position of the command, the test that runs it.
RUN = {
    ("README.md", 0): "tests/demo/test_demo.py::test_demo_distils_and_shows_it",
    ("docs/cluster.md", 1): "tests/slurm/test_slurm.py::test_the_example_of_the_page_runs",
    (
        "docs/integrations/bridge-examples.md",
        0,
    ): "tests/integrations/test_bridge_examples.py::test_the_demo_distils_the_real_smollm2",
    (
        "docs/on-policy.md",
        0,
    ): "tests/examples/test_on_policy.py::test_the_command_compares_all_methods_and_draws_them",
    **{
        ("docs/cache.md", place): "tests/docs/test_commands.py::test_the_page_of_the_cache_does_what_it_says"
        for place in range(2)
    },
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
        assert page.name == "README.md" or f"({os.path.relpath(page, ROOT / 'docs')})" in index, page
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def typed(python: Path, *command: str, seconds: float = 120) -> subprocess.CompletedProcess:
    """Runs a command in a shell with that environment, from the checkout."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=page_environment.environment(python),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def needed(block: str) -> list[str]:
    """The packages in the first line of a block, "# needs one, two and three; and so on"."""
    return re.split(r", | and ", re.match(r"# needs ([\w, -]+)", block)[1])


@pytest.fixture(scope="module")
def after_make(tmp_path_factory) -> Callable[[str], Path]:
    """The interpreter of an environment with the packages of a target of make."""

    @functools.cache
    def create(target: str) -> Path:
        packages = page_environment.installed_by_make(target)
        return page_environment.create(tmp_path_factory.mktemp(target) / "venv", packages)

    return create


@pytest.fixture(scope="module")
def built(after_make) -> Path:
    return after_make("build")


def test_an_environment_has_exactly_the_packages_of_its_page(built):
    has = (
        "from importlib.util import find_spec as has; import sys; print([bool(has(n)) for n in sys.argv[1:]])"
    )
    names = ("torch", "megatron.core", "vcrd", "matplotlib", "rich", "pytest", "hypothesis", "transformers")
    done = typed(built, "python", "-c", has, *names)
    assert done.stdout == f"{[True] * 5 + [False] * 3}\n", done.stderr
    assert typed(built, "which", "torchrun").stdout == f"{built.parent}/torchrun\n"


def test_make_build_installs_the_packages_of_the_report(built, tmp_path):
    """The last command of the first page; without records it prints an error about them."""
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
def test_the_commands_of_a_page_find_their_packages_after_its_make(target, script, after_make):
    done = typed(after_make(target), "python", *script.split(), "--help")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def with_readme(tmp_path_factory) -> Path:
    """An environment with the packages of the README's install line and of the example for a loop without Megatron."""
    (install,) = [block for block in blocks(ROOT / "README.md") if "pip install" in block]
    page = blocks(ROOT / "docs/integrations/transformers.md")
    (example,) = [block for block in page if "transformers_distill.py" in block]
    packages = page_environment.with_needs([*needed(install), *needed(example)])
    return page_environment.create(tmp_path_factory.mktemp("readme") / "venv", packages)


def test_the_example_without_megatron_runs_with_its_packages(with_readme):
    done = typed(with_readme, "python", "examples/transformers_distill.py")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("loss [0-9.]+", done.stdout)) == 30


def test_the_call_of_the_readme_runs(tmp_path):
    """With only the packages of its install line."""
    (text,) = [block for block in blocks(ROOT / "README.md", "python") if "validity_calibrated_kl" in block]
    (install,) = [block for block in blocks(ROOT / "README.md") if "pip install" in block]
    python = page_environment.create(tmp_path / "venv", page_environment.with_needs(needed(install)))
    done = typed(python, "python", "-c", text)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)
@pytest.mark.slow
def test_the_first_page_does_what_it_says(built, tmp_path):
    """All of it in one shell, with other ports and another folder, and without the download."""
    out = in_a_shell("".join(blocks(ROOT / "docs/getting-started.md")), built, tmp_path)
    assert "0 problems" in out and "[vcrd] iteration       30/" in out
    assert re.search(r"served \d+ micro-batches", (tmp_path / "teacher.log").read_text())
    page = (tmp_path / "records/report.html").read_text(encoding="utf-8")
    assert "1 to 30" in page and "waiting for teacher replica 0" in page and "% forward" in page


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)
@pytest.mark.slow
def test_the_page_of_the_cache_does_what_it_says(built, tmp_path):
    """After the steps of the first page that it names."""
    start, page = blocks(ROOT / "docs/getting-started.md"), blocks(ROOT / "docs/cache.md")
    out = in_a_shell("".join([*start[:3], *page[:2]]), built, tmp_path)
    assert re.search(r"cache: \d+ sequences written", out) and "no file is damaged" in out
    assert "[vcrd] iteration       30/" in out


def in_a_shell(text: str, built: Path, folder: Path) -> str:
    """What the commands of pages print, which must succeed, with other ports and another folder."""
    for word, ours in (
        (
            "make build PYTHON=python3.12\nsource .venv/cp312/bin/activate\n",
            f"source {built.parent}/activate\nset -e\n",
        ),
        ("RUN=$PWD/first-run", f"RUN={folder}"),
        *((port, str(free_port())) for port in ("29600", "29601", "29602")),
    ):
        assert word in text, word
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
            os.killpg(shell.pid, signal.SIGKILL)  # and its jobs
    assert shell.returncode == 0, out[-4000:]
    return out
