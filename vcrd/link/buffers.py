"""Host memory for tensors that travel, and copies between a device and the host for which the host does not wait.

These are all host synchronisations of the link on CUDA. The threads that own a transport wait for what they send and
receive (`Staged.ready`, `transport.nccl`). The first answer with the payload `hidden` waits until the output layer is
on the device. A request for tokens on a GPU waits for the tokens. Ranks of a replica that agree over NCCL wait for
those small collectives, on a stream of their own (`ReplicaGroup`). Otherwise the thread that trains and the thread that
computes the teacher wait for no copy and for no kernel.
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

_LARGE = 1 << 20  # bytes; the C library reuses the memory of smaller tensors by itself


class Pool:
    """Host memory that is reused. New memory costs a page fault for every 4 KB of a large tensor.

    The memory of a tensor returns to the pool when the last tensor that shares its storage is gone. kept: the most free
    blocks that the pool keeps; None: all of them. A free block that is too small for a tensor is dropped, because
    larger tensors are in use now.
    """

    def __init__(self, kept: int | None = None) -> None:
        # No lock: the garbage collector may return memory at any point. The methods of a deque are atomic.
        self._free: deque[mmap.mmap] = deque(maxlen=kept)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous CPU tensor."""
        count = math.prod(shape) * dtype.itemsize
        if count < _LARGE:
            return torch.empty(shape, dtype=dtype)
        block = self._block(count)
        lease = (ctypes.c_char * count).from_buffer(block)  # the storage of the tensor holds it
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(shape)

    def _block(self, count: int) -> mmap.mmap:
        while self._free:
            try:
                block = self._free.popleft()
            except IndexError:  # another thread took it
                break
            if len(block) >= count:
                return block  # a block that is too small is dropped
        block = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block


class Pinned:
    """Pinned host memory for copies to and from a device. torch reuses it once the copies are complete."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        # A thread that has chosen no device would initialize CUDA on the first one.
        with torch.cuda.device(self._device):
            return torch.empty(shape, dtype=dtype, pin_memory=True)


class HostMemory:
    """The host memory of one rank for tensors that travel, and the stream that copies them from and to its device.

    device: where the rank computes. kept: see `Pool`.
    """

    def __init__(self, device: torch.device, kept: int | None = None) -> None:
        self.device = device
        # Called as torch.empty(*shape, dtype=...), returns an uninitialised contiguous CPU tensor.
        self.empty = (Pinned(device) if device.type == "cuda" else Pool(kept)).empty
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream for copies from and to a device, always the same one; None for the CPU."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Staged:
    """A tensor that is being copied to the host. A tensor on the CPU is not copied.

    Nobody may change the tensor any more. stream: the stream of the link for copies, which waits for the current
    stream; None for a tensor on the CPU.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        self._event = None
        self._tensor = tensor.contiguous()
        self.is_empty = not tensor.numel()
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

    def ready(self) -> Tensor:
        """The contiguous tensor on the host. The calling thread waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


class Upload:
    """Tensors that are being copied from the host to the device of the rank. On the CPU nothing is copied.

    The thread that received them makes it, so that the copy runs while other threads compute. The host does not wait.
    """

    def __init__(self, tensors: Sequence[Tensor], memory: HostMemory) -> None:
        self._event = None
        self._tensors = list(tensors)
        stream = memory.stream(memory.device)
        if stream is None:
            return
        with torch.cuda.stream(stream):
            # torch reuses the pinned memory only after these copies.
            self._tensors = [tensor.to(memory.device, non_blocking=True) for tensor in tensors]
            self._event = stream.record_event()

    def ready(self) -> list[Tensor]:
        """The tensors, for use on the current stream, which waits for the copy. The host does not wait."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._tensors[0].device)
            current.wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(current)
        return self._tensors
