"""What setup.py refuses and how it names a wheel, without a build."""

from __future__ import annotations

import ast
import re
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

import vcrd

ROOT = Path(__file__).parents[2]


def functions(torch_version: str, torch_file: str = "/env/torch/__init__.py", label: str = "") -> dict:
    """The functions of setup.py, because importing it starts a build."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    torch = SimpleNamespace(__version__=torch_version, __file__=torch_file)
    names = {"ROOT": ROOT, "re": re, "torch": torch, "distributions": distributions, "LABEL": label}
    exec(compile(tree, "setup.py", "exec"), names)
    return names


@pytest.fixture
def environment(tmp_path) -> list[str]:
    """The packages of an environment with torch 2.13.0+cpu."""
    (tmp_path / "torch-2.13.0+cpu.dist-info").mkdir()
    (tmp_path / "torch-2.13.0+cpu.dist-info/METADATA").write_text("Name: torch\nVersion: 2.13.0+cpu\n")
    return [str(tmp_path)]


OVERLAY = "/tmp/pip-build-env-abc/overlay/lib/python3.11/site-packages/torch/__init__.py"


def test_an_isolated_build_with_another_torch_is_refused_in_one_sentence(environment):
    with pytest.raises(SystemExit) as refused:
        functions("2.15.0+cu130", OVERLAY)["check_torch"](environment)
    assert str(refused.value) == (
        "vcrd: this isolated build has torch 2.15.0+cu130 and the environment has torch 2.13.0+cpu, which could not "
        "load the extension: add --no-build-isolation"
    )


def test_other_builds_are_not_refused(environment, tmp_path):
    functions("2.13.0+cpu", OVERLAY)["check_torch"](environment)
    functions("2.15.0", OVERLAY)["check_torch"]([str(tmp_path / "empty")])
    functions("2.15.0")["check_torch"](environment)  # for example a torch in PYTHONPATH


def test_a_wheel_for_others_names_its_label_and_requires_its_torch():
    plain = functions("2.11.0+cu130")
    assert (plain["version"](), plain["required_torch"]()) == (vcrd.__version__, "torch>=2.6")
    labelled = functions("2.11.0a0+eb65.nv26.02", label="cu130.torch2.11")
    assert labelled["version"]() == f"{vcrd.__version__}+cu130.torch2.11"
    assert labelled["required_torch"]() == "torch==2.11.*"
