"""Ports for the jobs that tests start."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port below those that the system gives to whoever asks for any, so that none of these takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
