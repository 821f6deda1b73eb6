"""Tensors over an NCCL communicator of two ranks.

`NcclTransport` is the transport. It works on a `Library`: `CudaLibrary` at the end of this file, which is the only code
that calls NCCL, or the strict stand-in of `fake`. NCCL is called through nccl4py, the Python binding of NVIDIA, which
loads the libnccl that torch has loaded. The environment variables of NCCL (NCCL_SOCKET_IFNAME, NCCL_IB_HCA ..) have the
same effect here as in torch.

Rules of NCCL, and how the code keeps them:

- Both ends name equal counts and types. A tensor is one send and one receive. A piece that is narrower than the shard
  of the receiver is received into a buffer of the transport and copied to its columns on the same stream, so the next
  receive into that buffer comes after the copy. Nothing of size zero is sent (`Transport.send`).
- One thread uses a communicator: the owner of the transport makes it, sends or receives, reads its asynchronous error
  and aborts it. A lock keeps the calls that give work to NCCL, of all communicators of the link in this process, one
  after another. The communicator is non-blocking, so no call in here can hang. The owner waits in a loop that checks
  the event of the transfer, the error of the communicator, the connection and the clock. NCCL by itself notices neither
  a process that has stopped nor, in time, one that has died. The threads that train or compute the teacher never wait
  for a communicator.
- After each call the owner waits until the communicator is no longer "in progress" before it gives more work to the
  stream.
- A tensor that is sent or received stays alive, and nobody reads or writes it, until an event behind the transfer has
  passed. The tensors of the loss return to the allocator when the stream that reads them has finished with them.
- Nothing here uses `torch.distributed`: no watchdog, no monitor, no environment variable, no default group.

Why the kernels of the link and the collectives of the jobs cannot deadlock. A transfer is two kernels of two
blocks each, one on each of the two GPUs. A kernel of the link waits for

1. earlier transfers of its own pair, on its own stream;
2. its other half. Both halves are launched without waiting for each other, as soon as the header has been sent or read.
   The header is sent after the tensors have been computed, and the memory to receive into is free;
3. room on its GPU: two blocks. An H100 has 132 multiprocessors. A collective of NCCL takes at most 32 blocks, and all
   other kernels end by themselves.

Nothing that a job launches waits for a kernel of the link. The loss gets its tensors when the transfer has ended, and
until then the training thread waits on the host, between two kernels. So each chain of waiting kernels ends at a kernel
that runs. This is also true with CUDA_DEVICE_MAX_CONNECTIONS=1, where streams share one queue and a kernel cannot
overtake one that waits for an event: no stream of the link waits for an event, and a kernel that has started blocks no
kernel behind it.

Changes that would break this argument: giving the loss its tensors before the transfer has ended, with an event for the
training stream to wait for (a collective of the student behind that event would wait for the teacher); so many pairs on
one GPU that their blocks leave no room for a collective; collectives that wait for all blocks of a GPU (cooperative
launches); a captured graph that has both a transfer and a collective.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..connection import Connection, Header
from . import Arrived, Transport

# NCCL needs the calls for several communicators of one device one after another. No call under the lock waits.
_one_after_another = threading.Lock()
# Blocks of its GPU that a kernel of the link may use. The variable NCCL_MAX_CTAS has priority over it.
_MAX_CTAS = 2
MISSING = "the package nccl4py cannot be imported (pip install 'vcrd[nccl]')"
_PROBE_BYTES = 1 << 16
_FIRST_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-3  # seconds between two checks of a transfer


class CommunicatorError(Exception):
    """An error of NCCL, with its message."""


class Event(Protocol):
    def done(self) -> bool: ...


class Stream(Protocol):
    """A stream of the link on the device of the rank."""

    def copy(self, destination: Tensor, source: Tensor) -> None: ...

    def record(self) -> Event: ...

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that only this stream uses."""


