"""Ports for jobs of tests."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A free port below the ephemeral ports of the system, so that no other process gets it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
