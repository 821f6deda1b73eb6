"""Where the time of a step goes, on one rank: seconds of the host, which are the device's where it is the CPU.

On a GPU the host runs ahead of the device and stands still where it has to wait for it, so there a part has what it
waited for, too: `gpu_utilization` and a profiler tell more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import sub


@dataclass
class Parts:
    """forward: inside the script's forward step, waits for teacher and verifier included. backward: the rest of the
    schedule, with what pipeline stages wait for each other. gradients: `finalize_model_grads_func`, where data-parallel
    ranks add theirs up. between: from there to the next step's first forward: optimizer, logging, checkpoints.
    """

    forward: float = 0.0
    backward: float = 0.0
    gradients: float = 0.0
    between: float = 0.0

    def since(self, before: Parts) -> Parts:
        return Parts(*map(sub, vars(self).values(), vars(before).values()))


class StepClock:
    """Running sums since the first step; `parts` is a copy."""

    def __init__(self) -> None:
        self._sums = Parts()
        self._mark: float | None = None
        self._in_schedule = False

    @property
    def parts(self) -> Parts:
        return replace(self._sums)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the script's forward step, in training."""
        self._lap("backward" if self._in_schedule else "between")
        self._in_schedule = True
        try:
            yield
        finally:
            self._lap("forward")

    def end_backward(self) -> None:
        self._lap("backward")

    def end_step(self) -> None:
        self._lap("gradients")
        self._in_schedule = False

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        if self._mark is not None:  # what was before the first step belongs to none
            setattr(self._sums, part, getattr(self._sums, part) + now - self._mark)
        self._mark = now
