"""What setup.py has written about the extension vcrd._C, beside its file. Reading it loads neither of torch and _C."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path


def read() -> dict:
    """torch: the version that it was built with. with_cuda, cuda: whether it has CUDA kernels, and the version of CUDA
    of that torch. sources: SHA-256 of each source file. Empty if there is no record, or no extension."""
    try:
        found = importlib.util.find_spec("vcrd._C")
        record = json.loads(Path(found.origin).with_suffix(".build.json").read_text())
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def refusal(built: str | None, here: str) -> str:
    """Why an extension that was built with one torch is not loaded beside another; empty if it is.

    The C++ interface of torch changes with each minor version. None: it is not known with which torch it was built.
    """
    if built is None or _minor(built) == _minor(here):
        return ""
    wanted = ".".join(_minor(here))
    return (
        f"vcrd's extension was built with torch {built} and this is torch {here}: install vcrd's wheel for torch "
        f"{wanted}, or build it with this torch (`pip install --no-build-isolation`, from a checkout or the sdist)"
    )


def _minor(version: str) -> list[str]:
    return re.findall(r"\d+", version)[:2]
