"""Tensors over a communicator of two ranks, by NCCL's rules. The CUDA half is `cuda`, the strict stand-in `fake`.

Rules, and how they are kept:

- Both sides name equal counts and types: a tensor is one send and one receive, whole. A piece that is narrower than the
  receiving shard is received into a buffer of this transport's own and copied to its columns on the same stream, so the
  next receive into that buffer comes after the copy. Nothing of size zero is sent (`base`).
- One thread uses a communicator: the owner of the transport makes it, sends or receives, asks for its asynchronous
  error and aborts it. Calls that give NCCL work, of all communicators of the link in this process, come one after
  another (`cuda`). It is non-blocking, so no call in here can hang. The owner waits by looking, in one loop, at the
  transfer's event, at the communicator's error, at the connection and at the clock: NCCL by itself notices neither a
  process that stopped nor, in time, one that died. The threads that train or compute the teacher never wait for it.
- After each call the owner waits until the communicator is no longer "in progress", before it gives the stream anything
  else.
- A tensor that is sent or received stays alive, and is touched by nobody, until an event behind the transfer has
  passed. What the loss was given returns to the allocator when the stream that reads it is done with it.
- `torch.distributed` has no part in any of this: no watchdog, no monitor, no environment variable, no default group.

Why the link's kernels and the jobs' own collectives cannot wait for each other in a circle. A transfer is two kernels
of two blocks each, one on either GPU. A kernel of the link waits for

1. earlier transfers of its own pair, on its own stream;
2. its other half. Both are launched without waiting for each other, as soon as the header has been sent or read, and
   the header is sent when what it announces has been computed. What is received into is free already;
3. room on its GPU: two blocks. A GPU of the H100's kind has 132 multiprocessors; NCCL's collectives take at most 32
   blocks each, and all other kernels end by themselves.

Nothing that a job launches waits for a kernel of the link: the loss is given its tensors when the transfer has ended,
and until then the training thread waits on the host, between two kernels. So each chain of waiting ends at kernels that
run. That holds as well with CUDA_DEVICE_MAX_CONNECTIONS=1, where streams share one queue and a kernel cannot overtake
one that waits for an event: no stream of the link waits for an event, and a kernel that has begun blocks nobody behind
it.

What would break the argument: giving the loss its tensors before the transfer has ended, with an event for the training
stream to wait on (a collective of the student behind that event would wait for the teacher); so many pairs at once on
one GPU that their blocks leave no room for a collective; collectives that wait for all blocks of a GPU (cooperative
launches); a captured graph that holds both a transfer and a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..connection import Connection
from ..header import Header
from .base import Arrived, Destination, Transport

_PROBE_BYTES = 1 << 16
_FIRST_PAUSE, _LONGEST_PAUSE = 2e-5, 1e-3  # seconds between two looks at a transfer


class CommunicatorError(Exception):
    """What NCCL says that is neither success nor "in progress", in its own words."""


class Event(Protocol):
    def done(self) -> bool: ...


class Stream(Protocol):
    """One of the link's own, on the rank's device."""

    def copy(self, destination: Tensor, source: Tensor) -> None: ...

    def record(self) -> Event: ...

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that this stream alone uses."""


class Communicator(Protocol):
    """Of two ranks. Every method may raise CommunicatorError."""

    def settled(self) -> bool:
        """Whether the last call is over, so that the next one may come."""

    def send(self, tensor: Tensor, stream: Stream) -> None: ...

    def receive(self, tensor: Tensor, stream: Stream) -> None: ...

    def abort(self) -> None:
        """Ends it and whatever is under way. Never raises."""


class Library(Protocol):
    """NCCL and CUDA, or what stands for them, on one device."""

    name: str

    def unique_id(self) -> bytes: ...

    def communicator(self, rank: int, unique_id: bytes) -> Communicator:
        """Begins to make one; it is there once `settled`."""

    def stream(self) -> Stream:
        """A stream that nobody else has; to be given back. Made once, and kept for the next one that asks."""

    def give_back(self, stream: Stream) -> None: ...

    def computed(self) -> Event:
        """Stands for all that the current stream of the calling thread has been given."""

    def on_device(self, tensor: Tensor) -> Tensor: ...

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor: ...

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        """The current stream of the calling thread will read these, until their last owner drops them."""


class Departing:
    """A tensor on the device that some kernel may still compute."""

    def __init__(self, tensor: Tensor, computed: Event) -> None:
        self.tensor = tensor
        self.computed = computed

    @property
    def is_empty(self) -> bool:
        return not self.tensor.numel()


class OnDevice:
    """Tensors that are here."""

    def __init__(self, tensors: Sequence[Tensor], library: Library) -> None:
        self._tensors = list(tensors)
        self._library = library

    def ready(self) -> list[Tensor]:
        self._library.hand_over(self._tensors)
        return self._tensors


class NcclTransport(Transport):
    """Rank 0 of the communicator sends, rank 1 receives."""

    def __init__(self, connection: Connection, library: Library) -> None:
        super().__init__(connection)
        self.name = library.name
        self._library = library
        self._communicator: Communicator | None = None
        self._stream: Stream | None = None
        self._buffer: Tensor | None = None

    def open(
        self, rank: int, unique_id: bytes, seconds: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Makes the communicator and tries it with a probe. given_up: whether the other end needs it no more."""
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
        # With the header the receiver launches its half, which should not wait for the teacher's model on its GPU.
        for part in parts:
            self._wait(part.computed.done)
        super().send(header, parts, seconds=seconds)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._library.empty(*shape, dtype=dtype)

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

    def _receive(self, destination: Destination) -> None:
        # Without a time limit: `StudentLink.receive`, which waits for the answer, ends the connection at its timeout.
        tensor = destination.tensor
        target = tensor if destination.columns is None else self._buffer_for(destination)
        self._transfer(self._communicator.receive, target, self._wait)
        if destination.columns is not None:
            self._stream.copy(tensor[..., destination.columns], target)
        self._wait(self._stream.record().done)
        self.connection.note(received=target.nbytes)

    def _buffer_for(self, destination: Destination) -> Tensor:
        count, dtype = destination.shape.numel(), destination.tensor.dtype
        if self._buffer is None or self._buffer.dtype != dtype or self._buffer.numel() < count:
            self._buffer = self._stream.empty(count, dtype=dtype)
        return self._buffer[:count].view(destination.shape)

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
