"""What must be loaded to be reported: NVML, torch and the extension. `versions` runs this in a child process.

Each part prints one JSON object as soon as it is known, because loading the next part may crash or hang the process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vcrd import build_record
from vcrd.doctor.findings import first_line

_DRIVER = Path("/proc/driver/nvidia")


def main() -> None:
    report = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # imports may print
    for part in (gpus, torch_versions, extension):
        print(json.dumps(part()), file=report, flush=True)
    report.flush()
    os._exit(0)  # the end of an interpreter with broken libraries may crash


def gpus() -> dict[str, str]:
    try:
        nvml = importlib.import_module("pynvml")
    except Exception:  # not installed, or another package has this name
        return _gpus_without_nvml()
    try:
        nvml.nvmlInit()
        names = [_name(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        newest = nvml.nvmlSystemGetCudaDriverVersion()
        driver = f"{nvml.nvmlSystemGetDriverVersion()}, for CUDA up to {newest // 1000}.{newest % 1000 // 10}"
    except Exception as error:
        text = f"none (NVML: {first_line(error)})"
        return {"GPU": text, "driver": text}
    return {"GPU": _counted(names), "driver": driver}


def _name(nvml: Any, index: int) -> str:
    try:
        return nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError as error:
        return f"one that does not answer ({first_line(error)})"


def _gpus_without_nvml() -> dict[str, str]:
    """The Linux driver describes itself in files."""
    try:
        number = re.search(r"\d+\.[\d.]+", (_DRIVER / "version").read_text())
        texts = [path.read_text() for path in sorted(_DRIVER.glob("gpus/*/information"))]
    except OSError:
        return {"GPU": "none", "driver": "none"}
    names = [found[1] for text in texts if (found := re.search(r"^Model:\s*(.+?)\s*$", text, re.M))]
    return {"GPU": _counted(names), "driver": number[0] if number else "of an unknown version"}


def _counted(names: list[str]) -> str:
    return " and ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def torch_versions() -> dict[str, str]:
    if find_spec("torch") is None:
        return dict.fromkeys(("torch", "CUDA of torch", "NCCL of torch"), "not installed")
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        return {"torch": f"cannot be imported: {first_line(error)}"}
    if torch.version.cuda is None:
        absent = "none: this torch is built without CUDA"
        return {"torch": torch.__version__, "CUDA of torch": absent, "NCCL of torch": absent}
    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:
        nccl = f"not known: {first_line(error)}"
    return {"torch": torch.__version__, "CUDA of torch": torch.version.cuda, "NCCL of torch": nccl}


def extension() -> dict[str, str]:
    if "torch" not in sys.modules:
        return {"extension": "not loaded, because torch cannot be"}
    try:
        built = importlib.import_module("vcrd.loss.ops")._C
    except Exception as error:
        return {"extension": f"does not load: {first_line(error)}"}
    cuda = build_record.read().get("cuda")
    kernels = f"CUDA kernels for {built.cuda_architectures}" if built.with_cuda else "CPU kernels only"
    kernels += f", built with CUDA {cuda}" if cuda else ""
    return {"extension": f"loads; built with torch {built.torch_version}, {kernels}"}
