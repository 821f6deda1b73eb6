"""Writes the versions of an environment as its constraints file: `make constraints` after a change of the pins.

    .venv/cp312/bin/python requirements/constrain.py

Every installed package counts, except those that its first requirements pin, and those that torch pins.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).parent
# Installed before anything that could bring another version of what they pin, or alone.
FIRST = ("core", "build", "demo", "test", "evidence", "integrations-no-deps")
OF_TORCH = re.compile(r"triton|nvidia-.*|cuda-(bindings|pathfinder|toolkit)")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = HERE / f"constraints-py{version}.txt"
    pins = [path.read_text() for name in FIRST for path in HERE.glob(f"{name}*.txt")]
    left_out = {plain(name) for text in pins for name in re.findall(r"^([\w.-]+)==.*", text, re.M)}
    left_out |= {"pip", "setuptools", "vcrd"}
    found = {
        f"{each.name}=={each.version.split('+')[0]}"
        for each in distributions()
        if not (plain(each.name) in left_out or OF_TORCH.fullmatch(plain(each.name)))
    }
    lines = [
        f"# Versions of everything that the pinned requirements bring along, as tested on Python {version}."
    ]
    target.write_text("\n".join([*lines, *sorted(found, key=str.lower), ""]))


if __name__ == "__main__":
    main()
