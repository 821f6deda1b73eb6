"""Where the processes of one doctor meet: a store on rank 0, and gatherings that wait for nobody for ever."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vcrd.doctor.findings import first_line
from vcrd.doctor.world import World

_SLACK = 10.0  # seconds that others give rank 0 beyond its own patience
_LEAVING = 5.0  # seconds that rank 0 stays for those that have not read the last gathering


class Unreachable(RuntimeError):
    """The store cannot be opened or is not there (any more). One sentence."""


class Gathering:
    """Joins on construction; `gather` is collective.

    seconds: how long rank 0 waits for the others at each gathering. Who was missing at one is at no later one.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.world = world
        self.present = list(range(world.size))
        self._seconds = seconds
        self._number = 0
        master = world.rank == 0 and not world.hosted
        try:
            store = dist.TCPStore(
                world.host,
                world.port,
                is_master=master,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except (RuntimeError, ValueError) as error:
            what = "cannot listen at" if master else "is not reached at"
            raise Unreachable(
                f"rank 0 {what} {world.host}:{world.port}"
                + ("" if master else f" from {world.node} within {seconds:g} seconds")
                + f" ({_reason(error)})"
            ) from None
        self._store = dist.PrefixStore("vcrd-doctor", store)

    def gather(self, value: Any, seconds: float = 0.0) -> dict[int, Any]:
        """What each rank that came gave, by rank; JSON values. seconds: that they may need for it beyond waiting.

        Raises Unreachable where rank 0 is gone, or has given this rank up.
        """
        self._number += 1
        patience = self._seconds + seconds
        try:
            self._store.set(self._key(self.world.rank), json.dumps(value))
            if self.world.rank == 0:
                self._publish(time.monotonic() + patience)
            self._store.wait([self._key("all")], timedelta(seconds=patience + _SLACK))
            found = json.loads(self._store.get(self._key("all")))
        except (RuntimeError, ValueError) as error:
            raise Unreachable(f"rank 0 does not answer {self.world.node} ({_reason(error)})") from None
        if str(self.world.rank) not in found:
            raise Unreachable(
                f"rank {self.world.rank} on {self.world.node} came too late: rank 0 went on without it"
            )
        self.present = sorted(map(int, found))
        return {int(rank): given for rank, given in found.items()}

    def leave(self) -> None:
        """After the last gathering: rank 0 hosts the store until all have read it. Never fails."""
        try:
            gone = self._store.add("gone", 1)
            deadline = time.monotonic() + _LEAVING
            while self.world.rank == 0 and gone < len(self.present) and time.monotonic() < deadline:
                time.sleep(0.01)
                gone = self._store.add("gone", 0)
        except RuntimeError:
            pass

    def _publish(self, deadline: float) -> None:
        waited, found = list(self.present), {}
        while waited:
            came = [rank for rank in waited if self._store.check([self._key(rank)])]
            found |= {rank: json.loads(self._store.get(self._key(rank))) for rank in came}
            waited = [rank for rank in waited if rank not in came]
            if waited and time.monotonic() > deadline:
                break
            if waited:
                time.sleep(0.02)
        self._store.set(self._key("all"), json.dumps(found))

    def _key(self, name: int | str) -> str:
        return f"{self._number}/{name}"


def _reason(error: BaseException) -> str:
    """torch's messages go on with where in its sources they come from."""
    return first_line(error).partition(". This may")[0].partition(" Exception raised")[0][:200]
