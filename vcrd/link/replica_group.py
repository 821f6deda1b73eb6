"""All ranks of one teacher replica, kept in step by small collectives over the group of the caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import HandshakeRefused, LinkError, StudentLost

KEEPALIVE = 1.0  # seconds between collectives while rank 0 has no news, far below the timeout of any group
_TEXT = 1024  # bytes of a reason that the ranks share


class Outcome(IntEnum):
    """How a task ended. The outcome of the replica is the largest one over its ranks."""

    WAITING = 0
    DONE = 1
    LOST = 2
    BROKEN = 3
    REFUSED = 4


class ReplicaGroup:
    """The ranks of a replica, led by rank 0. `group` None: this rank is the whole replica.

    Every method is a collective over the group. LinkError when another rank of the replica is gone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        # A backend that supports one kind of device decides where the small control tensors are.
        on_gpu = self.size > 1 and "gloo" not in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        # Reading the results makes the host wait: for these small collectives, but not for the model of the teacher.
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def agree(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks."""
        with self._aside():
            tensor = self._tensor(values)
            self._run(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group))
            return tensor.tolist()

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """The values of every rank, in rank order."""
        with self._aside():
            tensor = self._tensor(values)
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            if self.size == 1:
                return [tensor.tolist()]
            self._run(lambda: dist.all_gather(parts, tensor, group=self._group))
            return [part.tolist() for part in parts]

    def share(self, tensor: Tensor | None, shape: Sequence[int]) -> Tensor:
        """Rank 0's int64 tensor of `shape`, on the CPU; the other ranks pass None."""
        if tensor is None:
            tensor = torch.empty(*shape, dtype=torch.int64)
        with self._aside():
            tensor = tensor.to(self._device)
            self._run(
                lambda: dist.broadcast(tensor, src=dist.get_global_rank(self._group, 0), group=self._group)
            )
            return tensor.cpu()

    def conclude(self, outcome: Outcome, text: str) -> None:
        """Ends a common task. Returns if it is DONE on every rank, else raises the same error on every rank."""
        self._conclude(self.agree([outcome])[0], outcome, text)

    def follow_leader(self, task: Callable[[Callable[[], None]], str]) -> str:
        """Runs `task(tick)` on rank 0 alone. Every rank returns its text, or raises its LinkError.

        The task calls `tick` while it waits, which keeps the other ranks from a timeout of their collective.
        """
        if not self.leads:
            while (worst := self.agree([Outcome.WAITING])[0]) == Outcome.WAITING:
                pass
            self._conclude(worst, Outcome.WAITING, "")
            return self.share_text("")
        result = ""
        try:
            outcome, text, result = Outcome.DONE, "", task(self._ticker())
        except LinkError as error:
            outcome, text = outcome_of(error), str(error)
        except Exception as error:  # the other ranks must get every error
            outcome, text = Outcome.BROKEN, f"rank 0 of this teacher replica failed: {error!r}"
        self.conclude(outcome, text)
        return self.share_text(result)

    def first_text(self, text: str) -> str:
        """The text of the first rank that has one, on every rank; "" if no rank has one. At most 1 KB."""
        if not self.agree([bool(text)])[0]:
            return ""
        raw = text.encode()[:_TEXT]
        rows = self.gather([len(raw), *raw, *bytes(_TEXT - len(raw))])
        length, *content = next(row for row in rows if row[0])
        return bytes(content[:length]).decode(errors="replace")

    def share_text(self, text: str) -> str:
        """Rank 0's text on every rank, of any length."""
        raw = text.encode()
        length = self.agree([len(raw) if self.leads else 0])[0]
        table = torch.tensor(list(raw), dtype=torch.int64) if self.leads else None
        return bytes(self.share(table, (length,)).tolist()).decode() if length else ""

    def _ticker(self) -> Callable[[], None]:
        last = time.monotonic()

        def tick() -> None:
            nonlocal last
            if time.monotonic() - last > KEEPALIVE:
                self.agree([Outcome.WAITING])
                last = time.monotonic()

        return tick

    def _conclude(self, worst: int, own: Outcome, text: str) -> None:
        if worst == Outcome.DONE:
            return
        raw = text.encode()[:_TEXT]
        rows = self.gather([own, len(raw), *raw, *bytes(_TEXT - len(raw))])
        # The text is that of the first rank whose outcome is the one of the replica.
        length, *content = next(row for row in rows if row[0] == worst)[1:]
        text = bytes(content[:length]).decode(errors="replace")
        raise {Outcome.LOST: StudentLost, Outcome.REFUSED: HandshakeRefused}.get(Outcome(worst), LinkError)(
            text
        )

    def _aside(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _run(self, collective: Callable[[], None]) -> None:
        if self.size == 1:
            return
        try:
            collective()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LinkError(f"a rank of this teacher replica is lost: {reason}") from error


def outcome_of(error: LinkError) -> Outcome:
    """The outcome that carries an error of this class to the other ranks."""
    if isinstance(error, HandshakeRefused):
        return Outcome.REFUSED
    return Outcome.LOST if isinstance(error, StudentLost) else Outcome.BROKEN
