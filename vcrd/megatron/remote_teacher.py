"""Teachers in jobs of their own: they are asked for micro-batches ahead of time, and answer over the link."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches

from vcrd.errors import expected
from vcrd.link.handshake import Tokenizer
from vcrd.link.plan import context_rows
from vcrd.link.rendezvous import Rendezvous
from vcrd.link.student import Waits
from vcrd.megatron.layout import Layout
from vcrd.megatron.packing import (
    Doubts,
    edges_in,
    look_for_borders,
    look_for_other_edges,
    packed,
    refuse_other_split,
)
from vcrd.megatron.prefetch import (
    Prefetcher,
    ReplayIterator,
    TokensOf,
    keeps_micro_batches,
    question_of,
    running_again,
    tokens_in,
)
from vcrd.megatron.privileged import AskedTwice, Judged
from vcrd.megatron.random_state import EvaluationState, WhoDraws
from vcrd.megatron.sources import host_source, open_source
from vcrd.megatron.teacher_context import without_fields
from vcrd.megatron.teachers import Answer, Counters, Teachers, naming
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")


class RemoteTeacher:
    """On every rank `host`, then on ranks of the last stage `connect`, and for each micro-batch `watched` and `answer`.

    names: of the teachers, in the order of the settings; that of an only teacher may be "".
    waits: how long this rank waited for answers, and for what. bytes_received: payload bytes.

    When Megatron runs a step again, it rewinds its micro-batches, and the teacher is asked for them again. Answers to
    what was asked ahead arrive first, and every rank keeps them for later. The rank that asks tells the others their
    number, by one all-reduce of an integer over the tensor- and context-parallel ranks when a step begins again.

    Asking ahead changes no sample and no state that a checkpoint saves: see `Prefetcher`.

    The first micro-batch is asked for when the model is called (`given`), because its arguments show whether the edges
    of packed sequences come from the micro-batch. If they do, or if nothing is packed, later ones are asked for ahead.
    If the script makes the edges in its forward step, none is asked for ahead.
    """

    def __init__(self, settings: DistillSettings, tokens_of: TokensOf) -> None:
        self._settings = settings
        self._tokens_of = tokens_of
        self._sources = settings.link.teachers()
        self.names = tuple(source.name for source in self._sources)
        self._rendezvous: list[Rendezvous] = []
        self._teachers: Teachers | None = None
        self._layout: Layout | None = None
        self._credit = settings.link.credits
        self._ahead: Prefetcher | None = None
        self._who_draws = WhoDraws()
        self._evaluation = EvaluationState()
        self._step_ended = False
        self._replay: ReplayIterator | None = None  # while a step is run again
        self._source: Any = None  # the script's iterator, from which both draw
        self._drawn = 0  # micro-batches from iterators that were replaced
        self._running_again = False
        self._agreed = False  # whether the ranks that share answers agree on the first micro-batch
        self._late = True  # whether micro-batches are asked for only when the model is called
        self._seen = 0  # micro-batches whose arguments were seen
        self._doubts = Doubts()
        self._received = 0  # answers taken from the link
        # Of these, answers for micro-batches that are still to be drawn.
        self._kept: deque[Answer | Judged] = deque()

    @property
    def waits(self) -> Waits:
        return Waits() if self._teachers is None else replace(self._teachers.waits)

    def each(self) -> list[Counters]:
        """The running counts of each teacher, in the order of `names`."""
        if self._teachers is None:
            return [Counters(Waits(), (None, 0), 0) for _ in self.names]
        return [
            Counters(replace(source.waits), source.served_by, source.bytes_received)
            for source in self._teachers.sources.values()
        ]

    @property
    def bytes_received(self) -> int:
        return 0 if self._teachers is None else self._teachers.bytes_received

    def host(self) -> None:
        """Opens the rendezvous of each teacher job on rank 0 of the job, the first time."""
        if self._rendezvous or self._teachers is not None or dist.get_rank() != 0:
            return
        opened: list[Rendezvous] = []
        try:
            for source in self._sources:
                with naming(source.name):
                    found = host_source(self._settings.link, source)
                if found is not None:
                    opened.append(found)
        except BaseException:
            for each in opened:
                each.close()
            raise
        self._rendezvous = opened

    def connect(self, layout: Layout, tokenizer: Tokenizer | None) -> None:
        """Waits for the teacher jobs, the first time. tokenizer: the student's, to be compared with the teachers'."""
        if self._teachers is None:
            if tokenizer is None and layout.asks and layout.data_rank == 0:
                _log.warning(
                    "tokenizer: not known in the student job, so it is not compared: pass one to distill()"
                )
            self._layout = layout
            link, found = self._settings.link, {}
            kind = AskedTwice if self._settings.validity == "privileged" else Teachers
            try:
                for source in self._sources:
                    with naming(source.name):
                        found[source.name] = open_source(link, source, layout, tokenizer)
                self._teachers = kind(found, layout, link, self._settings.mixture())
            except BaseException:
                for each in found.values():
                    each.close()
                raise

    def watched(self, data_iterator: Any) -> Any:
        """On the rank that asks: the iterator that draws ahead. On other ranks: the script's own.

        The script goes on drawing from Megatron's iterator that can rewind, whose source becomes the one that draws
        ahead. So what that iterator keeps and saves in a checkpoint are the micro-batches of the step alone.
        """
        again, before = running_again(), self._running_again
        self._running_again = again
        if self._layout.asks and data_iterator is not None and not again:
            self._draw_ahead_of(data_iterator)
        if again and not before:
            self._take_what_is_pending()
        if not self._layout.asks or data_iterator is None:
            return data_iterator
        if again:
            if not before:
                self._replay = ReplayIterator(
                    data_iterator, self._teachers.request, self._tokens_of, self._ahead
                )
                self._replay.late = self._late
            return self._replay
        if self._replay is not None:
            self._drawn += self._replay.drawn
            self._replay = None
        return data_iterator if keeps_micro_batches(data_iterator) else self._ahead

    def watched_before_last(self, data_iterator: Any) -> Any:
        """On earlier stages: the script's own iterator, without fields of vcrd."""
        return without_fields(data_iterator)

    def _draw_ahead_of(self, data_iterator: Any) -> None:
        if self._source is not data_iterator:
            self._replace_iterator(data_iterator)
        if self._step_ended:
            self._step_ended = False
            self._ahead.begin_step()

    def _replace_iterator(self, data_iterator: Any) -> None:
        if self._ahead is not None:
            if self._ahead.pending:
                raise expected(
                    "data_iterator",
                    (
                        f"the same as before, from which {self._ahead.pending} micro-batches were asked of the teacher "
                        "and not yet drawn"
                    ),
                    "another one (with credits 0 none is asked for early)",
                )
            self._let_go_of_iterator()
        self._source = data_iterator
        rewinds = keeps_micro_batches(data_iterator)
        source = data_iterator.iterable if rewinds else data_iterator
        credit = 0 if self._credit and _saves_unseen(source, rewinds) else self._credit
        self._ahead = Prefetcher(
            source, self._teachers.request, credit, self._tokens_of, self._who_draws, _micro_batches_of_step
        )
        self._ahead.in_step = _of_one_step(data_iterator)
        self._ahead.late = self._late
        if rewinds:
            data_iterator.iterable = self._ahead

    def _let_go_of_iterator(self) -> None:
        """Restores Megatron's iterator, unless someone else has changed it since."""
        self._ahead.stop()
        if keeps_micro_batches(self._source) and self._source.iterable is self._ahead:
            self._source.iterable = self._ahead.source
        self._drawn += self._ahead.drawn
        self._ahead = self._source = None

    def _take_what_is_pending(self) -> None:
        """Answers arrive in the order of the requests: what was asked ahead comes before what is asked again."""
        pending = 0 if self._ahead is None else self._ahead.pending
        if self._layout.tensor_size * self._layout.context_size > 1:
            told = torch.tensor([pending], device=self._layout.device)  # 0 on ranks that do not ask
            dist.all_reduce(told, group=self._layout.groups.tensor_context)
            pending = int(told)
        while len(self._kept) < pending:
            self._kept.append(self._receive())

    def _receive(self) -> Answer | Judged:
        self._received += 1
        return self._teachers.receive(self._received - 1)

    def alongside(self, chunk: Any) -> contextlib.AbstractContextManager[None]:
        """Around a forward step of a chunk of the student. Opens nothing, because this teacher runs in another job."""
        self._evaluation.end()
        return contextlib.nullcontext()

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """Around each forward step of an evaluation, on every rank. Leaves the random state of training as it is."""
        return self._evaluation.aside()

    def end_step(self) -> None:
        """At the end of a training step, on every rank: it has shown what draws from which generator."""
        self._who_draws.end_step()
        self._step_ended = True

    def given(self, arguments: dict[str, Any]) -> None:
        """Before the model's forward, on every rank of the last stage. arguments: those of the forward, by name.

        Sends the request if that is done late, and compares the borders of packed sequences that the arguments show
        with those that the teacher was told. ValueError if the teacher would look across a border. With the first
        micro-batch every tensor- and context-parallel rank raises it, after a broadcast of some bytes in each group.
        Later the rank that asks raises it; findings on a GPU are read with the next micro-batch.
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
        iterator = self._ahead if self._replay is None else self._replay
        drawn = self._count_drawn()
        if drawn == self._seen:  # nothing was drawn, or the model is called again
            return
        self._seen = drawn
        self._settle()
        batch, split = iterator.batch, self._layout.context_size > 1
        by_batch, by_model = edges_in(batch), edges_in(arguments)
        if split:
            refuse_other_split(batch, arguments)
        if iterator.late:
            if not self._agreed:
                self._late = self._credit == 0 or (by_batch is None and by_model is not None)
            # With context parallelism the model is given only a part of the tokens.
            known = {**arguments, "input_ids": None} if split else arguments
            question = question_of(batch, self._tokens_of, known)
            self._teachers.request(question)
            tokens, edges = question.tokens, question.edges
        elif by_batch is None and by_model is not None:
            raise expected(
                by_model[0],
                "in the micro-batch, or among the model's arguments from the first one on",
                "it later: the teacher was asked ahead, without it (with credits 0 none is asked for early)",
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
        """Spreads what the rank that asks found with the first micro-batch to the ranks that share its answers."""
        said = [None if problem is None else str(problem), self._late]
        layout = self._layout
        context = layout.groups.context if layout.context_size > 1 else None
        for group in (context, layout.tensor_group):
            if group is not None:
                dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group=group)
        self._agreed = True
        sentence, self._late = said
        if self._late:
            self._credit = 0
        return problem if problem is not None or sentence is None else ValueError(sentence)

    def answer(self, number: int) -> Answer | Judged:
        """The answers of the teachers to micro-batch `number`; blocks until it has come.

        `StudentLink.receive` notices here if the teacher job has died. It waits for the restarted teacher, which
        answers the same request, or raises TeacherLost.
        """
        drawn = self._count_drawn()
        if self._layout.asks and drawn != number + 1:
            raise expected(
                "data_iterator", "forward_step to draw one micro-batch from it per call", "none or several"
            )
        kept = self._kept and not self._running_again
        return self._kept.popleft() if kept else self._receive()

    def _count_drawn(self) -> int:
        return self._drawn + sum(each.drawn for each in (self._ahead, self._replay) if each is not None)

    def close(self) -> None:
        """Says goodbye to the teacher and restores the data iterator. Idempotent; not a collective. ValueError as of
        `given`, for the last micro-batch.

        Micro-batches that were drawn ahead and not trained on are lost: the iterator goes on after them.
        """
        if self._ahead is not None:
            if self._ahead.pending and hasattr(self._ahead, "save_state"):
                _log.warning(
                    "%d micro-batches were drawn ahead and not trained on; a state that the data loader saves from "
                    "now on counts them",
                    self._ahead.pending,
                )
            self._let_go_of_iterator()
        if self._teachers is not None:
            self._teachers.close()
            self._teachers = None
        while self._rendezvous:
            self._rendezvous.pop().close()
        self._settle()


def _micro_batches_of_step() -> int:
    """Micro-batches of a step on one data-parallel rank, by Megatron's calculator; 0 if the script has none."""
    try:
        return get_num_microbatches()
    except AttributeError:  # there is no calculator
        return 0


def _of_one_step(data_iterator: Any) -> bool:
    """Whether this is an iterator that Megatron-Bridge makes for each step, over one that its other chunks share."""
    return type(data_iterator).__module__ == "megatron.bridge.data.iterator_utils"


def _saves_unseen(source: Any, rewinds: bool) -> bool:
    """Whether the script saves this iterator's state itself, which would count what was drawn ahead.

    Megatron's own iterator is no such case: it calls `save_state` of what it draws from, which is then the prefetcher.
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
