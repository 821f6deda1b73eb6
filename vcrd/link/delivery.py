"""The teacher rank's sending half: at most a few responses under way, and a thread that sees them arrive."""

from __future__ import annotations

import queue
import threading

import torch.distributed as dist

from .channel import Channel
from .errors import StudentLost
from .intake import Intake
from .plan import Roster

_UNDER_WAY = 4  # responses, each of which holds its encoded copy


class Delivery:
    """Waits, in the order of posting, until what was posted has been taken; one thread.

    timeout: seconds in which a student must take what is next for it. The clock of a response starts when the
    one before it is done, so a slow network that moves is never taken for a lost student.
    """

    def __init__(self, channel: Channel, roster: Roster, intake: Intake, timeout: float) -> None:
        self._channel = channel
        self._roster = roster
        self._intake = intake
        self._timeout = timeout
        self._room = threading.Semaphore(_UNDER_WAY)
        self._posted: queue.SimpleQueue[list[tuple[int, dist.Work]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="vcrd-link-delivery", daemon=True)
        self._thread.start()

    def wait_for_room(self) -> None:
        """Blocks while as many responses are under way as may be. Returns at once on a link that failed."""
        self._room.acquire()

    def add(self, works: list[tuple[int, dist.Work]]) -> None:
        """The sends of one response, each with its receiver; after `wait_for_room`."""
        self._posted.put(works)

    def stop(self, seconds: float) -> None:
        """Ends the thread, after what is posted or once the channel is closed."""
        self._posted.put(None)
        self._thread.join(seconds)

    def _watch(self) -> None:
        while (works := self._posted.get()) is not None:
            if self._intake.failure is None:
                self._complete(works)
            works.clear()  # with them go the encoded copies
            self._room.release()

    def _complete(self, works: list[tuple[int, dist.Work]]) -> None:
        for student, work in works:
            try:
                self._channel.complete(work, self._timeout)
            except ConnectionError:
                self._intake.fail(StudentLost(f"{self._roster.describe(student)} closed its connection"))
            except TimeoutError as error:
                self._intake.fail(StudentLost(f"{self._roster.describe(student)} {error}"))
