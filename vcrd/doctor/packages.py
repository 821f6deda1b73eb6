"""The installed packages: whether their versions fit together, and whether they can be imported."""

from __future__ import annotations

import importlib
import platform
import re
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import vcrd
from vcrd.doctor.checks import Job, import_crash
from vcrd.doctor.findings import Finding, first_line, info, ok, problem, unchecked

_SAME_VERSION = "Install the same version on all nodes, for example with one container image."
_OLDEST_MEGATRON = (0, 16)
_ENGINE, _APEX = "transformer_engine", "apex"
ARCHITECTURE = re.compile(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?")


def versions(job: Job) -> list[Finding]:
    import torch

    found = [
        info("python", platform.python_version(), "Use the same version of Python on all nodes."),
        ok("vcrd", vcrd.__version__, _SAME_VERSION),
        ok("torch", f"{torch.__version__}, {_cuda_of(torch.version.cuda)}", _SAME_VERSION),
    ]
    if torch.version.cuda is not None:
        try:
            found.append(ok("nccl", ".".join(map(str, torch.cuda.nccl.version())), _SAME_VERSION))
        except (AttributeError, RuntimeError, TypeError) as error:
            found.append(info("nccl", f"torch does not report its version: {first_line(error)}"))
    return found


def _cuda_of(built: str | None) -> str:
    return "without CUDA" if built is None else f"built with CUDA {built}"


def torch_gpus(job: Job) -> list[Finding]:
    """Whether torch can use the GPUs that the driver sees."""
    import torch

    import_crash("vcrd.loss.ops", job.options.timeout / 2)  # must run before CUDA is initialised
    present = _driver_sees_gpus()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that is too old; `gpus` reports it
        available = torch.cuda.is_available()
    if not available:
        if not present:
            return [unchecked("torch gpus", "the NVIDIA driver sees no GPU, see the line `driver`")]
        if torch.version.cuda is None:
            fix = "Install a torch with CUDA (pytorch.org has the command)."
            return [problem("torch gpus", "none: this torch is built without CUDA", fix)]
        fix = "Check CUDA_VISIBLE_DEVICES, and see the line `driver`."
        return [problem("torch gpus", f"none: {_cuda_error()}", fix)]
    count = torch.cuda.device_count()
    if 1 < count < job.world.local_size:
        fix = "Start one process for each GPU, or check CUDA_VISIBLE_DEVICES."
        return [problem("torch gpus", f"{count} for {job.world.local_size} processes on this node", fix)]
    found = []
    for capability in dict.fromkeys(torch.cuda.get_device_capability(i) for i in range(count)):
        if not runs_on(torch.cuda.get_arch_list(), capability):
            built = ", ".join(torch.cuda.get_arch_list())
            found.append(
                problem(
                    "torch gpus",
                    f"compute capability {capability[0]}.{capability[1]}, but torch is built for {built}",
                    "Install a torch that is built for this GPU (pytorch.org has the command).",
                )
            )
    return found or [ok("torch gpus", f"{count} in each process", "Give every process the same GPUs.")]


def _driver_sees_gpus() -> bool:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # `gpus` reports why NVML does not start
        return False
    count = nvml.nvmlDeviceGetCount()
    nvml.nvmlShutdown()
    return count > 0


def _cuda_error() -> str:
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return first_line(error)
    return "torch.cuda.is_available() is False"


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU of this compute capability.

    architectures: as nvcc names them ("9.0", "9.0a", "8.6+PTX") or as torch does ("sm_90a", "compute_120"). Machine
    code runs on its own major version, from its own minor version on. With "a" it runs on its own capability only; "f"
    changes nothing here. PTX runs on every later capability.
    """
    for text in architectures:
        match = ARCHITECTURE.fullmatch(text)
        if not match:
            continue
        own = int(match[1]), int(match[2])
        if match[3] == "a":
            if own == capability:
                return True
        elif own[0] == capability[0] and own[1] <= capability[1]:
            return True
        elif own <= capability and (match[4] or text.startswith("compute_")):
            return True
    return False


class ImportFailure(NamedTuple):
    """culprit: the package in which the import failed, if it is one that has its own line."""

    text: str
    culprit: str


def import_failure(module: str) -> ImportFailure | None:
    """None if the module can be imported, or is not installed."""
    if not is_installed(module):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # the run would get the same exception, whatever its type
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        culprits = [name for file in files for name in (_ENGINE, _APEX) if f"/{name}/" in file]
        return ImportFailure(first_line(error), culprits[-1] if culprits else "")
    return None


def megatron_core(job: Job) -> list[Finding]:
    try:
        number = version("megatron-core")
    except PackageNotFoundError:
        if find_spec("megatron") is None:
            text = "not installed; the loss works without it, `vcrd.megatron` does not"
            return [info("megatron-core", text, _SAME_VERSION)]
        number = "a checkout"
    numbers = tuple(int(part) for part in re.findall(r"\d+", number)[:2])
    if numbers and numbers < _OLDEST_MEGATRON:
        fix = "Run `pip install -U --no-deps megatron-core`."
        return [problem("megatron-core", f"{number}, but vcrd needs 0.16 or newer", fix)]
    failure = import_failure("megatron.core")
    if failure and failure.culprit:
        text = f"{number}; it cannot be imported because {failure.culprit} cannot, see its line"
        return [unchecked("megatron-core", text)]
    if failure:
        # With its dependencies, pip could replace the torch of an image.
        fix = "Reinstall it in this environment: `pip install --force-reinstall --no-deps megatron-core`."
        return [problem("megatron-core", f"{number} cannot be imported: {failure.text}", fix)]
    training = "with" if is_installed("megatron.training") else "without"
    return [ok("megatron-core", f"{number}, {training} megatron.training", _SAME_VERSION)]


def psutil(job: Job) -> list[Finding]:
    """Megatron-Core does not list it as a dependency, and fails without it at the first checkpoint."""
    if find_spec("megatron") is None or find_spec("psutil") is not None:
        return []
    text = "not installed; without it Megatron-Core cannot save a checkpoint in the torch_dist format"
    return [problem("psutil", text, "Run `pip install psutil`.")]


def transformer_engine(job: Job) -> list[Finding]:
    if find_spec(_ENGINE) is None:
        text = "not installed: no FP8, context parallelism or sequence parallelism"
        return [info("transformer engine", text, _SAME_VERSION)]
    number = version_of("transformer_engine", "transformer-engine") or "a checkout"
    import torch

    gpu = torch.cuda.is_available()
    failure = import_failure("transformer_engine.pytorch" if gpu else "megatron.core")
    if failure and (gpu or failure.culprit == _ENGINE):
        fix = "Install it for this torch: `pip install --no-build-isolation transformer_engine[pytorch]`."
        return [problem("transformer engine", f"{number} cannot be imported: {failure.text}", fix)]
    if not gpu:
        return [unchecked("transformer engine", f"{number}; whether it works can only be tested on a GPU")]
    return [ok("transformer engine", number, _SAME_VERSION)]


def apex(job: Job) -> list[Finding]:
    """The package apex on PyPI is a toolkit for Pyramid web sites. The apex of NVIDIA is not on PyPI."""
    here = find_spec(_APEX)
    try:
        known = distribution(_APEX).metadata
    except PackageNotFoundError:
        known = None
    if here is None and known is None:
        return [info("apex", "not installed; Megatron uses the norms and optimizers of torch", _SAME_VERSION)]
    folders = [Path(folder) for folder in (here.submodule_search_locations if here else None) or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return [_wrong_apex(known, folders)]
    if find_spec("amp_C") is None:
        return [
            problem(
                "apex",
                "NVIDIA's apex is built without its CUDA extensions, so its optimizers fail",
                "Build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, see its README, or run `pip uninstall apex`.",
            )
        ]
    failure = import_failure("megatron.core")
    if failure and failure.culprit == _APEX:
        fix = "Rebuild it for this torch, or run `pip uninstall apex`; Megatron works without it."
        return [problem("apex", f"it cannot be imported: {failure.text}", fix)]
    return [ok("apex", f"NVIDIA's {known['Version'] if known else ''}".strip(), _SAME_VERSION)]


def _wrong_apex(known, folders: list[Path]) -> Finding:
    if known is None:  # for example a checkout of NVIDIA/apex in the current folder
        place = folders[0] if folders else "a file"
        return problem(
            "apex",
            f"Python imports {place} as apex, which has no apex.optimizers",
            "Rename that folder, or start the run in another folder.",
        )
    return problem(
        "apex",
        f"apex {known['Version']} from PyPI is another project ({known.get('Summary') or 'without optimizers'})",
        "Run `pip uninstall apex`. Megatron works without it; build NVIDIA's from github.com/NVIDIA/apex if needed.",
    )


def rich(job: Job) -> list[Finding]:
    if find_spec("rich") is not None:
        return []
    return [info("rich", "not installed, so this table has no colours; run `pip install rich`")]


def version_of(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_installed(module: str) -> bool:
    """Whether the module is installed. To find it, Python imports its parent packages, which may fail."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
    except Exception:  # a parent package fails to load; importing the module will say why
        return True


CHECKS = (versions, torch_gpus, megatron_core, psutil, transformer_engine, apex, rich)
