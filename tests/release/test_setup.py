"""What setup.py refuses and how it names a wheel, without a build."""

from __future__ import annotations

import ast
import re
from importlib import metadata
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
    # The metadata of PyPI's torch have no local version.
    own = SimpleNamespace(version=lambda name: torch_version, distributions=metadata.distributions)
    torch.__version__ += "" if "+" in torch_version else "+cu130"
    names = {"ROOT": ROOT, "re": re, "torch": torch, "metadata": own, "LABEL": label}
    exec(compile(tree, "setup.py", "exec"), names)
    return names


def packages(folder: Path, version: str) -> list[str]:
    """The packages of an environment with this torch."""
    (folder / f"torch-{version}.dist-info").mkdir(parents=True)
    (folder / f"torch-{version}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return [str(folder)]


@pytest.fixture
def environment(tmp_path) -> list[str]:
    return packages(tmp_path / "cpu", "2.13.0+cpu")


@pytest.fixture
def of_pypi(tmp_path) -> list[str]:
    return packages(tmp_path / "pypi", "2.11.0")


OVERLAY = "/tmp/pip-build-env-abc/overlay/lib/python3.11/site-packages/torch/__init__.py"


def test_an_isolated_build_with_another_torch_is_refused_in_one_sentence(environment):
    with pytest.raises(SystemExit) as refused:
        functions("2.15.0+cu130", OVERLAY)["check_torch"](environment)
    assert str(refused.value) == (
        "vcrd: this isolated build has torch 2.15.0+cu130 and the environment has torch 2.13.0+cpu, which could not "
        "load the extension: add --no-build-isolation"
    )


def test_other_builds_are_not_refused(environment, of_pypi, tmp_path):
    functions("2.13.0+cpu", OVERLAY)["check_torch"](environment)
    functions("2.11.0", OVERLAY)["check_torch"](of_pypi)
    functions("2.15.0", OVERLAY)["check_torch"]([str(tmp_path / "empty")])
    functions("2.15.0")["check_torch"](environment)  # for example a torch in PYTHONPATH


def test_a_wheel_for_others_names_its_label_and_requires_its_torch():
    plain = functions("2.11.0+cu130")
    assert (plain["version"](), plain["required_torch"]()) == (vcrd.__version__, "torch>=2.6")
    labelled = functions("2.11.0a0+eb65.nv26.02", label="cu130.torch2.11")
    assert labelled["version"]() == f"{vcrd.__version__}+cu130.torch2.11"
    assert labelled["required_torch"]() == "torch==2.11.*"
