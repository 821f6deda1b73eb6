"""What a student rank waited for: what tells a slow network from a slow teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import sub


@dataclass
class Waits:
    """Running sums of one rank. seconds: stood still for answers. arriving: of these, while bytes of the teacher's were
    on their way in; while_lost: while no teacher was there; in the rest of them it had not begun to answer. answers:
    how many were taken; late: of these, how many were not there when they were needed: by what had arrived, not by the
    time that it took, for an idle machine may need milliseconds to wake.
    """

    seconds: float = 0.0
    arriving: float = 0.0
    while_lost: float = 0.0
    answers: int = 0
    late: int = 0

    @contextmanager
    def counted(self, there: bool, seconds_arriving: Callable[[], float]) -> Iterator[None]:
        """Around the wait for one answer. there: whether it is complete already; seconds_arriving: how long, up to now,
        anything was arriving.
        """
        begun, before = time.perf_counter(), seconds_arriving()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begun
            self.seconds += seconds
            self.arriving += min(seconds, seconds_arriving() - before)
            self.answers += 1
            self.late += not there

    @contextmanager
    def lost(self, gone: bool) -> Iterator[None]:
        """Inside `counted`, around a part of the wait; gone: whether no teacher is there in it."""
        begun = time.perf_counter()
        yield
        self.while_lost += gone * (time.perf_counter() - begun)

    def since(self, before: Waits) -> Waits:
        """What was added since a copy was made."""
        return Waits(*map(sub, vars(self).values(), vars(before).values()))
