from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from fake_packages import ROOT, Base


def load(name: str):
    """Imports a file of docker/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / f"docker/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pins():
    return load("pins")


@pytest.fixture(scope="session")
def check():
    return load("check")


@pytest.fixture(scope="session")
def empty_environment(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("container") / "empty"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def base(empty_environment, tmp_path) -> Base:
    return Base(empty_environment, tmp_path)
