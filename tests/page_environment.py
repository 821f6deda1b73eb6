"""Environments with exactly the packages that a page installs, made of links to installed packages.

If a page forgets a package, its commands work in the environment of the tests, which has more packages, and fail for a
reader. Nothing is downloaded. The list of packages comes from the requirement files of make, and from the metadata of
these packages.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(sysconfig.get_path("purelib"))


def installed_by_make(target: str) -> dict[str, Distribution]:
    """The packages that `make TARGET` installs with this interpreter; PackageNotFoundError if one is missing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--always-make", target, f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Distribution] = {}
    for call in re.findall(r"-m pip [^&;]*", done.stdout):
        for file in re.findall(r"-r (\S+)", call):
            lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
            found |= with_needs(filter(None, lines), alone="--no-deps" in call)
    assert found, f"make {target} installs nothing"
    return found


def with_needs(requirements: Iterable[str], alone: bool = False) -> dict[str, Distribution]:
    """These packages, and unless `alone` all of their dependencies."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = found.get(name) or distribution(name)
        for wanted in () if alone else ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                left += [(Requirement(text), wanted) for text in found[name].requires or ()]
    return found


def create(folder: Path, packages: dict[str, Distribution]) -> Path:
    """Makes a virtual environment with these packages, their commands and this checkout. Returns its python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    wanted = _places(packages.values())
    foreign = _places(each for each in distributions() if canonicalize_name(each.name) not in packages)
    _link(SITE, site, Path(), wanted, foreign)
    (site / "vcrd.pth").write_text(f"{ROOT}\n")  # as in `make build`
    for package in packages.values():
        _commands(package, python)
    return python


def _commands(package: Distribution, python: Path) -> None:
    """Creates the commands of the packages: Python scripts, and programs."""
    for command in package.entry_points:
        if command.group == "console_scripts":
            script = python.parent / command.name
            call = f"from {command.module} import {command.attr}\nsys.exit({command.attr}())"
            script.write_text(f"#!{python}\nimport sys\n{call}\n")
            script.chmod(0o755)
    for path in _recorded(package):
        program = (SITE / path).resolve()
        if program.parent == Path(sys.executable).parent and program.read_bytes()[:2] != b"#!":
            (python.parent / program.name).symlink_to(program)


def environment(python: Path) -> dict[str, str]:
    """The variables of a shell with this environment, without those of the tests and of vcrd."""
    ours = ("VCRD_", "PYTHONPATH", "PYTEST", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = [path for path in kept["PATH"].split(os.pathsep) if Path(path) != Path(sys.executable).parent]
    return {**kept, "PATH": os.pathsep.join([str(python.parent), *paths])}


def _places(packages: Iterable[Distribution]) -> set[Path]:
    """The files of these packages and all folders above them, relative to site-packages."""
    found: set[Path] = set()
    for package in packages:
        for path in _recorded(package):
            if ".." not in path.parts and not path.is_absolute():
                found |= {path, *path.parents}
    return found


def _recorded(package: Distribution) -> list[Path]:
    return [Path(row[0]) for row in csv.reader((package.read_text("RECORD") or "").splitlines())]


def _link(source: Path, target: Path, below: Path, wanted: set[Path], foreign: set[Path]) -> None:
    """Links the wanted files. Links a whole folder if all of its files are wanted."""
    for entry in (source / below).iterdir():
        path = entry.relative_to(source)
        if path not in wanted or path in foreign and not entry.is_dir():
            continue
        if path in foreign:
            (target / path).mkdir()
            _link(source, target, path, wanted, foreign)
        else:
            (target / path).symlink_to(entry)
