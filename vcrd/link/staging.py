"""Between a device and the host, without making the host wait: pinned buffers, a stream of their own, events."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Staged:
    """A tensor on its way to the host. On the CPU it is there already, and nothing is copied."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        self._event = None
        self._tensor = tensor.contiguous()
        if tensor.device.type == "cpu":
            return
        # torch recycles pinned buffers itself, once the events that use them have passed.
        buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream = stream or torch.cuda.current_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            buffer.copy_(self._tensor, non_blocking=True)
            self._tensor.record_stream(stream)
            self._event = stream.record_event()
        self._tensor = buffer

    def ready(self) -> Tensor:
        """The contiguous CPU tensor; the calling thread waits for the copy, no other does."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor


class Upload:
    """Tensors on their way from the host to a device, on a stream of the link's own. On the CPU: the tensors."""

    def __init__(
        self, tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        self._event = None
        self._tensors = list(tensors)
        if stream is None:
            return
        with torch.cuda.stream(stream):
            self._tensors = [tensor.to(device, non_blocking=True) for tensor in tensors]
            self._event = stream.record_event()

    def ready(self) -> list[Tensor]:
        """The tensors, for use on the current stream, which waits for the copy; the host does not."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._tensors[0].device)
            current.wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(current)
        return self._tensors
