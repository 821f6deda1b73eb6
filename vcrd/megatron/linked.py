"""The teacher of another job, as the plug sees it: asked for each micro-batch ahead, it answers over the link."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vcrd.link.answers import Hidden, TopK
from vcrd.link.rendezvous import Rendezvous, host_rendezvous
from vcrd.link.student import StudentLink
from vcrd.megatron.ahead import AskAhead, TokensOf
from vcrd.megatron.layout import Layout
from vcrd.megatron.settings import DistillSettings
from vcrd.teacher_forms import HiddenStates, TopKLogits

TeacherForm = Tensor | TopKLogits | HiddenStates


class LinkedTeacher:
    """On every rank `host`, then on ranks of the last stage `connect`, and for each micro-batch `watched` and `answer`.

    waited: seconds that this rank stood still for answers. bytes_received: of payload.
    """

    def __init__(self, settings: DistillSettings, tokens_of: TokensOf) -> None:
        self._settings = settings
        self._tokens_of = tokens_of
        self._rendezvous: Rendezvous | None = None
        self._link: StudentLink | None = None
        self._layout: Layout | None = None
        self._ahead: AskAhead | None = None
        self._head_weight: Tensor | None = None  # of the teacher's output layer, as it is multiplied

    @property
    def waited(self) -> float:
        return 0.0 if self._link is None else self._link.waited

    @property
    def bytes_received(self) -> int:
        return 0 if self._link is None else self._link.bytes_received

    def host(self) -> None:
        """Opens the rendezvous on rank 0 of the job, the first time."""
        if self._rendezvous is None and self._link is None and dist.get_rank() == 0:
            self._rendezvous = host_rendezvous(self._settings.link)

    def connect(self, layout: Layout) -> None:
        """Waits for the teacher's job, the first time."""
        if self._link is None:
            self._layout = layout
            self._link = layout.connect(self._settings)

    def watched(self, data_iterator: Any) -> Any:
        """On the rank that asks: the iterator that looks ahead. Elsewhere the script's own."""
        if not self._layout.asks or data_iterator is None:
            return data_iterator
        if self._ahead is not None and self._ahead.source is data_iterator:
            return self._ahead
        if self._ahead is not None and self._ahead.pending:
            raise ValueError(
                f"data_iterator: expected the one of before, from which {self._ahead.pending} micro-batches were "
                "asked of the teacher and not yet drawn, got another one (ahead=0 asks for none early)"
            )
        ahead = self._settings.link.credits if self._settings.ahead is None else self._settings.ahead
        self._ahead = AskAhead(data_iterator, self._link.request, ahead, self._tokens_of)
        return self._ahead

    def alongside(self, chunk: Any) -> contextlib.AbstractContextManager[None]:
        """Around a forward step of a chunk of the student's: nothing, for this teacher runs elsewhere."""
        return contextlib.nullcontext()

    def answer(self, number: int) -> TeacherForm:
        """The teacher's answer to micro-batch `number`, in the form that the loss takes; blocks until it is here."""
        if self._layout.asks and (self._ahead is None or self._ahead.number != number):
            raise ValueError(
                "data_iterator: expected forward_step to draw one micro-batch from it per call, got none or several"
            )
        answer = self._link.receive(number)
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
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
