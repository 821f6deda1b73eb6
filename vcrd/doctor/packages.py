"""What else is installed beside torch and the extension: Megatron-Core, Transformer Engine, apex."""

from __future__ import annotations

import importlib
import re
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from vcrd.doctor.findings import Finding, fact, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job

ALIKE = "Install one version on all nodes, best as one container image."
_LEAST_MEGATRON = (0, 16)
_ENGINE, _APEX = "transformer_engine", "apex"


class Failure(NamedTuple):
    """Of an import. culprit: the package below which it failed, where that is one with a line of its own."""

    text: str
    culprit: str


def failure_of(module: str) -> Failure | None:
    """None where it can be imported, or is not there."""
    if not _importable(module):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # whatever a package raises while it loads is what the run would see
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        culprits = [name for file in files for name in (_ENGINE, _APEX) if f"/{name}/" in file]
        return Failure(first_line(error), culprits[-1] if culprits else "")
    return None


def megatron_core(job: Job) -> list[Finding]:
    try:
        number = version("megatron-core")
    except PackageNotFoundError:
        if find_spec("megatron") is None:
            text = "not installed; the loss works without it, the plug does not"
            return [fact("megatron-core", text, alike=ALIKE)]
        number = "a checkout"
    numbers = tuple(int(part) for part in re.findall(r"\d+", number)[:2])
    if numbers and numbers < _LEAST_MEGATRON:
        text, fix = (
            f"{number}, and vcrd is for 0.16 and newer",
            "Run `pip install -U --no-deps megatron-core`.",
        )
        return [fault("megatron-core", text, fix)]
    failure = failure_of("megatron.core")
    if failure and failure.culprit:
        text = f"{number}; it cannot be imported before {failure.culprit} can, see its line"
        return [unchecked("megatron-core", text)]
    if failure:
        # Without what it needs: that would bring another torch into an image that has its own.
        fix = (
            "Install it anew into this environment: `pip install --force-reinstall --no-deps megatron-core`."
        )
        return [fault("megatron-core", f"{number} cannot be imported: {failure.text}", fix)]
    training = "with" if _importable("megatron.training") else "without"
    return [ok("megatron-core", f"{number}, {training} megatron.training", alike=ALIKE)]


def psutil(job: Job) -> list[Finding]:
    """Megatron-Core does not ask for it, and notices at the first checkpoint."""
    if find_spec("megatron") is None or find_spec("psutil") is not None:
        return []
    text = "not installed, and Megatron-Core saves no checkpoint of the format torch_dist without it"
    return [fault("psutil", text, "Run `pip install psutil`.")]


def transformer_engine(job: Job) -> list[Finding]:
    if find_spec(_ENGINE) is None:
        text = "not installed: no FP8, context parallelism or sequence parallelism"
        return [fact("transformer engine", text, alike=ALIKE)]
    number = _version_of("transformer_engine", "transformer-engine") or "a checkout"
    import torch

    gpu = torch.cuda.is_available()
    failure = failure_of("transformer_engine.pytorch" if gpu else "megatron.core")
    if failure and (gpu or failure.culprit == _ENGINE):
        fix = "Install it for this torch: `pip install --no-build-isolation transformer_engine[pytorch]`."
        return [fault("transformer engine", f"{number} cannot be imported: {failure.text}", fix)]
    if not gpu:
        return [unchecked("transformer engine", f"{number}; whether it works shows on a GPU alone")]
    return [ok("transformer engine", number, alike=ALIKE)]


def apex(job: Job) -> list[Finding]:
    """PyPI's package of this name is a toolkit for web sites made with Pyramid. NVIDIA's is not on PyPI."""
    here = find_spec(_APEX)
    try:
        known = distribution(_APEX).metadata
    except PackageNotFoundError:
        known = None
    if here is None and known is None:
        return [fact("apex", "not installed; Megatron takes torch's norms and optimizers", alike=ALIKE)]
    folders = [Path(folder) for folder in (here.submodule_search_locations if here else None) or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return [_not_nvidias(known, folders)]
    if find_spec("amp_C") is None:
        return [
            fault(
                "apex",
                "NVIDIA's, but without its CUDA extensions, so that its optimizers fail",
                "Build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 as its README says, or run `pip uninstall apex`.",
            )
        ]
    failure = failure_of("megatron.core")
    if failure and failure.culprit == _APEX:
        fix = "Build it anew for this torch, or run `pip uninstall apex`, since Megatron works without it."
        return [fault("apex", f"it cannot be imported: {failure.text}", fix)]
    return [ok("apex", f"NVIDIA's {known['Version'] if known else ''}".strip(), alike=ALIKE)]


def _not_nvidias(known, folders: list[Path]) -> Finding:
    if known is None:  # of the folder that this was started in, say, as NVIDIA's own checkout
        place = folders[0] if folders else "a file"
        return fault(
            "apex",
            f"{place} is taken for it, and has no apex.optimizers",
            "Rename that folder, or start the run where Python does not find it.",
        )
    return fault(
        "apex",
        f"apex {known['Version']} from PyPI is another project ({known.get('Summary') or 'it has no optimizers'})",
        "Run `pip uninstall apex`: Megatron works without it, and NVIDIA's is built from github.com/NVIDIA/apex.",
    )


def rich(job: Job) -> list[Finding]:
    if find_spec("rich") is not None:
        return []
    return [fact("rich", "not installed, so this table has no colours: `pip install rich`")]


def _version_of(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _importable(module: str) -> bool:
    """Whether there is one of this name; what is above it may fail on the way."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
    except Exception:  # of a parent that fails to load: the import will say why
        return True


CHECKS = (megatron_core, psutil, transformer_engine, apex, rich)
