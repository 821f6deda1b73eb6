"""The driver and the GPUs of this node, read through NVML. Nothing here opens a CUDA context.

Not every GPU supports every query, and a container may forbid some. A query that NVML refuses is skipped.
"""

from __future__ import annotations

import ctypes
import glob
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vcrd.doctor.checks import Job
from vcrd.doctor.findings import Finding, first_line, info, ok, problem, unchecked

# The oldest driver for all minor versions of a CUDA major version, from the CUDA release notes.
_OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}
_SAME_GPUS = "Use nodes with the same number and model of GPUs, or say with --teacher-gpu that they differ."
_MOST_IDLE_MEMORY = 1 << 30  # bytes in use without a process; a driver needs less for itself
_NAME = "\0"  # placeholder for the names of GPUs
_THROTTLING = {
    "nvmlClocksEventReasonHwThermalSlowdown": "it is too hot",
    "nvmlClocksEventReasonSwThermalSlowdown": "it is too hot",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "the power supply requests it",
    "nvmlClocksEventReasonHwSlowdown": "its hardware requests it",
}
# Boards that always have NVLink. On other boards a bridge may connect GPUs.
_ALWAYS_NVLINK = re.compile(r"SXM|HBM3|\bH20\b|H200(?! NVL)|B200|B300")
_MOST_LINKS = 18  # if NVML does not define the largest number
_FABRIC_NOT_SUPPORTED, _FABRIC_COMPLETED = 0, 3  # NVML_GPU_FABRIC_STATE_*


@dataclass(frozen=True)
class Device:
    """One GPU of this node, as NVML knows it."""

    name: str
    nvml: Any
    handle: Any

    def query(self, function: str, *arguments: Any) -> Any:
        """Calls an NVML function on this GPU; None if NVML does not have it or refuses it."""
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except (AttributeError, self.nvml.NVMLError):
            return None


def driver_and_gpus(job: Job) -> list[Finding]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        text = "not installed, so the driver and the GPUs cannot be checked"
        return [problem("nvidia-ml-py", text, "Run `pip install nvidia-ml-py`.")]
    except Exception as error:  # another package has this name
        nvml, text = None, f"the package pynvml cannot be imported: {first_line(error)}"
    else:
        text = "the installed package pynvml is not that of NVIDIA"
    if not hasattr(nvml, "nvmlInit"):
        fix = "Run `pip uninstall pynvml`, then `pip install --force-reinstall nvidia-ml-py`."
        return [problem("nvidia-ml-py", text, fix)]
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [_no_driver(nvml, error, job), *_missing(job, 0)]
    try:
        return _check_gpus(job, nvml)
    finally:
        nvml.nvmlShutdown()


def _no_driver(nvml: Any, error: Exception, job: Job) -> Finding:
    code = getattr(error, "value", None)
    if code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return problem(
            "driver",
            "its library and its kernel module have different versions",
            "Reboot the node: the driver was replaced while it was running.",
        )
    if glob.glob("/dev/nvidia[0-9]*"):
        return problem(
            "driver",
            f"there are GPUs (/dev/nvidia*), but NVML cannot be initialised: {error}",
            "Give the container access to the driver (docker --gpus all, enroot with NVIDIA_VISIBLE_DEVICES=all).",
        )
    if code == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return problem(
            "driver",
            "installed, but not loaded",
            "Load it with `modprobe nvidia`. Reinstall it if that fails.",
        )
    return unchecked("driver", "no NVIDIA driver here, so no GPU was checked")


def _missing(job: Job, count: int) -> list[Finding]:
    """count: GPUs that answer."""
    expected = max(job.options.gpus, _number(job.environment.get("SLURM_GPUS_ON_NODE")))
    if not job.first_on_node or count >= expected:
        return []
    return [
        problem(
            "gpu count",
            f"{count} GPUs found, {expected} expected",
            "Take the node out of the job (`nvidia-smi -L` and `dmesg | grep -i xid` show the lost GPU), or give "
            "fewer --gpus.",
        )
    ]


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0


