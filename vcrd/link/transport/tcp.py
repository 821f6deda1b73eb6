"""Tensors over the connection itself, through host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buffers import HostMemory, Staged, Upload
from ..connection import Connection
from .base import Destination, Transport

_AT_ONCE = 1 << 22  # bytes received before they are put into their columns


class TcpTransport(Transport):
    """memory: this rank's, for what arrives."""

    name = "tcp"

    def __init__(self, connection: Connection, memory: HostMemory) -> None:
        super().__init__(connection)
        self._memory = memory

    def stage(self, tensor: Tensor) -> Staged:
        return Staged(tensor, self._memory.stream(tensor.device))

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._memory.empty(*shape, dtype=dtype)

    def arrived(self, tensors: Sequence[Tensor]) -> Upload:
        return Upload(tensors, self._memory)

    def _send(self, part: Staged, seconds: float) -> None:
        self.connection.send_bytes(part.ready(), seconds=seconds)

    def _receive(self, destination: Destination) -> None:
        if destination.columns is None:
            self.connection.receive(destination.tensor)
            return
        rows, width = destination.tensor.flatten(0, -2), destination.shape[-1]
        step = max(1, _AT_ONCE // (width * rows.element_size()))
        part = rows.new_empty(min(step, rows.shape[0]), width)
        for some in rows.split(step):
            self.connection.receive(part[: some.shape[0]])
            some[:, destination.columns].copy_(part[: some.shape[0]])
