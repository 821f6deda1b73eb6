"""Whether the GPUs of a node are joined as they should be."""

from __future__ import annotations

import ctypes
import re
from typing import Any

from vcrd.doctor.findings import Finding, fact, fault, ok

# Boards that are always soldered to their links. Others have them where somebody has put a bridge on.
_SOLDERED = re.compile(r"SXM|HBM3|\bH20\b|H200(?! NVL)|B200|B300")
_MOST = 18  # links that NVML knows of, where it does not say
_FABRIC_DONE = 3


def check(gpus: list[Any]) -> list[Finding]:
    """gpus: those of one node, see `device.Gpu`."""
    states = {gpu.name: _states(gpu) for gpu in gpus}
    if not any(states.values()):
        return [fact("nvlink", "these GPUs have none")]
    up = {name: sum(links) for name, links in states.items()}
    most, found = max(up.values()), []
    for gpu in gpus:
        links = states[gpu.name]
        soldered = _SOLDERED.search(str(gpu.ask("nvmlDeviceGetName")))
        if (
            up[gpu.name] < most
            or (soldered and 0 < up[gpu.name] < len(links))
            or (soldered and len(gpus) > 1 and not up[gpu.name])
        ):
            down = ", ".join(str(number) for number, state in enumerate(links) if not state)
            found.append(
                fault(
                    "nvlink",
                    f"{gpu.name}: {up[gpu.name]} of {max(most, len(links))} links are up (down: {down or '-'})",
                    "Take the node out of the job and have its links looked at (`nvidia-smi nvlink -s`).",
                )
            )
    found += _fabric(gpus)
    if found:
        return found
    if not most:
        return [fact("nvlink", "no link is up, so that GPUs talk over PCIe")]
    return [
        ok(
            "nvlink",
            f"{most} links of each GPU are up",
            "Use nodes whose GPUs have the same number of links.",
        )
    ]


def _states(gpu: Any) -> list[bool]:
    """Of each link that the GPU has."""
    numbers = range(getattr(gpu.nvml, "NVML_NVLINK_MAX_LINKS", _MOST))
    states = [gpu.ask("nvmlDeviceGetNvLinkState", number) for number in numbers]
    return [bool(state) for state in states if state is not None]


def _fabric(gpus: list[Any]) -> list[Finding]:
    """NVSwitches need a service on the node, without which CUDA does not start."""
    for gpu in gpus:
        nvml = gpu.nvml
        if not hasattr(nvml, "c_nvmlGpuFabricInfo_t"):
            return []
        info = nvml.c_nvmlGpuFabricInfo_t()
        if gpu.ask("nvmlDeviceGetGpuFabricInfo", ctypes.byref(info)) is None or info.state in (
            0,
            _FABRIC_DONE,
        ):
            continue
        return [
            fault(
                "nvlink",
                f"{gpu.name} has not joined the fabric of the NVSwitches",
                "Start the fabric manager of the driver's version (`systemctl start nvidia-fabricmanager`).",
            )
        ]
    return []
