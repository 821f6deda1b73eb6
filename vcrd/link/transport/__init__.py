"""How the tensors of the link travel between one teacher rank and one student rank.

A `Transport` is one end of such a pair of ranks. Each pair has one connection, which is always TCP. Headers and
goodbyes travel over the connection, and its end tells each rank that the other one is gone. The tensors travel by one
of three transports:

- `tcp`: over the same connection, through host memory. The memory is pinned where the rank computes on a GPU.
- `nccl`: from GPU to GPU, over an NCCL communicator of these two ranks.
- `fake`: the code of `nccl` on the CPU, over a stand-in for NCCL that raises an error wherever NCCL forbids something.
  It is for tests.

All of them frame a message in the same way. A message is a header on the connection, followed by the tensors of the
payload in their order. Each tensor is sent in one piece. A tensor without elements is not sent. Both ends derive the
sizes from the header, so they always agree. Where a piece has fewer columns than the shard of the receiver, the
receiving transport writes it into its columns of the shard.

`opening` has the steps in which a pair agrees on its transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..connection import Connection, Header


class Outgoing(Protocol):
    """A tensor that `stage` has taken over. It is contiguous, nobody changes it any more, and a stream may still have
    to compute it."""

    is_empty: bool


class Arrived(Protocol):
    """The tensors of a complete response, on the device of this rank."""

    def ready(self) -> list[Tensor]:
        """The tensors, for use on the current stream. The stream waits for them where that is necessary, the host does
        not wait."""


class Transport(ABC):
    """One end of a pair of ranks.

    `stage` belongs to the thread that computes. Everything else belongs to the one thread that owns this end: it makes
    the transport, sends or receives, looks for errors and closes it. Other threads may only call `connection.end()`,
    which ends every wait in here.

    empty: called as torch.empty(*shape, dtype=...), returns memory to receive into. The memory is used again when the
    last tensor that shares it is gone and the streams that `Arrived.ready` gave it to have finished with it.

    Errors of every method of the owner: ConnectionError where the transport or the connection has failed or ended, with
    the message of the library below; TimeoutError where nothing moved for `seconds`. After either, the transport cannot
    be used any more.
    """

    name: str

    def __init__(self, connection: Connection, empty: Callable[..., Tensor]) -> None:
        self.connection = connection
        self.empty = empty

    @abstractmethod
    def stage(self, tensor: Tensor) -> Outgoing:
        """Takes a tensor that the current stream computes, and begins to move it to where `send` needs it."""

    def send(self, header: Header, parts: Sequence[Outgoing], *, seconds: float) -> None:
        """Sends a message. Returns when the memory of its tensors is free again."""
        self.connection.send(header, seconds=seconds)
        for part in parts:
            if not part.is_empty:
                self._send(part, seconds)

    def receive(self, tensors: Sequence[Tensor], columns: slice | None = None) -> None:
        """Fills contiguous tensors with those of a message whose header has been read. Returns when all are complete.

        columns: where it is given, the message has only these columns of the last dimension of each tensor, and only
        they are written.
        """
        for tensor in tensors:
            if tensor.numel() and (columns is None or columns.stop > columns.start):
                self._receive(tensor, columns)

    @abstractmethod
    def arrived(self, tensors: Sequence[Tensor]) -> Arrived:
        """Begins to move complete tensors to the device. Called by the thread that received the last of them."""

    def check(self) -> None:  # noqa: B027 - TCP has nothing to check
        """Raises the error of a transport that failed while nothing travelled."""

    def abandon(self) -> None:  # noqa: B027 - TCP without stripes holds nothing
        """Frees everything that this end holds, except the connection. Idempotent."""

    def close(self) -> None:
        """Ends the transport and the connection at once, and frees everything that they hold. Idempotent."""
        self.connection.end()
        self.abandon()
        self.connection.close()

    @abstractmethod
    def _send(self, part: Outgoing, seconds: float) -> None: ...

    @abstractmethod
    def _receive(self, tensor: Tensor, columns: slice | None) -> None: ...
