"""Adds the answers of a teacher job to a folder, in a thread of each rank of the student."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vcrd.link.buffers import HostMemory, Staged
from vcrd.link.plan import Place
from vcrd.link.student import StudentLink
from vcrd.teacher_logits import DenseLogits, TeacherLogits, TopKLogits

from .files import CacheError, CacheWriter
from .reading import Plan
from .sequences import held_by

_log = logging.getLogger("vcrd")
_WAITING = 4  # answers that may wait for the thread; the training waits where there are more


class Recorder:
    """Adds this rank's columns and positions of answers. A folder that cannot be written to stops no training: a
    warning says so, and nothing more is added.

    Answers that do not depend on the columns are added by tensor rank 0. has_head: whether the folder has the output
    layer of the teacher already, which the payload "hidden" needs.
    """

    def __init__(
        self,
        writer: CacheWriter,
        link: StudentLink,
        place: Place,
        context_size: int,
        device: torch.device,
        has_head: bool,
    ) -> None:
        self._writer = writer
        self._link = link
        self._place = place
        self._context_size = context_size
        whole = writer.header.content().whole
        self._adds_answers = place.tensor == 0 if whole else link.columns.width > 0
        # One replica is enough. A context rank has no other rows of the output layer than the first one.
        self._adds_head = (
            writer.header.head is not None and not has_head and not (place.data or place.context)
        )
        # A stream of its own: it waits for the training, for which the copies of answers to the device do not wait.
        self._stream = HostMemory(device).stream(device)
        self._adds_more = True
        self._broken = False  # whether the folder could not be written to
        self._queue: queue.Queue[tuple[Plan, list[Staged]] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="vcrd-cache-recorder", daemon=True)
        self._thread.start()

    def add(self, plan: Plan, answer: TeacherLogits) -> None:
        """Adds what the folder lacks of a micro-batch. Blocks where the file system is slower than the teacher."""
        if not (self._adds_more and (self._adds_head or (self._adds_answers and plan.lacking))):
            return
        if another := self._another_teacher():
            self._stop(another)  # what was added before is right, and is written still
            return
        self._queue.put((plan, [Staged(tensor, self._stream) for tensor in tensors_of(answer)]))

    def close(self) -> None:
        """Writes what was added, and ends the thread. Idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._try(self._add, *item)
        self._try(self._writer.close)

    def _try(self, write: Callable[..., None], *arguments: Any) -> None:
        if self._broken:
            return
        try:
            write(*arguments)
        except Exception as error:
            self._broken = True
            self._stop(error)

    def _stop(self, why: object) -> None:
        if self._adds_more:
            _log.warning("%s adds no more answers to the cache: %s", self._place, why)
        self._adds_more = False

    def _another_teacher(self) -> str | None:
        """Why answers are not of the folder's teacher: with the setting identity "warn" another one may come back."""
        now, then = self._link.teacher, self._writer.header
        if now.weights == then.weights:
            return None
        return f"the teacher has the weights {now.named_weights}, the cache is of {then.weights}"

    def _add(self, plan: Plan, staged: list[Staged]) -> None:
        if self._adds_head:
            layer = self._link.output_layer
            # It may have arrived after the teacher whose answer this is was lost.
            if another := self._another_teacher():
                raise CacheError(another)
            self._writer.add_head(layer, self._link.columns)
            self._adds_head = False
        if not self._adds_answers:
            return
        tensors, parts = [each.ready() for each in staged], plan.parts
        for index in plan.lacking:
            part = parts[index]
            held = held_by(part, self._place.context, self._context_size)
            first = held.first
            for rows in held.rows:
                own = [tensor[first : first + rows.width, part.row] for tensor in tensors]
                self._writer.add(plan.keys[index], own, rows, part.width, self._link.columns)
                first += rows.width


def tensors_of(answer: TeacherLogits) -> list[Tensor]:
    """The tensors of an answer, in the order of its payload."""
    if isinstance(answer, DenseLogits):
        return [answer.logits]
    if isinstance(answer, TopKLogits):
        return [answer.logprobs, answer.ids, answer.log_tail]
    return [answer.states]
