"""The teacher of another job, as the plug sees it: asked for each micro-batch ahead, it answers over the link."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from vcrd.link.answers import Hidden, TopK
from vcrd.link.handshake import Tokenizer
from vcrd.link.plan import context_rows
from vcrd.link.rendezvous import Rendezvous, host_rendezvous
from vcrd.link.student import StudentLink, Waits
from vcrd.megatron.borders import Doubts, look_for_borders, look_for_other_edges, refuse_other_split
from vcrd.megatron.layout import Layout
from vcrd.megatron.packing import edges_in, packed
from vcrd.megatron.prefetch import Prefetcher, TokensOf, question, tokens_in
from vcrd.megatron.random_state import EvaluationState, WhoDraws
from vcrd.megatron.replay import ReplayIterator, keeps_micro_batches, running_again
from vcrd.settings import DistillSettings
from vcrd.teacher_logits import HiddenStates, TopKLogits

_log = logging.getLogger("vcrd")
TeacherForm = Tensor | TopKLogits | HiddenStates


class RemoteTeacher:
    """On every rank `host`, then on ranks of the last stage `connect`, and for each micro-batch `watched` and `answer`.

    waited: seconds that this rank stood still for answers. waits: for what. bytes_received: of payload.

    A step that Megatron runs again, rewinding its micro-batches, asks for them again. The answers to what was asked
    ahead come first; every rank keeps them for later. The rank that asks tells the others how many they are, by one
    all-reduce of an integer over the tensor- and context-parallel ranks when a step begins again.

    What is asked ahead, and how often, changes no sample and no state that a checkpoint saves: see `Prefetcher`.

    The first micro-batch is asked for when the model is called (`given`): its arguments say whether the edges of packed
    sequences come from the micro-batch. If so, or if nothing is packed, later ones are asked for ahead. Where the
    script makes the edges in its step, none is.
    """

    def __init__(self, settings: DistillSettings, tokens_of: TokensOf) -> None:
        self._settings = settings
        self._tokens_of = tokens_of
        self._rendezvous: Rendezvous | None = None
        self._link: StudentLink | None = None
        self._layout: Layout | None = None
        self._credit = settings.link.credits
        self._ahead: Prefetcher | None = None
        self._who_draws = WhoDraws()
        self._evaluation = EvaluationState()
        self._step_ended = False
        self._again: ReplayIterator | None = None  # while a step is run again
        self._source: Any = None  # the script's iterator, of which both draw
        self._drawn = 0  # from iterators that were replaced
        self._running_again = False
        self._agreed = False  # on the first micro-batch, between the ranks that share its answers
        self._late = True  # whether micro-batches are asked for when the model is called
        self._told = 0  # micro-batches whose arguments were seen
        self._doubts = Doubts()
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
                self._again = ReplayIterator(data_iterator, self._link.request, self._tokens_of, self._ahead)
                self._again.late = self._late
            return self._again
        if self._again is not None:
            self._drawn += self._again.drawn
            self._again = None
        return data_iterator if keeps_micro_batches(data_iterator) else self._ahead

    def _look_ahead(self, data_iterator: Any) -> None:
        if self._source is not data_iterator:
            self._replace_iterator(data_iterator)
        if self._step_ended and not running_again():
            self._step_ended = False
            self._ahead.begin_step()

    def _replace_iterator(self, data_iterator: Any) -> None:
        if self._ahead is not None:
            if self._ahead.pending:
                raise ValueError(
                    f"data_iterator: expected the one of before, from which {self._ahead.pending} micro-batches were "
                    "asked of the teacher and not yet drawn, got another one (with credits 0 none is asked for early)"
                )
            self._let_go_of_iterator()
        self._source = data_iterator
        rewinds = keeps_micro_batches(data_iterator)
        source = data_iterator.iterable if rewinds else data_iterator
        credit = 0 if self._credit and _saves_unseen(source, rewinds) else self._credit
        self._ahead = Prefetcher(
            source, self._link.request, credit, self._tokens_of, self._who_draws, _micro_batches_of_step
        )
        self._ahead.late = self._late
        if rewinds:
            data_iterator.iterable = self._ahead

    def _let_go_of_iterator(self) -> None:
        """Leaves Megatron's iterator as it was found, where nobody else has changed it since."""
        self._ahead.stop()
        if keeps_micro_batches(self._source) and self._source.iterable is self._ahead:
            self._source.iterable = self._ahead.source
        self._drawn += self._ahead.drawn
        self._ahead = self._source = None

    def _take_what_is_pending(self) -> None:
        """Answers come in the order of the questions: what was asked ahead before what is asked again."""
        pending = 0 if self._ahead is None else self._ahead.pending
        if self._layout.tensor_size * self._layout.context_size > 1:
            told = torch.tensor([pending], device=self._layout.device)  # 0 on all ranks but the one that asks
            dist.all_reduce(told, group=parallel_state.get_tensor_and_context_parallel_group())
            pending = int(told)
        while len(self._kept) < pending:
            self._kept.append(self._receive())

    def _receive(self) -> Any:
        self._received += 1
        return self._link.receive(self._received - 1)

    def alongside(self, chunk: Any) -> contextlib.AbstractContextManager[None]:
        """Around a forward step of a chunk of the student's: nothing, for this teacher runs elsewhere."""
        self._evaluation.over()
        return contextlib.nullcontext()

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Around each forward step of an evaluation, on every rank: the random state of training stays as it is."""
        return self._evaluation.aside()

    def end_step(self) -> None:
        """A training step has ended, on every rank: it has shown who draws from which generator."""
        self._who_draws.end_step()
        self._step_ended = True

    def given(self, arguments: dict[str, Any]) -> None:
        """Before the model's forward, on every rank of the last stage: its arguments by name.

        Asks for what is asked late, and compares the borders that the arguments show with those that the teacher was
        told. ValueError where it would look across a border: with the first micro-batch on every tensor- and
        context-parallel rank alike, by a broadcast of some bytes to either; later on the rank that asks, where findings
        on a GPU are waited for with the next micro-batch.
        """
        problem = None
        if self._layout.asks:
            try:
                self._see(arguments)
            except ValueError as error:
                problem = error
        first = not self._agreed
        if first:
            problem = self._agree(problem)
        if problem is not None:
            raise problem
        if first and self._ahead is not None:
            self._ahead.late = self._late

    def _see(self, arguments: dict[str, Any]) -> None:
        iterator = self._ahead if self._again is None else self._again
        drawn = self._count_drawn()
        if drawn == self._told:  # nothing was drawn, or the model is called again
            return
        self._told = drawn
        self._settle()
        batch, split = iterator.batch, self._layout.context_size > 1
        by_batch, by_model = edges_in(batch), edges_in(arguments)
        if split:
            refuse_other_split(batch, arguments)
        if iterator.late:
            if not self._agreed:
                self._late = self._credit == 0 or (by_batch is None and by_model is not None)
            # With context parallelism the model is given a part of the tokens.
            known = {**arguments, "input_ids": None} if split else arguments
            tokens, edges = question(batch, self._tokens_of, known)
            self._link.request(tokens, edges)
        elif by_batch is None and by_model is not None:
            raise ValueError(
                f"{by_model[0]}: expected in the micro-batch, or among the model's arguments from the first one on, "
                "got it later: the teacher was asked ahead and without it (with credits 0 none is asked for early)"
            )
        else:
            tokens, edges = packed(batch, tokens_in(batch, self._tokens_of))
        rows, width = tokens.shape
        spans = context_rows(width, 0, self._layout.context_size, edges.tolist())
        columns = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        if by_model is not None:
            look_for_other_edges(self._doubts, *by_model, edges, width)
        look_for_borders(self._doubts, arguments, edges, columns, rows, (arguments, batch))
        self._doubts.send()
        if not self._agreed or self._layout.device.type != "cuda":
            self._settle()

    def _settle(self) -> None:
        doubts, self._doubts = self._doubts, Doubts()
        doubts.check()

    def _agree(self, problem: ValueError | None) -> ValueError | None:
        """What the rank that asks found with the first micro-batch, on every rank that shares its answers."""
        said = [None if problem is None else str(problem), self._late]
        layout = self._layout
        context = parallel_state.get_context_parallel_group() if layout.context_size > 1 else None
        for group in (context, layout.tensor_group):
            if group is not None:
                dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group=group)
        self._agreed = True
        sentence, self._late = said
        if self._late:
            self._credit = 0
        return problem if problem is not None or sentence is None else ValueError(sentence)

    def answer(self, number: int) -> TeacherForm:
        """The teacher's answer to micro-batch `number`, in the form that the loss takes; blocks until it is here."""
        drawn = self._count_drawn()
        if self._layout.asks and drawn != number + 1:
            raise ValueError(
                "data_iterator: expected forward_step to draw one micro-batch from it per call, got none or several"
            )
        kept = self._kept and not self._running_again
        answer = self._kept.popleft() if kept else self._receive()
        if isinstance(answer, TopK):
            return TopKLogits(answer.logprobs, answer.ids, answer.log_tail)
        return self._hidden_states(answer) if isinstance(answer, Hidden) else answer

    def _count_drawn(self) -> int:
        return self._drawn + sum(each.drawn for each in (self._ahead, self._again) if each is not None)

    def _hidden_states(self, answer: Hidden) -> HiddenStates:
        if self._head_weight is None:
            # On the CPU the loss multiplies in float32: converted here once, not once per micro-batch.
            self._head_weight = answer.weight if answer.weight.is_cuda else answer.weight.float()
        return HiddenStates(answer.states, self._head_weight, answer.scale, answer.softcap or None)

    def close(self) -> None:
        """Says goodbye and leaves the data iterator as it was found. Idempotent; not a collective. ValueError as of
        `given`, for the last micro-batch.

        What was drawn ahead and not trained on is gone: the iterator goes on after it.
        """
        if self._ahead is not None:
            if self._ahead.pending and hasattr(self._ahead, "save_state"):
                _log.warning(
                    "%d micro-batches were drawn ahead and not trained on; a state that the data loader saves from "
                    "here on counts them",
                    self._ahead.pending,
                )
            self._let_go_of_iterator()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._rendezvous is not None:
            self._rendezvous.close()
            self._rendezvous = None
        self._settle()


def _micro_batches_of_step() -> int:
    """Of one data-parallel rank, as Megatron's calculator says; 0 where the script counts by itself."""
    try:
        return get_num_microbatches()
    except AttributeError:  # there is no calculator
        return 0


def _saves_unseen(source: Any, rewinds: bool) -> bool:
    """Whether the script saves this iterator's state by itself, where what was drawn ahead would be counted.

    Megatron asks its own iterator for the `save_state` of what it draws from, and gets ours.
    """
    names = [name for name in ("save_state", "state_dict") if hasattr(source, name)]
    unseen = [name for name in names if not (rewinds and name == "save_state")]
    if unseen and len(unseen) == len(names):
        _log.warning(
            "credits is 0 for this data iterator: a %s has its own %s(), which would count micro-batches that were "
            "drawn ahead and not trained on; Megatron's RerunDataIterator around one with save_state() allows more",
            type(source).__name__,
            unseen[0],
        )
        return True
    return False