class Communicator(Protocol):
    """A communicator of two ranks. Every method may raise CommunicatorError."""

    def settled(self) -> bool:
        """Whether the last call is no longer in progress, so that the next call is allowed."""

    def send(self, tensor: Tensor, stream: Stream) -> None: ...

    def receive(self, tensor: Tensor, stream: Stream) -> None: ...

    def abort(self) -> None:
        """Ends the communicator and its transfers. Never raises."""


class Library(Protocol):
    """NCCL and CUDA on one device, or the stand-in for them."""

    name: str

    def unique_id(self) -> bytes: ...

    def communicator(self, rank: int, unique_id: bytes) -> Communicator:
        """Begins to make a communicator, which is complete once it is `settled`."""

    def stream(self) -> Stream:
        """A stream that nobody else uses until `give_back`. Streams are made once and reused."""

    def give_back(self, stream: Stream) -> None: ...

    def computed(self) -> Event:
        """An event behind all work that the current stream of the calling thread has."""

    def on_device(self, tensor: Tensor) -> Tensor: ...

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor: ...

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        """Notes that the current stream of the calling thread reads these tensors until nobody holds them any more."""


class Departing:
    """A tensor on the device that a kernel may still have to compute."""

    def __init__(self, tensor: Tensor, computed: Event) -> None:
        self.tensor = tensor
        self.computed = computed
        self.is_empty = not tensor.numel()


class OnDevice:
    """Received tensors. They are on the device already."""

    def __init__(self, tensors: Sequence[Tensor], library: Library) -> None:
        self._tensors = list(tensors)
        self._library = library

    def ready(self) -> list[Tensor]:
        self._library.hand_over(self._tensors)
        return self._tensors


