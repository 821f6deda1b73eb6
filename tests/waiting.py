"""Waiting for events in tests. A busy machine delays an event, but does not fail the test."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    seconds: float,
    what: str,
    details: Callable[[], object] = lambda: "",
) -> None:
    """Waits until the condition holds. AssertionError with the details if it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds: {what}\n{details()}"
        time.sleep(0.02)
