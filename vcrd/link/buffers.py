"""Memory for what travels, and the way between a device and the host, without making the host wait.

Host synchronisations of the link on CUDA, all of them: the threads that own a transport wait for what they send and
receive (`Staged.ready`, `transport.nccl`); the first `Hidden` of a student waits for the output layer to be on the
device; a request for tokens that lie on a GPU waits for them; ranks of a replica that agree over NCCL wait for that,
on a stream of its own (`ReplicaGroup`). The thread that trains and the thread that computes the teacher wait for no
copy and for no kernel.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes; the C library keeps the memory of smaller tensors by itself


class Pool:
    """Host memory that is used again, so that large tensors do not cost a page fault for every 4 KB each time.

    A tensor's memory comes back when the last tensor that shares its storage is gone, wherever that is; until then
    nobody else gets it. kept: blocks that may wait for use, each as large as the largest tensors of late; None: as many
    as were in use at once.
    """

    def __init__(self, kept: int | None = None) -> None:
        # Without a lock, as memory may come back in the middle of anything; a deque's own methods are atomic.
        self._free: deque[mmap.mmap] = deque(maxlen=kept)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous CPU tensor."""
        count = math.prod(shape) * dtype.itemsize
        if count < _LARGE:
            return torch.empty(shape, dtype=dtype)
        block = self._block(count)
        lease = (ctypes.c_char * count).from_buffer(block)  # held by the tensor's storage
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(shape)

    def _block(self, count: int) -> mmap.mmap:
        while self._free:
            try:
                block = self._free.popleft()
            except IndexError:  # another thread took it
                break
            if len(block) >= count:
                return block  # one that is too small is dropped: larger ones are needed now
        block = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block


class Pinned:
    """Pinned host memory for copies to and from a device. torch uses it again once the copies have passed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        # Any thread may ask, and pinning in one that has chosen no device would set up the first one for it.
        with torch.cuda.device(self._device):
            return torch.empty(shape, dtype=dtype, pin_memory=True)


class HostMemory:
    """One rank's host memory for tensors that travel, and the stream that copies them from and to its device.

    device: where the rank computes. kept: see `Pool`.
    """

    def __init__(self, device: torch.device, kept: int | None = None) -> None:
        self.device = device
        self._pool = Pinned(device) if device.type == "cuda" else Pool(kept)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous CPU tensor."""
        return self._pool.empty(*shape, dtype=dtype)

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream for copies from and to a device, always the same one; None on the CPU, where none is needed."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Staged:
    """A tensor on its way to the host. On the CPU it is there already, and nothing is copied.

    It must not be changed any more. stream: of the link's own, which waits for the current one; None on the CPU.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        self._event = None
        self._tensor = tensor.contiguous()
        if tensor.device.type == "cpu":
            return
        buffer = Pinned(tensor.device).empty(*tensor.shape, dtype=tensor.dtype)
        current = torch.cuda.current_stream(tensor.device)
        stream = stream or current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            buffer.copy_(self._tensor, non_blocking=True)
            self._tensor.record_stream(stream)
            self._event = stream.record_event()
        self._tensor = buffer

    @property
    def is_empty(self) -> bool:
        return not self._tensor.numel()

    def ready(self) -> Tensor:
        """The contiguous tensor; the calling thread waits for it, no other does."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


class Upload:
    """Tensors on their way from the host to the rank's device. On the CPU: the tensors.

    Made by the thread that received them, so that the copy runs while others compute; the host waits for nothing.
    """

    def __init__(self, tensors: Sequence[Tensor], memory: HostMemory) -> None:
        self._event = None
        self._tensors = list(tensors)
        stream = memory.stream(memory.device)
        if stream is None:
            return
        with torch.cuda.stream(stream):
            # The pinned memory is free for others once these copies have passed: torch sees to that.
            self._tensors = [tensor.to(memory.device, non_blocking=True) for tensor in tensors]
            self._event = stream.record_event()

    def ready(self) -> list[Tensor]:
        """The tensors, for use on the current stream, which waits for the copy; the host does not."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._tensors[0].device)
            current.wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(current)
        return self._tensors
