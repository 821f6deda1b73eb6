"""NCCL through NVIDIA's binding nccl4py, and torch's CUDA streams: the library behind the transport `nccl`.

The binding loads the libnccl that torch has loaded. Settings of NCCL (NCCL_SOCKET_IFNAME, NCCL_IB_HCA ..) count here as
they do for torch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .nccl import CommunicatorError

# NCCL wants work for several communicators on one device from one thread at a time. No call under it waits.
_one_after_another = threading.Lock()
# Blocks of its GPU that a kernel of the link may take. The variable NCCL_MAX_CTAS comes before it.
_MAX_CTAS = 2
MISSING = "the package nccl4py cannot be imported (pip install 'vcrd[nccl]')"


def version() -> int:
    """Of the libnccl that is loaded, as NCCL counts: 22809 for 2.28.9. ImportError if it or the binding is missing."""
    try:
        from nccl import core

        found = core.get_version().libnccl
    except Exception as error:  # the binding raises what its loader finds
        raise ImportError(f"{MISSING}: {error}") from None
    if found is None:
        raise ImportError(f"{MISSING}: it finds no libnccl")
    major, minor, patch = found.version.release
    return 10000 * major + 100 * minor + patch


class CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def done(self) -> bool:
        return self._event.query()


class CudaStream:
    """Not of torch's pool of 32, whose streams torch gives to others too."""

    def __init__(self, device: torch.device) -> None:
        from cuda.core import Device

        own = Device(device.index)
        with torch.cuda.device(device):
            own.set_current()
            self._stream = own.create_stream()  # kept: it is destroyed with this object
            self.stream = torch.cuda.ExternalStream(int(self._stream.handle), device)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)
        destination.record_stream(self.stream)

    def record(self) -> CudaEvent:
        return CudaEvent(self.stream.record_event())

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self.stream):
            return torch.empty(shape, dtype=dtype, device=self.stream.device)


class CudaCommunicator:
    def __init__(self, device: torch.device, rank: int, unique_id: bytes) -> None:
        from nccl import core

        self._device = device
        # A small kernel leaves the multiprocessors to training, and few channels need little memory per pair.
        config = core.NCCLConfig(blocking=False, max_ctas=_MAX_CTAS, comm_name="vcrd")
        with _one_after_another, self._calling():
            self._communicator = core.Communicator.init(2, rank, core.UniqueId.from_bytes(unique_id), config)
        self._peer = 1 - rank

    def settled(self) -> bool:
        from nccl.bindings.nccl import Result

        with self._calling():
            result = self._communicator.get_async_error()
        if result in (Result.Success, Result.InProgress):
            return result == Result.Success
        raise CommunicatorError(f"NCCL: {Result(result).name}: {self._communicator.get_last_error()}".strip())

    def send(self, tensor: Tensor, stream: CudaStream) -> None:
        self._move(self._communicator.send, tensor, stream)

    def receive(self, tensor: Tensor, stream: CudaStream) -> None:
        self._move(self._communicator.recv, tensor, stream)

    def abort(self) -> None:
        try:
            with self._calling():
                self._communicator.abort()
        except CommunicatorError:
            pass  # it is of no use to anybody any more

    def _move(self, call, tensor: Tensor, stream: CudaStream) -> None:
        # As bytes: NCCL then need not know the type. Recorded, for an abort returns before the kernel has ended.
        with _one_after_another, self._calling():
            call(tensor.reshape(-1).view(torch.uint8), self._peer, stream=stream.stream.cuda_stream)
        tensor.record_stream(stream.stream)

    def _calling(self) -> _Calling:
        return _Calling(self._device)


class _Calling:
    """Around a call of NCCL's: on the right device, with one kind of error."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.device(device)

    def __enter__(self) -> None:
        self._device.__enter__()

    def __exit__(self, kind, error, traceback) -> None:
        self._device.__exit__(kind, error, traceback)
        if isinstance(error, Exception):
            raise CommunicatorError(f"NCCL: {str(error).splitlines()[0]}") from None


class _Streams:
    """The link's own streams on one device: made once, kept for the life of the process, given to one pair at a time.

    Never destroyed: the allocator may still ask a stream, long after its pair is gone, whether it has done with memory.
    """

    _all: dict[torch.device, _Streams] = {}
    _lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = CudaStream(device)  # received tensors belong to it, and nothing runs on it
        self._free: list[CudaStream] = []

    @classmethod
    def of(cls, device: torch.device) -> _Streams:
        with cls._lock:
            if device not in cls._all:
                cls._all[device] = cls(device)
            return cls._all[device]

    def take(self) -> CudaStream:
        with self._lock:
            return self._free.pop() if self._free else CudaStream(self.device)

    def give_back(self, stream: CudaStream) -> None:
        with self._lock:
            self._free.append(stream)


class CudaLibrary:
    """device: with its index."""

    name = "nccl"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = _Streams.of(device)

    def unique_id(self) -> bytes:
        from nccl import core

        with _Calling(self._device):
            return bytes(core.get_unique_id())

    def communicator(self, rank: int, unique_id: bytes) -> CudaCommunicator:
        return CudaCommunicator(self._device, rank, unique_id)

    def stream(self) -> CudaStream:
        return self._streams.take()

    def give_back(self, stream: CudaStream) -> None:
        self._streams.give_back(stream)

    def computed(self) -> CudaEvent:
        return CudaEvent(torch.cuda.current_stream(self._device).record_event())

    def on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        # On the stream that trains, memory could be given out again while what reads it is still to run.
        return self._streams.memory.empty(*shape, dtype=dtype)

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        current = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(current)
