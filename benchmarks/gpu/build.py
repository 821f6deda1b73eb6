"""Whether the extension vcrd._C that is here can be used for `make gpu-check`, and how it is built anew.

A build that was carried to this machine counts: setup.py writes beside the built file what it was made of.
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
    """Where setup.py writes it for this interpreter; the built file has the same name, but for its ending."""
    return (root / "vcrd" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").with_suffix(".build.json")


def changed(root: Path = ROOT) -> list[str] | None:
    """Files that the extension is made of and that are not as it was built from; None where no record says so."""
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
    """Why the built file that is here is not even worth loading; None where it may be."""
    record = record_of_the_build(root)
    if not record.with_name(record.name.replace(".build.json", ".so")).exists():
        return "vcrd._C is not built for this interpreter"
    differ = changed(root)
    if differ is None:
        return "nothing says what vcrd._C was built from"
    if differ:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        return f"{differ[0]}{more} changed since vcrd._C was built"
    found = json.loads(record.read_text())
    if found.get("torch") != torch_version:
        return f"vcrd._C was built with torch {found.get('torch')}, here is {torch_version}"
    return None if found.get("with_cuda") else "vcrd._C was built without its CUDA kernels"


def build(seconds: float) -> Outcome:
    """Ninja compiles what is newer than its object file. A copy may have any times, so what changed is touched."""
    differ = changed()
    for path in files(SOURCES) if differ is None else [ROOT / name for name in differ]:
        if path.exists():
            path.touch()
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"], seconds)
