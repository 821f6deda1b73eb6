"""Tensors over TCP, through host memory: over the connection itself, and large ones over several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from ..buffers import HostMemory, Staged, Upload
from ..connection import Connection
from .base import Destination, Transport

_AT_ONCE = 1 << 22  # bytes received before they are put into their columns
_STRIPE = 4 << 20  # bytes that one more connection must have to carry


class TcpTransport(Transport):
    """memory: this rank's, for what arrives. stripes: more connections between the same two ranks, in the same order on
    both ends, each with a thread of its own. Rows are divided among as many connections as get 4 MB each."""

    name = "tcp"

    def __init__(
        self, connection: Connection, memory: HostMemory, stripes: Sequence[Connection] = ()
    ) -> None:
        super().__init__(connection)
        self._memory = memory
        self._threads = ThreadPoolExecutor(len(stripes), "vcrd-link-stripe") if stripes else None
        connection.stripes = tuple(stripes)

    def stage(self, tensor: Tensor) -> Staged:
        return Staged(tensor, self._memory.stream(tensor.device))

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._memory.empty(*shape, dtype=dtype)

    def arrived(self, tensors: Sequence[Tensor]) -> Upload:
        return Upload(tensors, self._memory)

    def abandon(self) -> None:
        stripes, self.connection.stripes = self.connection.stripes, ()
        for stripe in stripes:
            stripe.end()
        if self._threads is not None:
            self._threads.shutdown()
        for stripe in stripes:
            stripe.close()

    def _send(self, part: Staged, seconds: float) -> None:
        def send(connection: Connection, rows: Tensor) -> None:
            connection.send_bytes(rows, seconds=seconds)

        rows = _rows(part.ready())
        elsewhere = self._side_by_side(send, rows, rows.shape[1] * rows.element_size())
        self.connection.sent += elsewhere

    def _receive(self, destination: Destination) -> None:
        columns = destination.columns
        width = destination.shape[-1] if len(destination.shape) > 1 else 1

        def receive(connection: Connection, rows: Tensor) -> None:
            if columns is None:
                connection.receive(rows)
                return
            step = max(1, _AT_ONCE // (width * rows.element_size()))
            part = rows.new_empty(min(step, rows.shape[0]), width)
            for some in rows.split(step):
                connection.receive(part[: some.shape[0]])
                some[:, columns].copy_(part[: some.shape[0]])

        rows = _rows(destination.tensor)
        self.connection.note(received=self._side_by_side(receive, rows, width * rows.element_size()))

    def _side_by_side(self, move: Callable[[Connection, Tensor], None], rows: Tensor, row_bytes: int) -> int:
        """Moves rows over all connections that are worth it; the bytes that did not go over the first one."""
        connections = [self.connection, *self.connection.stripes]
        count, total = rows.shape[0], rows.shape[0] * row_bytes
        parts = max(1, min(len(connections), count, total // _STRIPE))
        edges = [part * count // parts for part in range(parts + 1)]
        moving = [
            self._threads.submit(move, connection, rows[start:stop])
            for connection, start, stop in zip(connections[1:], edges[1:], edges[2:], strict=False)
        ]
        try:
            move(self.connection, rows[: edges[1]])
        except BaseException:
            for stripe in self.connection.stripes:  # the first connection is ended by its owner, who says why
                stripe.end()
            raise
        finally:
            wait(moving)
        for each in moving:
            each.result()
        return total - edges[1] * row_bytes


def _rows(tensor: Tensor) -> Tensor:
    """[rows, columns], shared with a contiguous tensor; one column where it has a single dimension or none."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(-1, 1)
