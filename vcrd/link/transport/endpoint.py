"""What one rank brings to all of its transports, for as long as its link lives."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..buffers import HostMemory
from ..connection import Connection
from . import cuda, fake
from .nccl import Library, NcclTransport
from .tcp import TcpTransport

CODES = {"tcp": 1, "nccl": 2, "fake": 3}  # in headers


def name_of(code: int) -> str | None:
    """The transport with that code; None if there is none."""
    return next((name for name, its in CODES.items() if its == code), None)


class Endpoint:
    """A rank's device and memory, and its library of communicators where it has one.

    setting: the setting `transport`. device: where the rank computes; a GPU without an index is the current one. kept:
    blocks of host memory that may wait for use (`buffers.Pool`). sockets: connections of a pair over TCP, where this
    rank sends.
    nccl_version: of NCCL, 0 where tensors can travel over TCP only. missing: why, where the setting asks for more;
    else "". ValueError where the setting insists on NCCL.
    """

    def __init__(
        self,
        setting: str,
        device: torch.device,
        kept: int | None = None,
        sockets: int = 1,
    ) -> None:
        self.device = indexed(device)
        self.memory = HostMemory(self.device, kept)
        self.sockets = sockets
        self.nccl_version = 0
        self.missing = ""
        self._told: set[str] = set()
        self._library: Library | None = None
        if setting == "fake":
            self.nccl_version, self._library = fake.VERSION, fake.FakeLibrary()
        elif setting in ("auto", "nccl") and self.device.type == "cuda":
            try:
                self.nccl_version = cuda.version()
            except ImportError as error:
                self.missing = str(error)
        elif setting == "nccl":
            self.missing = f"this rank computes on {device}, not on a GPU"
        if setting == "nccl" and self.missing:
            raise ValueError(f"transport must be 'auto' or 'tcp' where {self.missing}, got 'nccl'")

    def is_news(self, reason: str) -> bool:
        """Whether this is asked for the first time with that reason: what is logged once, however often a job joins."""
        news = reason not in self._told
        self._told.add(reason)
        return news

    def tcp(self, connection: Connection, stripes: Sequence[Connection] = ()) -> TcpTransport:
        return TcpTransport(connection, self.memory, stripes)

    def nccl(self, connection: Connection) -> NcclTransport:
        """Not open yet."""
        return NcclTransport(connection, self.nccl_library())

    def nccl_library(self) -> Library:
        if self._library is None:
            self._library = cuda.CudaLibrary(self.device)
        return self._library


def indexed(device: torch.device) -> torch.device:
    """With the index of the current GPU where a GPU is named without one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
