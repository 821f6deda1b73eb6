"""More connections between two ranks that are connected already, for large tensors over TCP.

The student's rank listens at a port of its own until they have come, and says port and nonce over the connection that
has passed the secret; whoever comes must say the nonce. So a stripe is as trusted as its connection.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import time

from ..connection import Connection

_NONCE = 16


class Stripes:
    """The listening end. invitation: for `stripes_to`."""

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
        """In the order of the other end's; fewer where it gave up, which shows on the connection, or time is over."""
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
        """Which one it is; None for a stranger."""
        raw = b""
        try:
            sock.settimeout(max(0.01, min(5.0, deadline - time.monotonic())))
            while len(raw) <= _NONCE and (chunk := sock.recv(_NONCE + 1 - len(raw))):
                raw += chunk
        except OSError:
            return None
        return raw[-1] if hmac.compare_digest(raw[:-1], self._nonce) else None


def stripes_to(connection: Connection, invitation: str, count: int, seconds: float) -> list[Connection]:
    """That many connections to whoever wrote the invitation; OSError if they cannot be made."""
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
