"""Lists the missing packages of an environment with the versions of requirements/, and the packages to keep.

    python docker/pins.py FOLDER

Writes FOLDER/install.txt and FOLDER/held.txt, for `pip install -r install.txt` with held.txt as constraints.
A base image was built and tested as a whole. Its packages stay as they are, except megatron-core, which gets its pin,
and build tools that pyproject.toml refuses. torch, numpy and everything built against torch keep their exact versions
of any form: NVIDIA's torch is a pre-release with a local version, 2.11.0a0+eb65b36914.nv26.02. New packages get the
versions that CI tests.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# pip's own parser for requirements, which needs no further package.
from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
# None: all packages of a file.
WANTED: dict[str, set[str] | None] = {
    "core.txt": None,
    "build.txt": None,
    "demo.txt": {"transformers"},  # Megatron's tokenizers
    "test.txt": {"tensorboard"},
}
FROM_BASE = "torch"
ALWAYS_PINNED = {"megatron-core"}
HELD = {"torch", "numpy", "triton", "pytorch-triton"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read(path: Path) -> dict[str, Requirement]:
    """Requirements of a file that apply to this Python, by canonical name."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonical(r.name): r for r in found if r.marker is None or r.marker.evaluate()}


def wanted(folder: Path = REQUIREMENTS) -> dict[str, Requirement]:
    """The packages that the image needs besides torch; SystemExit if a file no longer names one of them."""
    chosen: dict[str, Requirement] = {}
    for file, names in WANTED.items():
        text = (folder / file).read_text()
        absent = sorted(n for n in names or () if not re.search(rf"^{re.escape(n)}\b", text, re.M))
        if absent:
            raise SystemExit(f"{file} names no {', '.join(absent)}, which docker/pins.py takes from it")
        chosen |= {n: r for n, r in read(folder / file).items() if names is None or n in names}
    chosen.pop(FROM_BASE, None)
    return chosen


def build_tools() -> dict[str, Requirement]:
    """The build tools of pyproject.toml. Python 3.10 has no TOML parser, and the list is one line there."""
    line = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    return {canonical(r.name): r for r in map(Requirement, ast.literal_eval(line[1]))}


def installed() -> tuple[dict[str, str], set[str]]:
    """Versions by canonical name, and the names of packages that require torch."""
    versions: dict[str, str] = {}
    dependent: set[str] = set()
    for package in distributions():
        name = package.metadata["Name"]
        if not name or not package.version or canonical(name) in versions:
            continue  # a damaged folder, or one hidden by another on the path
        versions[canonical(name)] = package.version
        needs = [re.match(r"[\w.-]+", line) for line in package.requires or () if "extra ==" not in line]
        if FROM_BASE in {canonical(need[0]) for need in needs if need}:
            dependent.add(canonical(name))
    return versions, dependent


def satisfies(version: str, requirement: Requirement | None) -> bool:
    return requirement is None or requirement.specifier.contains(version, prereleases=True)


def main(folder: Path) -> None:
    versions, dependent = installed()
    if FROM_BASE not in versions:
        raise SystemExit(
            "torch is not installed here: it comes with the base image and is never installed anew"
        )
    missing, tools = {}, build_tools()
    for name, requirement in wanted().items():
        if name not in versions or name in ALWAYS_PINNED or not satisfies(versions[name], tools.get(name)):
            missing[name] = requirement
        elif not satisfies(versions[name], requirement):
            print(f"{name} stays at {versions[name]}, as the base has it; CI tests {requirement.specifier}")
    held = {n: v for n, v in versions.items() if n in (HELD | dependent) - ALWAYS_PINNED}
    tested = REQUIREMENTS / f"constraints-py{sys.version_info[0]}.{sys.version_info[1]}.txt"
    new = {n: r for n, r in read(tested).items() if n not in versions} if tested.exists() else {}
    lines = [f"{n}=={v}" for n, v in sorted(held.items())] + [str(r) for r in new.values()]
    (folder / "held.txt").write_text("".join(f"{line}\n" for line in lines))
    # Without the markers, which are already evaluated.
    lines = [f"{r.name}{r.specifier}" for r in missing.values()]
    (folder / "install.txt").write_text("".join(f"{line}\n" for line in lines))
    print("to install: " + " ".join(lines))
    print("held: " + " ".join(f"{n}=={v}" for n, v in sorted(held.items())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
