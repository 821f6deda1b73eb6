"""torch and the extension: whether they fit together, and whether they can be loaded at all."""

from __future__ import annotations

import importlib
import platform
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import vcrd
from vcrd.doctor import loading
from vcrd.doctor.findings import Finding, fact, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job
from vcrd.doctor.packages import ALIKE

_BUILD = "Build it with `pip install --no-build-isolation .` in the checkout"
_ARCHITECTURE = re.compile(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?")


def versions(job: Job) -> list[Finding]:
    import torch

    found = [
        fact("python", platform.python_version(), alike="Use one version of Python on all nodes."),
        ok("vcrd", vcrd.__version__, alike=ALIKE),
        ok("torch", f"{torch.__version__}, {_cuda_of(torch.version.cuda)}", alike=ALIKE),
    ]
    if torch.version.cuda is not None:
        try:
            found.append(ok("nccl", ".".join(map(str, torch.cuda.nccl.version())), alike=ALIKE))
        except (AttributeError, RuntimeError, TypeError) as error:
            found.append(fact("nccl", f"torch does not say its version: {first_line(error)}"))
    return found


def _cuda_of(built: str | None) -> str:
    return "without CUDA" if built is None else f"built with CUDA {built}"


def torch_gpus(job: Job) -> list[Finding]:
    """Whether torch reaches the GPUs that the driver has."""
    import torch

    loading.cannot_bear("vcrd.loss.ops", job.patience / 2)  # before anything here asks CUDA
    present = _driver_is_here()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old, for which there is a line
        reached = torch.cuda.is_available()
    if not reached:
        if not present:
            return [unchecked("torch gpus", "NVIDIA's driver shows none, see the line `driver`")]
        if torch.version.cuda is None:
            fix = "Install a torch with CUDA (pytorch.org has the command)."
            return [fault("torch gpus", "none: this torch is built without CUDA", fix)]
        fix = "Look at CUDA_VISIBLE_DEVICES and at the line `driver` of this table."
        return [fault("torch gpus", f"none: {_why_none()}", fix)]
    count = torch.cuda.device_count()
    if 1 < count < job.world.local_size:
        fix = "Start one process for each GPU, or look at CUDA_VISIBLE_DEVICES."
        return [fault("torch gpus", f"{count} for {job.world.local_size} processes on this node", fix)]
    found = []
    for capability in dict.fromkeys(torch.cuda.get_device_capability(i) for i in range(count)):
        if not runs_on(torch.cuda.get_arch_list(), capability):
            built = ", ".join(torch.cuda.get_arch_list())
            found.append(
                fault(
                    "torch gpus",
                    f"of compute capability {capability[0]}.{capability[1]}; torch is built for {built}",
                    "Install a torch that is built for this GPU (pytorch.org has the command).",
                )
            )
    return found or [ok("torch gpus", f"{count} in each process", alike="Give every process the same GPUs.")]


def _driver_is_here() -> bool:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # whatever keeps it from starting, `device` has a line for it
        return False
    count = nvml.nvmlDeviceGetCount()
    nvml.nvmlShutdown()
    return count > 0


def _why_none() -> str:
    import torch

    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return first_line(error)
    return "torch.cuda.is_available() is False"


def extension(job: Job) -> list[Finding]:
    """vcrd._C: whether it loads, what it was built against, and for which GPUs."""
    import torch

    if what := loading.cannot_bear("vcrd.loss.ops", job.patience / 2):
        text = f"whoever loads it {what}: its file is damaged, or made for another machine"
        return [fault("extension", text, f"{_BUILD} on this machine.")]
    try:
        built = importlib.import_module("vcrd.loss.ops")._C
    except ImportError as error:
        return [_unloadable(error)]
    found = []
    if built.torch_version != torch.__version__:
        text = f"built with torch {built.torch_version}, and this is {torch.__version__}"
        found.append(fault("extension", text, f"{_BUILD}, with this torch."))
    else:
        kernels = "CPU and CUDA kernels" if built.with_cuda else "CPU kernels only"
        threads = "" if built.threaded else ", one thread"
        text = f"built with this torch; {kernels}, CPU instructions {built.cpu_instruction_set}{threads}"
        found.append(ok("extension", text))
    return [*found, _architectures(built)]


def _unloadable(error: ImportError) -> Finding:
    import torch

    cause = str(error.__cause__ or error)
    if "undefined symbol" in cause or "symbol not found" in cause:
        text = f"it was built against another torch than {torch.__version__} (undefined symbol)"
    elif "cannot import name '_C'" in cause or "No module named 'vcrd._C'" in cause:
        folder = Path(vcrd.__file__).parent
        others = sorted(path.name for path in folder.glob("_C*.so"))
        text = "it is not built"
        if others:
            text = f"it is built for another Python ({', '.join(others)}), and this is {platform.python_version()}"
    else:
        text = f"it does not load: {first_line(error.__cause__ or error)}"
    return fault("extension", text, f"{_BUILD}, with this Python and this torch ({torch.__version__}).")


def _architectures(built: object) -> Finding:
    import torch

    listed = getattr(built, "cuda_architectures", "")  # an older build does not say
    if not torch.cuda.is_available():
        text = f"no GPU here to compare with the extension's {listed}" if listed else "no GPU here"
        return unchecked("architectures", text)
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    names = ", ".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    fix = f"{_BUILD} on this node, or with TORCH_CUDA_ARCH_LIST={names.replace(', ', ';')}."
    if not built.with_cuda:
        return fault("architectures", "the extension has no CUDA kernels, and there is a GPU", fix)
    if not all(map(_ARCHITECTURE.fullmatch, listed.split(";"))):  # "Hopper", or nothing
        return unchecked(
            "architectures",
            f"this build of the extension does not say its own by number: {listed or 'nothing'}",
        )
    if not all(runs_on(listed.split(";"), capability) for capability in capabilities):
        return fault("architectures", f"the extension is built for {listed}, the GPUs here are {names}", fix)
    return ok("architectures", f"the extension is built for {listed}, the GPUs here are {names}")


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these runs on a GPU: "9.0", "9.0a", "8.6+PTX", or as torch lists them, "sm_90a", "compute_120".

    Machine code runs on its own generation from its own minor number on; "a" on that GPU alone, "f" as without;
    PTX on everything later.
    """
    for text in architectures:
        match = _ARCHITECTURE.fullmatch(text)
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


CHECKS = (versions, torch_gpus, extension)
