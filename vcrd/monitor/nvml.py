"""Readings of one GPU through NVML: memory, utilisation, power, NVLink. Calls no CUDA."""

from __future__ import annotations

import importlib
from typing import Any

_ALL_LINKS = 0xFFFFFFFF  # the scope that sums a field over all links
_KIB = 1024


class NoGpu(Exception):
    """No GPU can be read. The message says why."""


class Gpu:
    """One GPU or MIG slice, found by its UUID. CUDA gives the UUID, so CUDA_VISIBLE_DEVICES has been applied already.

    missing: the readings that this GPU does not offer, with the reason of each. For a MIG slice NVML offers the memory
    only. Raises NoGpu.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self._nvml = _loaded() if nvml is None else nvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise NoGpu(f"NVML does not start: {error}") from None
        self._handle = self._found(uuid)
        self.missing: dict[str, str] = {}

    def read(self) -> dict[str, float]:
        """Returns the readings that this GPU offers.

        memory_bytes: used on the GPU by all processes. utilization: share of the last second, 0 to 1, in which a kernel
        ran. power_watts. nvlink_sent_bytes, nvlink_received_bytes: since the driver was loaded.
        """
        found: dict[str, float] = {}
        readers = (
            ("memory_bytes", self._memory),
            ("utilization", self._utilization),
            ("power_watts", self._power),
            ("nvlink_bytes", self._nvlink),
        )
        for name, reader in readers:
            try:
                found.update(reader(name))
            except self._nvml.NVMLError as error:
                self.missing[name] = f"{error}, for a MIG slice" if self._is_slice else str(error)
        return found

    def close(self) -> None:
        try:
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError:
            pass

    def _found(self, uuid: str) -> Any:
        bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
        for full in (f"GPU-{bare}", f"MIG-{bare}"):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByUUID(full)
                self._is_slice = full.startswith("MIG-")
                return handle
            except self._nvml.NVMLError as error:
                reason = error
        self.close()
        raise NoGpu(f"NVML does not know the GPU {bare}: {reason}")

    def _memory(self, name: str) -> dict[str, float]:
        return {name: float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)}

    def _utilization(self, name: str) -> dict[str, float]:
        return {name: self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100}

    def _power(self, name: str) -> dict[str, float]:
        return {name: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000}

    def _nvlink(self, name: str) -> dict[str, float]:
        fields = (
            self._nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            self._nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        )
        values = self._nvml.nvmlDeviceGetFieldValues(self._handle, [(field, _ALL_LINKS) for field in fields])
        for value in values:
            if value.nvmlReturn != self._nvml.NVML_SUCCESS:
                raise self._nvml.NVMLError(value.nvmlReturn)
        sent, received = (float(value.value.ullVal * _KIB) for value in values)
        return {"nvlink_sent_bytes": sent, "nvlink_received_bytes": received}


def _loaded() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise NoGpu("the package nvidia-ml-py is not installed") from None
