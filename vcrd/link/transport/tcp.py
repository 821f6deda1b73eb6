"""Tensors over TCP, through host memory.

They travel over the connection of the pair. Large tensors are divided among it and further connections, the stripes.
The student rank listens at a port of its own until the stripes have connected. It sends the port and a nonce over the
connection that has passed the greeting with the secret, and each stripe must send the nonce. So a stripe is as
trustworthy as the connection.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

from torch import Tensor

from ..buffers import HostMemory, Staged, Upload
from ..connection import Connection
from . import Transport

_NONCE = 16
_AT_ONCE = 1 << 22  # bytes that are received before they are copied into their columns
_STRIPE = 4 << 20  # bytes for each further connection, at least


class TcpTransport(Transport):
    """memory: the host memory of this rank. stripes: further connections between the same two ranks, in the same order
    on both ends, each with a thread of its own. Rows are divided among as many connections as get 4 MB each."""

    name = "tcp"

    def __init__(
        self, connection: Connection, memory: HostMemory, stripes: Sequence[Connection] = ()
    ) -> None:
        super().__init__(connection, memory.empty)
        self._memory = memory
        self._threads = ThreadPoolExecutor(len(stripes), "vcrd-link-stripe") if stripes else None
        connection.stripes = tuple(stripes)

    def stage(self, tensor: Tensor) -> Staged:
        return Staged(tensor, self._memory.stream(tensor.device))

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
        rows = _rows(part.ready())
        send = partial(Connection.send_bytes, seconds=seconds)
        elsewhere = self._side_by_side(send, rows, rows.shape[1] * rows.element_size())
        self.connection.sent += elsewhere

    def _receive(self, tensor: Tensor, columns: slice | None) -> None:
        rows = _rows(tensor)
        width = rows.shape[1] if columns is None else columns.stop - columns.start

        def receive(connection: Connection, rows: Tensor) -> None:
            if columns is None:
                connection.receive(rows)
                return
            step = max(1, _AT_ONCE // (width * rows.element_size()))
            part = rows.new_empty(min(step, rows.shape[0]), width)
            for some in rows.split(step):
                connection.receive(part[: some.shape[0]])
                some[:, columns].copy_(part[: some.shape[0]])

        self.connection.note(received=self._side_by_side(receive, rows, width * rows.element_size()))

    def _side_by_side(self, move: Callable[[Connection, Tensor], None], rows: Tensor, row_bytes: int) -> int:
        """Moves rows over as many connections as get _STRIPE bytes each. The number of bytes that the stripes moved."""
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
            for stripe in self.connection.stripes:  # its owner ends the first connection, with the reason
                stripe.end()
            raise
        finally:
            wait(moving)
        for each in moving:
            each.result()
        return total - edges[1] * row_bytes


def _rows(tensor: Tensor) -> Tensor:
    """A contiguous tensor as [rows, columns], with one column where it has a single dimension or none."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(-1, 1)


class Stripes:
    """The end that listens for stripes. invitation: the argument of `stripes_to`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        host, _ = connection.hosts
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._nonce = os.urandom(_NONCE)
        port = self._listener.getsockname()[1]
        self.invitation = json.dumps({"port": port, "nonce": self._nonce.hex()})

    def __enter__(self) -> Stripes:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def accept(self, count: int, seconds: float) -> list[Connection]:
        """The stripes in the order of the other end. Fewer than `count` where it gave up, or at the time limit."""
        found: dict[int, socket.socket] = {}
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while len(found) < count and time.monotonic() < deadline and not self._connection.readable(0.0):
            if not poll.poll(50):
                continue
            sock, _ = self._listener.accept()
            index = self._index(sock, deadline)
            if index is None or not 0 <= index < count or index in found:
                sock.close()
            else:
                found[index] = sock
        return [Connection(found[index]) for index in sorted(found)]

    def _index(self, sock: socket.socket, deadline: float) -> int | None:
        """The index of the stripe; None where the nonce is wrong."""
        raw = b""
        try:
            sock.settimeout(max(0.01, min(5.0, deadline - time.monotonic())))
            while len(raw) <= _NONCE and (chunk := sock.recv(_NONCE + 1 - len(raw))):
                raw += chunk
        except OSError:
            return None
        return raw[-1] if hmac.compare_digest(raw[:-1], self._nonce) else None


def stripes_to(connection: Connection, invitation: str, count: int, seconds: float) -> list[Connection]:
    """That many connections to the end that wrote the invitation; OSError if they cannot be made."""
    sockets: list[socket.socket] = []
    try:
        said = json.loads(invitation)
        port, nonce = int(said["port"]), bytes.fromhex(said["nonce"])
        for index in range(count):
            sockets.append(socket.create_connection((connection.hosts[1], port), timeout=seconds))
            sockets[-1].sendall(nonce + bytes([index]))
        return [Connection(sock) for sock in sockets]
    except (OSError, OverflowError, LookupError, TypeError, ValueError) as error:
        for sock in sockets:
            sock.close()
        raise OSError(f"no more connections to {connection.hosts[1]}: {error}") from None
