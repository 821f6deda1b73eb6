"""What every transport does alike: the framing of a message, and the interface that the link uses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..connection import Connection
from ..header import Header


@dataclass(frozen=True)
class Destination:
    """Where one tensor of a message goes: a contiguous tensor, or, with `columns`, these columns of its last dimension.

    The sender's tensor then has as many rows and only these columns.
    """

    tensor: Tensor
    columns: slice | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that is received."""
        if self.columns is None:
            return self.tensor.shape
        return torch.Size([*self.tensor.shape[:-1], self.columns.stop - self.columns.start])

    @property
    def is_empty(self) -> bool:
        return not math.prod(self.shape)


class Outgoing(Protocol):
    """A tensor that `stage` has taken over: contiguous, not changed by anyone any more, perhaps not computed yet."""

    @property
    def is_empty(self) -> bool: ...


class Arrived(Protocol):
    """The tensors of a complete response, on the device of this rank."""

    def ready(self) -> list[Tensor]:
        """For use on the current stream, which waits for them if it has to; the host waits for nothing."""


class Transport(ABC):
    """One end of a pair of ranks. `stage` belongs to the thread that computes, all else to the one thread that owns
    this end: it makes the transport, sends or receives, looks for errors and closes it. Only `connection.end()` may
    come from elsewhere; whatever waits in here then ends soon.

    Errors, from every method of the owner: ConnectionError where the transport or the connection has failed or ended,
    with the transport's own words; TimeoutError where nothing moved for `seconds`. Either is the end of the transport.
    """

    name: str

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @abstractmethod
    def stage(self, tensor: Tensor) -> Outgoing:
        """Takes a tensor that the current stream computes, and begins to bring it where `send` needs it."""

    def send(self, header: Header, parts: Sequence[Outgoing], *, seconds: float) -> None:
        """Sends a message; returns when its tensors' memory is free again."""
        self.connection.send(header, seconds=seconds)
        for part in parts:
            if not part.is_empty:
                self._send(part, seconds)

    def receive(self, destinations: Sequence[Destination]) -> None:
        """Takes in the tensors of a message whose header has been read; returns when all are there."""
        for destination in destinations:
            if not destination.is_empty:
                self._receive(destination)

    @abstractmethod
    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory for a destination, uninitialised. It is used again when the last tensor that shares it is gone and the
        streams that were given it by `Arrived.ready` are done with it."""

    @abstractmethod
    def arrived(self, tensors: Sequence[Tensor]) -> Arrived:
        """What becomes of destinations that are complete; from the thread that received the last of them."""

    def check(self) -> None:  # noqa: B027 - over TCP there is nothing to look for
        """Raises the error of a transport that failed while nothing travelled."""

    def abandon(self) -> None:  # noqa: B027 - over TCP there is nothing to give back
        """Gives back all that this end holds, but for the connection. Idempotent."""

    def close(self) -> None:
        """Ends this end and the connection at once, and gives back all that they hold. Idempotent."""
        self.connection.end()
        self.abandon()
        self.connection.close()

    @abstractmethod
    def _send(self, part: Outgoing, seconds: float) -> None: ...

    @abstractmethod
    def _receive(self, destination: Destination) -> None: ...
