"""Waiting in tests for what comes when it comes: a busy machine makes it late, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    seconds: float,
    what: str,
    details: Callable[[], object] = lambda: "",
) -> None:
    """AssertionError that says so, with the details of then, if it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds: {what}\n{details()}"
        time.sleep(0.02)
