"""What setup.py has written about the extension vcrd._C, beside its file. Reading it loads neither of torch and _C."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path


def read() -> dict:
    """torch: the version that it was built with. with_cuda: whether it has CUDA kernels. cuda: the version of CUDA of
    that torch, if it has. sources: SHA-256 of each source file. Empty if there is no record, or no extension."""
    try:
        found = importlib.util.find_spec("vcrd._C")
        record = json.loads(Path(found.origin).with_suffix(".build.json").read_text())
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def refusal(record: dict, torch_version: str, cuda: str | None) -> str:
    """Why an extension with this record is not loaded beside a torch of this version and CUDA; empty if it is.

    The C++ interface of torch changes with each minor version, and CUDA kernels need the CUDA runtime of torch.
    """
    built, needs = record.get("torch"), record.get("cuda")
    if built is None or (
        _numbers(built, 2) == _numbers(torch_version, 2)
        and (needs is None or _numbers(needs, 1) == _numbers(cuda or "", 1))
    ):
        return ""
    here = f" {'without CUDA' if cuda is None else f'with CUDA {cuda}'}" if needs else ""
    return (
        f"vcrd's extension was built with torch {built}{f' and CUDA {needs}' if needs else ''}, but this is torch "
        f"{torch_version}{here}: install vcrd's wheel for this torch, or build it with this torch "
        "(`pip install --no-build-isolation`, from a checkout or the sdist)"
    )


def _numbers(version: str, count: int) -> list[str]:
    return re.findall(r"\d+", version)[:count]
