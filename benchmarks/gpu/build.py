"""Decides whether `make gpu-check` can use the existing extension vcrd._C, and builds it otherwise.

A build from another machine may be used: setup.py records its sources beside the built file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu.process import Outcome, run
from benchmarks.gpu.results import ROOT, files

SOURCES = ("setup.py", "csrc/**/*")


def record_of_the_build(root: Path = ROOT) -> Path:
    """The path where setup.py writes the record for this interpreter. The built file differs only in its suffix."""
    return (root / "vcrd" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").with_suffix(".build.json")


def changed(root: Path = ROOT) -> list[str] | None:
    """Sources that have changed since the build; None if there is no record of the build."""
    try:
        built_from = json.loads(record_of_the_build(root).read_text())["sources"]
    except (OSError, ValueError, KeyError):
        return None
    here = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files(SOURCES, root)
    }
    return sorted(name for name in {*here, *built_from} if here.get(name) != built_from.get(name))


def reason_to_build(torch_version: str, root: Path = ROOT) -> str | None:
    """Why the built file cannot be used; None if it may be loaded."""
    record = record_of_the_build(root)
    if not record.with_name(record.name.replace(".build.json", ".so")).exists():
        return "vcrd._C is not built for this interpreter"
    differ = changed(root)
    if differ is None:
        return "there is no record of the sources of vcrd._C"
    if differ:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        return f"{differ[0]}{more} changed since vcrd._C was built"
    found = json.loads(record.read_text())
    if found.get("torch") != torch_version:
        return f"vcrd._C was built with torch {found.get('torch')}, here is {torch_version}"
    return None if found.get("with_cuda") else "vcrd._C was built without its CUDA kernels"


def build(seconds: float) -> Outcome:
    """Touches the changed sources and builds. Ninja goes by file times, and a copy may have any times."""
    differ = changed()
    for path in files(SOURCES) if differ is None else [ROOT / name for name in differ]:
        if path.exists():
            path.touch()
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"], seconds)
