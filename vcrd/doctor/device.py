"""The driver and the GPUs of this node, as NVIDIA's management library knows them. Nothing here opens a CUDA context.

A GPU does not know everything, and a container may not be let near everything: what NVML refuses to say is left out.
"""

from __future__ import annotations

import glob
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vcrd.doctor import nvlink
from vcrd.doctor.findings import Finding, fact, fault, first_line, ok, unchecked
from vcrd.doctor.job import Job

# CUDA release notes: the driver from which on every minor version of a CUDA runs.
_LEAST_DRIVER = {11: "450", 12: "525", 13: "580"}
_ALIKE = (
    "Give every node the same number and kind of GPUs, or say with --teacher-gpu that they are to differ."
)
_TAKEN = 1 << 30  # bytes in use that nobody answers for: more than a driver keeps for itself
_SOME = "\0"  # stands for the names of GPUs
_SLOW = {
    "nvmlClocksEventReasonHwThermalSlowdown": "it is too hot",
    "nvmlClocksEventReasonSwThermalSlowdown": "it is too hot",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "the power supply asks for it",
    "nvmlClocksEventReasonHwSlowdown": "its hardware asks for it",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU of NVML's. ask: a function of NVML about it by its name, with further arguments; None where refused."""

    name: str
    nvml: Any
    handle: Any

    def ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except (AttributeError, self.nvml.NVMLError):
            return None


def check(job: Job) -> list[Finding]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        text = "not installed, so that driver and GPUs cannot be looked at"
        return [fault("nvidia-ml-py", text, "Run `pip install nvidia-ml-py`.")]
    except Exception as error:  # of another package of this name
        nvml, text = None, f"the package pynvml cannot be imported: {first_line(error)}"
    else:
        text = "the package pynvml here is another one"
    if not hasattr(nvml, "nvmlInit"):
        fix = "Run `pip uninstall pynvml`, and `pip install --force-reinstall nvidia-ml-py`."
        return [fault("nvidia-ml-py", text, fix)]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [_no_driver(nvml, error, job), *_missing(job, 0)]
    try:
        return _look(job, nvml)
    finally:
        nvml.nvmlShutdown()


def _no_driver(nvml: Any, error: Exception, job: Job) -> Finding:
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return fault(
            "driver",
            "its library and its kernel module are of different versions",
            "Reboot the node, since the driver was replaced while it was running.",
        )
    if glob.glob("/dev/nvidia[0-9]*"):
        return fault(
            "driver",
            f"there are GPUs (/dev/nvidia*), but NVML does not start: {error}",
            "Start the container with the driver in it (docker --gpus all, enroot with NVIDIA_VISIBLE_DEVICES=all).",
        )
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return fault(
            "driver",
            "installed, but not loaded",
            "Load it with `modprobe nvidia`, or install it anew if that fails.",
        )
    return unchecked(
        "driver", "no NVIDIA driver here, so nothing was checked of GPUs, their memory, links and clocks"
    )


def _missing(job: Job, count: int) -> list[Finding]:
    expected = max(job.gpus, _number(job.environment.get("SLURM_GPUS_ON_NODE")))
    if not job.first_on_node or count >= expected:
        return []
    return [
        fault(
            "gpu count",
            f"{count} GPUs are seen and {expected} expected",
            "Take the node out of the job (`nvidia-smi -L` and `dmesg | grep -i xid` say what it has lost), or ask for "
            "fewer with --gpus.",
        )
    ]


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


def _look(job: Job, nvml: Any) -> list[Finding]:
    gpus, lost = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(Gpu(f"GPU {index}", nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            lost.append(
                fault(
                    "gpu count",
                    f"GPU {index} does not answer: {error}",
                    "Take the node out of the job and reset or replace that GPU (`dmesg | grep -i xid` says why).",
                )
            )
    found = [_driver(nvml), *_missing(job, len(gpus)), *lost]
    if not gpus:
        return [*found, fact("gpus", "none", _ALIKE)]
    found.append(_kinds(gpus, job))
    for each in (_memory, _mode, _mig, _errors, _clocks, _power):
        found += _summed(each, gpus, job)
    return [*found, *nvlink.check(gpus)]


def _driver(nvml: Any) -> Finding:
    import torch

    version, newest = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
    cuda = f"{newest // 1000}.{newest % 1000 // 10}"
    built = torch.version.cuda
    alike = "Install one driver version on all nodes."
    if built is None:
        return fact("driver", f"{version}, for CUDA up to {cuda}", alike)
    major = int(built.split(".")[0])
    if newest // 1000 < major:
        least = _LEAST_DRIVER.get(major)
        return fault(
            "driver",
            f"{version}, for CUDA up to {cuda}; torch {torch.__version__} is built with CUDA {built}",
            f"Install {f'driver {least} or newer' if least else 'a newer driver'}, "
            f"or a torch that is built with CUDA {cuda} or older.",
        )
    return ok("driver", f"{version}, for CUDA up to {cuda}; torch's is {built}", alike)


def _kinds(gpus: list[Gpu], job: Job) -> Finding:
    names = [str(gpu.ask("nvmlDeviceGetName")) for gpu in gpus]
    kinds = " and ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if len(set(names)) > 1:
        return fault(
            "gpus",
            kinds,
            "Leave the odd ones out with CUDA_VISIBLE_DEVICES, since the slowest sets everybody's pace.",
        )
    mixed = job.scenario is not None and job.scenario.student_gpu != job.scenario.teacher_gpu
    return ok("gpus", kinds, "" if mixed else _ALIKE)


def _summed(each: Callable[[Gpu, Job], Finding | None], gpus: list[Gpu], job: Job) -> list[Finding]:
    """One line for all GPUs that have the same fault, and one for all that have none."""
    found = [(gpu, finding) for gpu in gpus if (finding := each(gpu, job))]
    good = [finding for _, finding in found if not finding.fix]
    alike: dict[Finding, list[str]] = {}
    for gpu, finding in found:
        if finding.fix:
            without = replace(finding, found=finding.found.replace(gpu.name, _SOME, 1))
            alike.setdefault(without, []).append(gpu.name)
    wrong = [replace(f, found=f.found.replace(_SOME, ", ".join(names))) for f, names in alike.items()]
    if good:
        texts = dict.fromkeys(finding.found for finding in good)
        first = good[0]
        counted = first.found if len(texts) == 1 else f"{first.found} (the first of {len(good)})"
        wrong.append(Finding(first.name, first.status, counted))
    return wrong


def _memory(gpu: Gpu, job: Job) -> Finding | None:
    # The second version tells apart what the driver keeps.
    second = [gpu.nvml.nvmlMemory_v2] if hasattr(gpu.nvml, "nvmlMemory_v2") else []
    info = gpu.ask("nvmlDeviceGetMemoryInfo", *second) or gpu.ask("nvmlDeviceGetMemoryInfo")
    if info is None:
        return None
    total, used = f"{info.total / 1e9:.1f} GB", f"{info.used / 1e9:.1f}"
    if job.during_run:
        return ok("gpu memory", f"{used} of {total} taken, during a run")
    processes = gpu.ask("nvmlDeviceGetComputeRunningProcesses") or ()
    if processes or info.used > _TAKEN:
        who = ", ".join(_process(gpu, process) for process in processes)
        return fault(
            "gpu memory",
            f"{gpu.name}: {used} of {total} taken by {who or 'processes that are not seen from here'}",
            "End those processes, or leave that GPU out with CUDA_VISIBLE_DEVICES.",
        )
    return ok("gpu memory", f"{total} on each GPU, taken by nobody")


def _process(gpu: Gpu, process: Any) -> str:
    try:
        name = gpu.nvml.nvmlSystemGetProcessName(process.pid)
    except (AttributeError, gpu.nvml.NVMLError):
        return f"process {process.pid}"
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    return f"process {process.pid} ({name.split()[0].rsplit('/', 1)[-1] if name.split() else '?'})"


def _mode(gpu: Gpu, job: Job) -> Finding | None:
    mode = gpu.ask("nvmlDeviceGetComputeMode")
    if mode is not None and mode == gpu.nvml.NVML_COMPUTEMODE_PROHIBITED:
        return fault(
            "gpu mode",
            f"{gpu.name}: its compute mode is PROHIBITED",
            "Allow it to compute with `nvidia-smi -c DEFAULT`.",
        )
    return None


def _mig(gpu: Gpu, job: Job) -> Finding | None:
    mode = gpu.ask("nvmlDeviceGetMigMode")
    if not mode or not mode[0]:
        return None
    if job.world.size > 1:
        return fault(
            "gpu mode",
            f"{gpu.name} is cut into parts (MIG), and NCCL does not join parts",
            "Give each process a whole GPU: `nvidia-smi -mig 0`, where nobody else uses its parts.",
        )
    return fact("gpu mode", f"{gpu.name} is cut into parts (MIG), of which one process sees one")


def _errors(gpu: Gpu, job: Job) -> Finding | None:
    nvml = gpu.nvml
    mode = gpu.ask("nvmlDeviceGetEccMode")
    count = gpu.ask(
        "nvmlDeviceGetTotalEccErrors",
        getattr(nvml, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1),
        getattr(nvml, "NVML_VOLATILE_ECC", 0),
    )
    rows = gpu.ask("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
    fix = "Take the node out of the job and reset that GPU (`nvidia-smi -r`), or have it replaced if it comes back."
    if count:
        return fault(
            "gpu errors",
            f"{gpu.name}: {count} uncorrected memory errors (ECC) since the driver started",
            fix,
        )
    if rows and (rows[2] or rows[3]):
        what = "could not be replaced" if rows[3] else "wait to be replaced at the next reset"
        return fault("gpu errors", f"{gpu.name}: rows of its memory {what}", fix)
    if mode is None:
        return None
    return ok(
        "gpu errors", "none since the driver started" if mode[0] else "none known, since ECC is switched off"
    )


def _clocks(gpu: Gpu, job: Job) -> Finding | None:
    nvml = gpu.nvml
    reasons = gpu.ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = gpu.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    most = gpu.ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM)
    if most is None:
        return None
    for name, why in _SLOW.items():
        if (reasons or 0) & getattr(nvml, name, 0):
            now = gpu.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
            return fault(
                "gpu clocks",
                f"{gpu.name} is slowed down to {now} of {most} MHz, because {why}",
                "Take the node out of the job and look at its cooling and power (`nvidia-smi -q -d PERFORMANCE`).",
            )
    chosen = gpu.ask("nvmlDeviceGetApplicationsClock", nvml.NVML_CLOCK_SM)
    usual = gpu.ask("nvmlDeviceGetDefaultApplicationsClock", nvml.NVML_CLOCK_SM)
    if chosen and usual and chosen < usual:
        return fault(
            "gpu clocks",
            f"{gpu.name} is held at {chosen} MHz, where {usual} is its default",
            "Give it its clocks back with `nvidia-smi -rac`.",
        )
    return ok("gpu clocks", f"up to {most} MHz, not slowed down while idle")


def _power(gpu: Gpu, job: Job) -> Finding | None:
    limit, usual = (
        gpu.ask("nvmlDeviceGetEnforcedPowerLimit"),
        gpu.ask("nvmlDeviceGetPowerManagementDefaultLimit"),
    )
    if not limit or not usual:
        return None
    persistence = gpu.ask("nvmlDeviceGetPersistenceMode")
    kept = (
        ""
        if persistence
        else "; the driver is not kept loaded (`nvidia-smi -pm 1`), so a start takes seconds longer"
    )
    text = f"limit {limit // 1000} of {usual // 1000} W{kept}"
    return (fact if limit < usual or kept else ok)("gpu power", text)