def _check_gpus(job: Job, nvml: Any) -> list[Finding]:
    gpus, lost = [], []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(Device(f"GPU {index}", nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            lost.append(
                problem(
                    "gpu count",
                    f"GPU {index} does not answer: {error}",
                    "Take the node out of the job and reset or replace that GPU (`dmesg | grep -i xid` shows why).",
                )
            )
    found = [_driver(nvml), *_missing(job, len(gpus)), *lost]
    if not gpus:
        return [*found, info("gpus", "none", _SAME_GPUS)]
    found.append(_models(gpus, job))
    for each in (_memory, _mode, _mig, _errors, _clocks, _power):
        found += _one_line(each, gpus, job)
    return [*found, *_nvlink(gpus)]


def _driver(nvml: Any) -> Finding:
    import torch

    version, newest = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
    cuda = f"{newest // 1000}.{newest % 1000 // 10}"
    built = torch.version.cuda
    same_driver = "Install the same driver version on all nodes."
    if built is None:
        return info("driver", f"{version}, for CUDA up to {cuda}", same_driver)
    major = int(built.split(".")[0])
    if newest // 1000 < major:
        oldest = _OLDEST_DRIVER.get(major)
        return problem(
            "driver",
            f"{version}, for CUDA up to {cuda}; torch {torch.__version__} is built with CUDA {built}",
            f"Install {f'driver {oldest} or newer' if oldest else 'a newer driver'}, "
            f"or a torch that is built with CUDA {cuda} or older.",
        )
    return ok("driver", f"{version}, for CUDA up to {cuda}; torch is built with CUDA {built}", same_driver)


def _models(gpus: list[Device], job: Job) -> Finding:
    names = [str(gpu.query("nvmlDeviceGetName")) for gpu in gpus]
    models = " and ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if len(set(names)) > 1:
        return problem(
            "gpus",
            models,
            "Leave the different ones out with CUDA_VISIBLE_DEVICES: the slowest GPU slows down all others.",
        )
    run = job.options.scenario
    mixed = run is not None and run.student_gpu != run.teacher_gpu
    return ok("gpus", models, "" if mixed else _SAME_GPUS)


def _one_line(each: Callable[[Device, Job], Finding | None], gpus: list[Device], job: Job) -> list[Finding]:
    """One line for all GPUs with the same problem, and one for all GPUs without a problem."""
    found = [(gpu, finding) for gpu in gpus if (finding := each(gpu, job))]
    good = [finding for _, finding in found if not finding.fix]
    same: dict[Finding, list[str]] = {}
    for gpu, finding in found:
        if finding.fix:
            unnamed = replace(finding, found=finding.found.replace(gpu.name, _NAME, 1))
            same.setdefault(unnamed, []).append(gpu.name)
    wrong = [replace(f, found=f.found.replace(_NAME, ", ".join(names))) for f, names in same.items()]
    if good:
        texts = dict.fromkeys(finding.found for finding in good)
        first = good[0]
        text = first.found if len(texts) == 1 else f"{first.found} (the first of {len(good)})"
        wrong.append(Finding(first.name, first.status, text))
    return wrong


def _memory(gpu: Device, job: Job) -> Finding | None:
    # The second version of the call does not count the memory that the driver reserves.
    second = [gpu.nvml.nvmlMemory_v2] if hasattr(gpu.nvml, "nvmlMemory_v2") else []
    memory = gpu.query("nvmlDeviceGetMemoryInfo", *second) or gpu.query("nvmlDeviceGetMemoryInfo")
    if memory is None:
        return None
    total, used = f"{memory.total / 1e9:.1f} GB", f"{memory.used / 1e9:.1f}"
    if job.options.during_run:
        return ok("gpu memory", f"{used} of {total} in use, during a run")
    processes = gpu.query("nvmlDeviceGetComputeRunningProcesses") or ()
    if processes or memory.used > _MOST_IDLE_MEMORY:
        who = ", ".join(_process(gpu, process) for process in processes)
        return problem(
            "gpu memory",
            f"{gpu.name}: {used} of {total} in use by {who or 'processes that are not visible from here'}",
            "End those processes, or leave that GPU out with CUDA_VISIBLE_DEVICES.",
        )
    return ok("gpu memory", f"{total} on each GPU, none in use")


def _process(gpu: Device, process: Any) -> str:
    try:
        name = gpu.nvml.nvmlSystemGetProcessName(process.pid)
    except (AttributeError, gpu.nvml.NVMLError):
        return f"process {process.pid}"
    name = name.decode(errors="replace") if isinstance(name, bytes) else name
    return f"process {process.pid} ({name.split()[0].rsplit('/', 1)[-1] if name.split() else '?'})"


def _mode(gpu: Device, job: Job) -> Finding | None:
    mode = gpu.query("nvmlDeviceGetComputeMode")
    if mode is not None and mode == gpu.nvml.NVML_COMPUTEMODE_PROHIBITED:
        return problem(
            "gpu mode",
            f"{gpu.name}: the compute mode is PROHIBITED",
            "Allow it to compute with `nvidia-smi -c DEFAULT`.",
        )
    return None


def _mig(gpu: Device, job: Job) -> Finding | None:
    mode = gpu.query("nvmlDeviceGetMigMode")
    if not mode or not mode[0]:
        return None
    if job.world.size > 1:
        return problem(
            "gpu mode",
            f"{gpu.name}: partitioned (MIG), and NCCL cannot connect partitions",
            "Give each process a whole GPU: run `nvidia-smi -mig 0` if no one else uses its partitions.",
        )
    return info("gpu mode", f"{gpu.name}: partitioned (MIG); a process can use one partition")


def _errors(gpu: Device, job: Job) -> Finding | None:
    nvml = gpu.nvml
    mode = gpu.query("nvmlDeviceGetEccMode")
    count = gpu.query(
        "nvmlDeviceGetTotalEccErrors",
        getattr(nvml, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1),
        getattr(nvml, "NVML_VOLATILE_ECC", 0),
    )
    rows = gpu.query("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
    fix = "Take the node out of the job and reset that GPU (`nvidia-smi -r`). Have it replaced if the errors come back."
    if count:
        return problem(
            "gpu errors",
            f"{gpu.name}: {count} uncorrected memory errors (ECC) since the driver was loaded",
            fix,
        )
    if rows and (rows[2] or rows[3]):
        what = "could not be remapped" if rows[3] else "will be remapped at the next reset"
        return problem("gpu errors", f"{gpu.name}: damaged memory rows {what}", fix)
    if mode is None:
        return None
    return ok(
        "gpu errors", "none since the driver was loaded" if mode[0] else "none known because ECC is disabled"
    )


def _clocks(gpu: Device, job: Job) -> Finding | None:
    nvml = gpu.nvml
    reasons = gpu.query("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = gpu.query("nvmlDeviceGetCurrentClocksThrottleReasons")
    most = gpu.query("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM)
    if most is None:
        return None
    for name, why in _THROTTLING.items():
        if (reasons or 0) & getattr(nvml, name, 0):
            now = gpu.query("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)
            return problem(
                "gpu clocks",
                f"{gpu.name}: throttled to {now} of {most} MHz because {why}",
                "Take the node out of the job and check its cooling and power (`nvidia-smi -q -d PERFORMANCE`).",
            )
    chosen = gpu.query("nvmlDeviceGetApplicationsClock", nvml.NVML_CLOCK_SM)
    usual = gpu.query("nvmlDeviceGetDefaultApplicationsClock", nvml.NVML_CLOCK_SM)
    if chosen and usual and chosen < usual:
        return problem(
            "gpu clocks",
            f"{gpu.name}: the clock is set to {chosen} MHz, below its default of {usual}",
            "Reset the clocks with `nvidia-smi -rac`.",
        )
    return ok("gpu clocks", f"up to {most} MHz, not throttled while idle")


def _power(gpu: Device, job: Job) -> Finding | None:
    limit = gpu.query("nvmlDeviceGetEnforcedPowerLimit")
    usual = gpu.query("nvmlDeviceGetPowerManagementDefaultLimit")
    if not limit or not usual:
        return None
    persistence = gpu.query("nvmlDeviceGetPersistenceMode")
    text = f"limit {limit // 1000} of {usual // 1000} W"
    if not persistence:
        text += "; persistence mode is off (`nvidia-smi -pm 1`), so each start takes seconds longer"
    return (ok if persistence and limit >= usual else info)("gpu power", text)


def _nvlink(gpus: list[Device]) -> list[Finding]:
    states = {gpu.name: _link_states(gpu) for gpu in gpus}
    if not any(states.values()):
        return [info("nvlink", "these GPUs have no NVLink")]
    up = {name: sum(links) for name, links in states.items()}
    most, found = max(up.values()), []
    for gpu in gpus:
        links, count = states[gpu.name], up[gpu.name]
        always = _ALWAYS_NVLINK.search(str(gpu.query("nvmlDeviceGetName")))
        some_down = always and 0 < count < len(links)
        all_down = always and len(gpus) > 1 and not count
        if count < most or some_down or all_down:
            down = ", ".join(str(number) for number, state in enumerate(links) if not state)
            text = f"{gpu.name}: {count} of {max(most, len(links))} links are up (down: {down or '-'})"
            fix = "Take the node out of the job and have its NVLink repaired (`nvidia-smi nvlink -s` lists the links)."
            found.append(problem("nvlink", text, fix))
    found += _fabric(gpus)
    if found:
        return found
    if not most:
        return [info("nvlink", "no link is up, so GPUs communicate over PCIe")]
    fix_if_different = "Use nodes whose GPUs have the same number of links."
    return [ok("nvlink", f"{most} links of each GPU are up", fix_if_different)]


def _link_states(gpu: Device) -> list[bool]:
    """Whether each link of the GPU is up."""
    numbers = range(getattr(gpu.nvml, "NVML_NVLINK_MAX_LINKS", _MOST_LINKS))
    states = [gpu.query("nvmlDeviceGetNvLinkState", number) for number in numbers]
    return [bool(state) for state in states if state is not None]


def _fabric(gpus: list[Device]) -> list[Finding]:
    """CUDA starts on GPUs behind NVSwitches only after the fabric manager of the node has registered them."""
    for gpu in gpus:
        if not hasattr(gpu.nvml, "c_nvmlGpuFabricInfo_t"):
            return []
        fabric = gpu.nvml.c_nvmlGpuFabricInfo_t()
        if gpu.query("nvmlDeviceGetGpuFabricInfo", ctypes.byref(fabric)) is None:
            continue
        if fabric.state not in (_FABRIC_NOT_SUPPORTED, _FABRIC_COMPLETED):
            text = f"{gpu.name}: has not joined the NVSwitch fabric"
            fix = "Start the fabric manager of the same version as the driver (`systemctl start nvidia-fabricmanager`)."
            return [problem("nvlink", text, fix)]
    return []


CHECKS = (driver_and_gpus,)
