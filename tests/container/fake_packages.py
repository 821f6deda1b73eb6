"""Nearly empty wheels for the steps of docker/install.sh, and environments of such wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "docker/install.sh"
NVIDIA_TORCH = "2.11.0a0+eb65b36914.nv26.02"


def wheel(
    folder: Path,
    name: str,
    version: str,
    requires: Iterable[str] = (),
    files: Mapping[str, str] | None = None,
) -> Path:
    stem = f"{name.replace('-', '_')}-{version}"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    contents = {
        **(files or {}),
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{stem}.dist-info/RECORD"] = "".join(f"{file},,\n" for file in contents)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)
    return path


def torch_wheel(folder: Path, version: str) -> Path:
    """A torch without CUDA."""
    files = {
        "torch/__init__.py": "from torch import version\n",
        "torch/version.py": f"__version__ = {version!r}\ncuda = None\n",
    }
    return wheel(folder, "torch", version, ["numpy"], files)


def offer_all(base: Base, pins, *megatron_needs: str) -> dict[str, str]:
    """Fills the index with empty wheels of all packages of docker/pins.py. Returns versions by name."""
    offered = {}
    for name, requirement in pins.wanted().items():
        (pin,) = requirement.specifier
        offered[name] = pin.version
        needs = megatron_needs if name == "megatron-core" else ()
        wheel(base.index, name, pin.version, needs)
    return offered


class Base:
    """An environment in place of a base image, and an index of wheels for pip in place of PyPI."""

    def __init__(self, empty: Path, folder: Path) -> None:
        self.folder = folder / "environment"
        self.index = folder / "index"
        shutil.copytree(empty, self.folder, symlinks=True)
        self.index.mkdir()

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    def environment(self, **more: str) -> dict[str, str]:
        hermetic = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHON": str(self.python),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "CUDA"))}
        return {**kept, **hermetic, **more}

    def has(self, *wheels: Path) -> None:
        """Puts wheels into the environment."""
        command = [self.python, "-m", "pip", "install", "-q", "--no-deps", *wheels]
        subprocess.run(command, env=self.environment(), check=True)

    def unpacked(self, file: Path) -> Path:
        """A folder with a package, for PYTHONPATH."""
        folder = self.folder.parent / "elsewhere"
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
        return folder

    def run(self, *steps: str, script: Path = INSTALL, **variables: str) -> subprocess.CompletedProcess[str]:
        return _run(script, steps, self.environment(**variables))

    def versions(self) -> dict[str, str]:
        program = (
            "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
        )
        listed = subprocess.run(
            [self.python, "-I", "-c", program], capture_output=True, text=True, check=True
        )
        return dict(line.split("==") for line in listed.stdout.split())


def run(*steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs with the environment of this process."""
    return _run(INSTALL, steps, {**os.environ, **variables})


def _run(
    script: Path, steps: Iterable[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *steps], env=environment, capture_output=True, text=True, timeout=120)
