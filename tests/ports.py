"""Ports for jobs of tests."""

from __future__ import annotations

import fcntl
import random
import socket
import tempfile
from collections import deque
from pathlib import Path

# A job takes its port seconds after it was drawn. Until then a lock keeps it from all other processes that run tests;
# this many draws later it is in use or done with.
_LOCKS: deque = deque(maxlen=64)


def free_port() -> int:
    """A free port below the ephemeral ports of the system, so that no other process gets it meanwhile."""
    folder = Path(tempfile.gettempdir()) / "vcrd-test-ports"
    folder.mkdir(exist_ok=True)
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        lock = (folder / str(port)).open("w")
        with socket.socket() as probe:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                probe.bind(("127.0.0.1", port))
            except OSError:
                lock.close()
                continue
        _LOCKS.append(lock)  # closed, and so released, when it leaves the deque
        return port
