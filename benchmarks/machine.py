"""Describes the machine of a measurement, for its record."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vcrd

PACKAGES = ("torch", "triton", "megatron-core", "nvidia-modelopt", "liger-kernel")


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def versions() -> dict[str, str | None]:
    """Versions of everything that a measurement on a GPU depends on; None for missing packages."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in (*PACKAGES, "transformer-engine", "pytest", "pytest-xdist"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {"vcrd": vcrd.__version__, **found}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(text.split(":", 1)[1].strip() for text in lines if text.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_facts() -> dict:
    """The GPU, its driver and clocks, the host and its installed packages."""
    found = torch.cuda.get_device_properties(0)
    facts = {
        "device": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "host": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": [installed(name) for name in PACKAGES],
        "date": date.today().isoformat(),
    }
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return {**facts, **dict(zip(fields.split(","), answer.strip().split(", "), strict=True))}
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {**facts, "driver_version": f"unknown: {error}"}