class NcclTransport(Transport):
    """Rank 0 of the communicator sends, rank 1 receives."""

    def __init__(self, connection: Connection, library: Library) -> None:
        super().__init__(connection, library.empty)
        self.name = library.name
        self._library = library
        self._communicator: Communicator | None = None
        self._stream: Stream | None = None
        self._buffer: Tensor | None = None

    def open(
        self, rank: int, unique_id: bytes, seconds: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Makes the communicator and tests it with a probe. given_up: whether the other end has given up."""
        deadline = time.monotonic() + seconds
        what = f"the two ranks did not connect over NCCL within {seconds:g} seconds"
        with _as_connection_error():
            self._stream = self._library.stream()
            self._communicator = self._library.communicator(rank, unique_id)

        def wait(done: Callable[[], bool]) -> None:
            self._wait(done, deadline, what, given_up)

        wait(self._settled)
        pattern = (torch.arange(_PROBE_BYTES) * 31 % 251).to(torch.uint8)
        if rank == 0:
            probe = self._library.on_device(pattern)
            wait(self._library.computed().done)
            self._transfer(self._communicator.send, probe, wait)
        else:
            probe = self._library.empty(_PROBE_BYTES, dtype=torch.uint8)
            self._transfer(self._communicator.receive, probe, wait)
        done = self._stream.record().done
        wait(done)
        if not torch.equal(probe.cpu(), pattern):
            raise ConnectionError("a probe over NCCL arrived damaged")

    def stage(self, tensor: Tensor) -> Departing:
        tensor = self._library.on_device(tensor.contiguous())
        return Departing(tensor, self._library.computed())

    def send(self, header: Header, parts: Sequence[Departing], *, seconds: float) -> None:
        # The receiver launches its half when the header arrives. It should not wait for the model of the teacher.
        for part in parts:
            self._wait(part.computed.done)
        super().send(header, parts, seconds=seconds)

    def arrived(self, tensors: Sequence[Tensor]) -> Arrived:
        return OnDevice(tensors, self._library)

    def check(self) -> None:
        self._settled()

    def abandon(self) -> None:
        communicator, self._communicator = self._communicator, None
        stream, self._stream = self._stream, None
        self._buffer = None
        if communicator is not None:
            communicator.abort()
        if stream is not None:
            self._library.give_back(stream)

    def _send(self, part: Departing, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        what = f"did not take what was sent within {seconds:g} seconds"

        def wait(done: Callable[[], bool]) -> None:
            self._wait(done, deadline, what)

        self._transfer(self._communicator.send, part.tensor, wait)
        wait(self._stream.record().done)
        self.connection.sent += part.tensor.nbytes

    def _receive(self, tensor: Tensor, columns: slice | None) -> None:
        # No time limit here: `StudentLink.receive`, which waits for the answer, ends the connection at its timeout.
        target = tensor if columns is None else self._buffer_for(tensor, columns.stop - columns.start)
        self._transfer(self._communicator.receive, target, self._wait)
        if columns is not None:
            self._stream.copy(tensor[..., columns], target)
        self._wait(self._stream.record().done)
        self.connection.note(received=target.nbytes)

    def _buffer_for(self, tensor: Tensor, width: int) -> Tensor:
        """Contiguous, of the shape of `width` columns of the tensor."""
        shape, dtype = (*tensor.shape[:-1], width), tensor.dtype
        count = math.prod(shape)
        if self._buffer is None or self._buffer.dtype != dtype or self._buffer.numel() < count:
            self._buffer = self._stream.empty(count, dtype=dtype)
        return self._buffer[:count].view(shape)

    def _transfer(self, call: Callable[..., None], tensor: Tensor, wait: Callable[..., None]) -> None:
        with _as_connection_error():
            call(tensor, self._stream)
        wait(self._settled)

    def _settled(self) -> bool:
        with _as_connection_error():
            return self._communicator.settled()

    def _wait(
        self,
        done: Callable[[], bool],
        deadline: float = float("inf"),
        what: str = "",
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        pause = _FIRST_PAUSE
        while not done():
            self._settled()
            if self.connection.is_over:
                raise ConnectionError("the other end closed")
            if given_up():
                raise ConnectionError("the other end gave up")
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)


class _as_connection_error:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, CommunicatorError):
            raise ConnectionError(str(error)) from None


def version() -> int:
    """The version of the loaded libnccl, 22809 for 2.28.9. ImportError if it or nccl4py is missing."""
    try:
        from nccl import core

        found = core.get_version().libnccl
    except Exception as error:  # nccl4py raises errors of many classes
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
    """A stream of its own: torch has a pool of 32 streams and gives each of them to several users."""

    def __init__(self, device: torch.device) -> None:
        from cuda.core import Device

        own = Device(device.index)
        with torch.cuda.device(device):
            own.set_current()
            self._stream = own.create_stream()  # the stream is destroyed with this object
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
        # A small kernel leaves the multiprocessors to training. Few channels need little memory per pair.
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
            pass  # nobody uses it any more

    def _move(self, call, tensor: Tensor, stream: CudaStream) -> None:
        # As bytes, so that NCCL need not know the type. Recorded, because an abort returns before the kernel has ended.
        with _one_after_another, self._calling():
            call(tensor.reshape(-1).view(torch.uint8), self._peer, stream=stream.stream.cuda_stream)
        tensor.record_stream(stream.stream)

    def _calling(self) -> _Calling:
        return _Calling(self._device)


class _Calling:
    """A context for a call of NCCL: the right device, and one class of error."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.device(device)

    def __enter__(self) -> None:
        self._device.__enter__()

    def __exit__(self, kind, error, traceback) -> None:
        self._device.__exit__(kind, error, traceback)
        if isinstance(error, Exception):
            raise CommunicatorError(f"NCCL: {str(error).splitlines()[0]}") from None


class _Streams:
    """The streams of the link on one device. Each is made once, kept until the process ends, and used by one pair at a
    time.

    They are never destroyed, because the allocator may still query a stream long after its pair is gone.
    """

    _all: dict[torch.device, _Streams] = {}
    _lock = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = CudaStream(device)  # received tensors are allocated on it, and no kernel runs on it
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
    """NCCL and CUDA. device: with its index."""

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
        # On the training stream, the allocator could reuse the memory while its reader still has to run.
        return self._streams.memory.empty(*shape, dtype=dtype)

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        current = torch.cuda.current_stream(self._device)
        for tensor in tensors:
            tensor.record_stream(current)
