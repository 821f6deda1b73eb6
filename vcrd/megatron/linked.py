"""The teacher of another job, as the plug sees it: asked for each micro-batch ahead, it answers over the link."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.link.answers import Hidden, TopK
from vcrd.link.facts import Tokenizer
from vcrd.link.rendezvous import Rendezvous, host_rendezvous
from vcrd.link.student import StudentLink
from vcrd.link.waits import Waits
from vcrd.megatron.ahead import AskAhead, TokensOf
from vcrd.megatron.layout import Layout
from vcrd.megatron.rerun import AskAgain, keeps_micro_batches, running_again
from vcrd.megatron.settings import DistillSettings
from vcrd.teacher_forms import HiddenStates, TopKLogits

_log = logging.getLogger("vcrd")
TeacherForm = Tensor | TopKLogits | HiddenStates


class LinkedTeacher:
    """On every rank `host`, then on ranks of the last stage `connect`, and for each micro-batch `watched` and `answer`.

    waited: seconds that this rank stood still for answers. waits: for what. bytes_received: of payload.

    A step that Megatron runs again, rewinding its micro-batches, asks for them again. The answers to what was asked
    ahead come first; every rank keeps them for later. It has `ahead` of them, so ranks need not tell each other.
    """

    def __init__(self, settings: DistillSettings, tokens_of: TokensOf) -> None:
        self._settings = settings
        self._tokens_of = tokens_of
        self._rendezvous: Rendezvous | None = None
        self._link: StudentLink | None = None
        self._layout: Layout | None = None
        self._credit = settings.link.credits if settings.ahead is None else settings.ahead
        self._ahead: AskAhead | None = None
        self._again: AskAgain | None = None  # while a step is run again
        self._source: Any = None  # the script's iterator, of which both draw
        self._drawn = 0  # from iterators that were replaced
        self._running_again = False
        self._received = 0  # answers taken from the link
        self._kept: deque[Any] = deque()  # of these, those to micro-batches that are still to be drawn
        self._head_weight: Tensor | None = None  # of the teacher's output layer, as it is multiplied

    @property
    def waited(self) -> float:
        return 0.0 if self._link is None else self._link.waited

    @property
    def waits(self) -> Waits:
        return Waits() if self._link is None else replace(self._link.waits)

    @property
    def served_by(self) -> tuple[int | None, int]:
        """The replica that serves this rank, None where there is none, and how many there are."""
        return (None, 0) if self._link is None else self._link.served_by

    @property
    def bytes_received(self) -> int:
        return 0 if self._link is None else self._link.bytes_received

    def host(self) -> None:
        """Opens the rendezvous on rank 0 of the job, the first time."""
        if self._rendezvous is None and self._link is None and dist.get_rank() == 0:
            self._rendezvous = host_rendezvous(self._settings.link)

    def connect(self, layout: Layout, tokenizer: Tokenizer | None) -> None:
        """Waits for the teacher's job, the first time. tokenizer: of the student, to be compared with the teacher's."""
        if self._link is None:
            if tokenizer is None and layout.asks and layout.data_rank == 0:
                _log.warning(
                    "tokenizer: not known in the student's job, so it is not compared: pass one to distill()"
                )
            self._layout = layout
            self._link = layout.connect(self._settings, tokenizer)

    def watched(self, data_iterator: Any) -> Any:
        """On the rank that asks: the iterator that looks ahead. Elsewhere the script's own.

        Megatron's iterator that can rewind stays what the script draws from, and looks ahead in its own source: what it
        keeps, and says of itself in a checkpoint, are the micro-batches of the step alone.
        """
        if self._layout.asks and data_iterator is not None:
            self._look_ahead(data_iterator)
        again, before = running_again(), self._running_again
        self._running_again = again
        if again and not before:
            self._take_what_is_pending()
        if not self._layout.asks or data_iterator is None:
            return data_iterator
        if again:
            if not before:
                self._again = AskAgain(data_iterator, self._link.request, self._tokens_of)
            return self._again
        if self._again is not None:
            self._drawn += self._again.drawn
            self._again = None
        return data_iterator if keeps_micro_batches(data_iterator) else self._ahead

    def _look_ahead(self, data_iterator: Any) -> None:
        if self._source is data_iterator:
            return
        if self._ahead is not None:
            if self._ahead.pending:
                raise ValueError(
                    f"data_iterator: expected the one of before, from which {self._ahead.pending} micro-batches were "
                    "asked of the teacher and not yet drawn, got another one (ahead=0 asks for none early)"
                )
            self._ahead.stop()
            self._drawn += self._ahead.drawn
        self._source = data_iterator
        rewinds = keeps_micro_batches(data_iterator)
        source = data_iterator.iterable if rewinds else data_iterator
        self._ahead = AskAhead(source, self._link.request, self._credit, self._tokens_of)
        if rewinds:
            data_iterator.iterable = self._ahead

    def _take_what_is_pending(self) -> None:
        """Answers come in the order of the questions: what was asked ahead before what is asked again."""
        if self._ahead is not None:
            self._ahead.fill()
            # Where the data ends there are fewer: the rest is asked for nobody, now or when a step before this one was
            # run again.
            for _ in range(self._credit - max(len(self._kept), self._ahead.pending)):
                self._link.request(torch.zeros(1, 2 * self._layout.context_size, dtype=torch.int64))
        while len(self._kept) < self._credit:
            self._kept.append(self._receive())

    def _receive(self) -> Any:
        self._received += 1
        return self._link.receive(self._received - 1)

    def alongside(self, chunk: Any) -> contextlib.AbstractContextManager[None]:
        """Around a forward step of a chunk of the student's: nothing, for this teacher runs elsewhere."""
        return contextlib.nullcontext()

    def answer(self, number: int) -> TeacherForm:
        """The teacher's answer to micro-batch `number`, in the form that the loss takes; blocks until it is here."""
        drawn = self._drawn + sum(each.drawn for each in (self._ahead, self._again) if each is not None)
        if self._layout.asks and drawn != number + 1:
            raise ValueError(
                "data_iterator: expected forward_step to draw one micro-batch from it per call, got none or several"
            )
        kept = self._kept and not self._running_again
        answer = self._kept.popleft() if kept else self._receive()
        if isinstance(answer, TopK):
            return TopKLogits(answer.logprobs, answer.ids, answer.log_tail)
        return self._hidden_states(answer) if isinstance(answer, Hidden) else answer

    def _hidden_states(self, answer: Hidden) -> HiddenStates:
        if self._head_weight is None:
            # On the CPU the loss multiplies in float32: converted here once, not once per micro-batch.
            self._head_weight = answer.weight if answer.weight.is_cuda else answer.weight.float()
        return HiddenStates(answer.states, self._head_weight, answer.scale, answer.softcap or None)

    def close(self) -> None:
        """Says goodbye. Idempotent; not a collective."""
        if self._ahead is not None:
            self._ahead.stop()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
