"""A fake of NVML with the functions that the doctor uses. Problems are set as attributes."""

from __future__ import annotations

import types
from dataclasses import dataclass, field


@dataclass
class FakeGpu:
    """In NVML's own units. links: state of each NVLink, empty for a GPU that has none. processes: pid and name."""

    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 85_520_809_984
    used: int = 400_000_000
    processes: dict[int, str] = field(default_factory=dict)
    links: list[int] = field(default_factory=lambda: [1] * 18)
    reasons: int = 1  # idle
    ecc_errors: int = 0
    remapped: tuple[int, int, int, int] = (0, 0, 0, 0)
    mig: int = 0
    mode: int = 0
    clock: int = 1980
    application_clock: int = 1980
    power: int = 700_000
    lost: bool = False


class NVMLError(Exception):
    def __init__(self, value: int, text: str = "") -> None:
        super().__init__(text or f"NVML error {value}")
        self.value = value


class FakeNvml(types.ModuleType):
    NVMLError = NVMLError
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
    NVML_CLOCK_SM = 1
    NVML_COMPUTEMODE_PROHIBITED = 2
    nvmlMemory_v2 = 0x2000028
    nvmlClocksEventReasonHwSlowdown = 8
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80
    NVML_NVLINK_MAX_LINKS = 36

    def __init__(self, *gpus: FakeGpu, cuda: int = 13000, driver: str = "580.65.06", starts: int = 0) -> None:
        super().__init__("pynvml")
        self.gpus, self.cuda, self.driver, self.starts = list(gpus), cuda, driver, starts
        self.open = 0

    def nvmlInit(self):
        if self.starts:
            raise NVMLError(self.starts)
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        if self.gpus[index].lost:
            raise NVMLError(15, "GPU is lost")
        return self.gpus[index]

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self):
        return self.cuda

    def nvmlDeviceGetName(self, gpu):
        return gpu.name

    def nvmlDeviceGetMemoryInfo(self, gpu, version=None):
        return types.SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in gpu.processes]

    def nvmlSystemGetProcessName(self, pid):
        return next(gpu.processes[pid] for gpu in self.gpus if pid in gpu.processes)

    def nvmlDeviceGetComputeMode(self, gpu):
        return gpu.mode

    def nvmlDeviceGetMigMode(self, gpu):
        return [gpu.mig, gpu.mig]

    def nvmlDeviceGetEccMode(self, gpu):
        return [1, 1]

    def nvmlDeviceGetTotalEccErrors(self, gpu, kind, counter):
        return gpu.ecc_errors

    def nvmlDeviceGetRemappedRows(self, gpu):
        return gpu.remapped

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return gpu.reasons

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return 1980

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return gpu.clock

    def nvmlDeviceGetApplicationsClock(self, gpu, kind):
        return gpu.application_clock

    def nvmlDeviceGetDefaultApplicationsClock(self, gpu, kind):
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return gpu.power

    def nvmlDeviceGetPowerManagementDefaultLimit(self, gpu):
        return 700_000

    def nvmlDeviceGetPersistenceMode(self, gpu):
        return 1

    def nvmlDeviceGetNvLinkState(self, gpu, link):
        if link >= len(gpu.links):
            raise NVMLError(2, "Invalid Argument")
        return gpu.links[link]
