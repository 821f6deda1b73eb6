"""Fills a cache from a teacher in the process, or from a served one, about the micro-batches of a data iterator."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.cache.files import OUTPUT_LAYER, Cache, CacheError, CacheHeader, CacheWriter, key_of
from vcrd.cache.fill import FILE_BYTES, Filled, Lacking, Progress, fill, questions_for
from vcrd.cache.sequences import Part, parts_of, question_about
from vcrd.errors import expected
from vcrd.link.handshake import Handshake
from vcrd.link.payload import check_output, encode, whole_rows
from vcrd.link.plan import Span
from vcrd.link.question import Context, Question
from vcrd.link.replica_group import KEEPALIVE, ReplicaGroup
from vcrd.link.requests import Request
from vcrd.link.student import check_question
from vcrd.link.teacher import agreed
from vcrd.megatron.identity import tokenizer_of
from vcrd.megatron.prefetch import TokensOf, question_of
from vcrd.megatron.serving import Prepared, place_of, prepared
from vcrd.settings import DistillSettings, label


def fill_cache_by_link(
    micro_batches: Iterable[Any],
    folder: str | PathLike,
    settings: DistillSettings | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    tokens_of: TokensOf = "tokens",
    tokenizer: Any = None,
    file_bytes: int = FILE_BYTES,
    report: Callable[[Filled], None] | None = None,
) -> Filled:
    """Asks a served teacher about the micro-batches of a training's data iterator, as `vcrd.cache.fill.fill` does.

    Args:
        micro_batches: this rank's, whole sequences, as the script's iterator yields them.
        tokens_of: as of `distill`.
        tokenizer: the student's, as of `distill`.

    The other arguments, errors and collectives as of `vcrd.cache.fill.fill`.
    """
    questions = (question_of(batch, tokens_of) for batch in micro_batches)
    return fill(
        questions,
        folder,
        settings,
        group=group,
        tokenizer=tokenizer_of(tokenizer),
        file_bytes=file_bytes,
        report=report,
    )


def fill_cache(
    model: Any,
    micro_batches: Iterable[Any] | None,
    folder: str | PathLike,
    settings: DistillSettings | None = None,
    *,
    tokens_of: TokensOf = "tokens",
    microbatches: int | None = None,
    tokenizer: Any = None,
    checkpoint: str | None = None,
    file_bytes: int = FILE_BYTES,
    report: Callable[[Filled], None] | None = None,
) -> Filled:
    """Answers micro-batches with a teacher in these processes and writes what the cache lacks, without a link.

    Args:
        model, microbatches, tokenizer, checkpoint: as of `serve`. Every rank of the teacher calls it, with tensor and
            pipeline parallelism of any size. Each data-parallel rank is a replica that fills with its own
            micro-batches.
        micro_batches: read on the first rank of each replica only, which has tensor rank 0 and the first stage: whole
            sequences, as a script's data iterator yields them.
        tokens_of: as of `distill`.
        settings: default `DistillSettings.from_environment()`: payload, top_k, vocab_size, sequence_length and
            teacher_context_length are read, and validity as in `vcrd.cache.fill.fill`.
        file_bytes: a rank writes a file when it has answers of that size, and at the end.
        report: called on the first rank of each replica with its state, about every 10 seconds.

    Each tensor rank of the last stage writes its own columns, in the form in which the link would deliver them, bit
    for bit. With a payload that does not depend on columns the tensor ranks take turns. What is skipped, and what an
    interrupt loses: as of `vcrd.cache.fill.fill`.

    Returns on each rank what its replica has done; `bytes` counts all columns. Collectives over the ranks of a replica:
    some of a few int64 at the start and at the end; one all-reduce of 3 int64 about once a second while micro-batches
    are drawn, and one broadcast for each pass of the pipeline. None between replicas.
    Raises on every rank of a replica: ValueError for a model, a micro-batch or a cache that does not fit or cannot be
    written, LinkError if another rank of the replica is lost.
    """
    settings = DistillSettings.from_environment() if settings is None else settings
    with prepared(model, settings, microbatches, tokenizer, checkpoint) as teacher:
        _check(teacher, settings)
        questions = (question_of(batch, tokens_of) for batch in micro_batches or ())
        filling = _Filling(teacher, questions_for(settings, questions), folder, settings, file_bytes, report)
        try:
            while requests := filling.next_batch(teacher.limit):
                teacher.answer(requests, filling)
            filling.finish()
        except BaseException:
            filling.abandon()
            raise
        return filling.filled


class _Filling:
    """One rank's part. It takes the place of a link: `next_batch` gives the requests, `respond` takes the answers."""

    def __init__(
        self,
        teacher: Prepared,
        questions: Iterator[Question],
        folder: str | PathLike,
        settings: DistillSettings,
        file_bytes: int,
        report: Callable[[Filled], None] | None,
    ) -> None:
        layout = self._layout = teacher.layout
        self._replica_group = ReplicaGroup(layout.groups.model)
        self._progress = Progress(report if self._replica_group.leads else None)
        self._error: Exception | None = None
        self._lacking: dict[int, list[tuple[bytes, Part]]] = {}  # of each request that is not answered yet
        self._number = 0
        self._writer: CacheWriter | None = None
        self._draw: _Draw | None = None
        cache = None
        stated = _stated(self._replica_group, teacher, settings)
        header = CacheHeader.of(stated)
        self._payload, self._shard = header.content(), stated.shards()[layout.tensor_rank]
        self._vocab_size = stated.vocab_size
        # The pieces of one answer that different ranks write belong together by this name.
        run = self._replica_group.share_text(secrets.token_hex(8))
        try:
            if layout.groups.last_stage or self._replica_group.leads:
                self._writer = CacheWriter(folder, header, file_bytes, run)
            cache = Cache(folder, header) if self._replica_group.leads else None
        except (ValueError, OSError) as error:
            self._error = error
        self._raise_together()
        if cache is not None:
            self._draw = _Draw(questions, Lacking(cache), stated)
        (lacks_head,) = self._replica_group.agree([cache is not None and OUTPUT_LAYER not in cache])
        if lacks_head and teacher.head is not None and layout.data_rank == 0:
            self._try(self._writer.add_head, teacher.head.weight[: self._shard.width], self._shard)

    @property
    def filled(self) -> Filled:
        return self._progress.filled

    def next_batch(self, limit: int) -> list[Request]:
        """The next 1 to `limit` requests, the same on every rank of the replica; [] at the end."""
        while True:
            drawn: list[_Drawn] = []
            if self._draw is not None and self._error is None:
                try:
                    drawn = self._draw.next(limit, KEEPALIVE)
                # A data loader may raise anything, and the other ranks must get it.
                except Exception as error:
                    self._error = error
            numbers, found, over = _numbers(drawn), 0, False
            if self._draw is not None:
                found, over = self._draw.found, self._draw.over and not drawn
            said = [self._error is not None, over, found, len(numbers)]
            failed, over, found, length = self._replica_group.agree(said)
            self._progress.found(found)
            if failed:
                self._raise_together()
            if over:
                return []
            if length:
                return self._requests(self._replica_group.share(numbers if drawn else None, (length,)))

    def _requests(self, numbers: Tensor) -> list[Request]:
        requests = []
        for question, lacking in _drawn_of(numbers):
            parts, named = parts_of(*question.tokens.shape, question.edges.tolist()), []
            for part in (parts[index] for index in lacking):
                named.append((key_of(*question_about(part, question.tokens, question.context)), part))
                self._progress.wrote(part.width, self._payload.bytes(part.width, self._vocab_size))
            if self._layout.groups.last_stage:
                self._lacking[self._number] = named
            requests.append(Request(self._number, self._layout.data_rank, *question[:3]))
            self._number += 1
        return requests

    def respond(self, request: Request, output: Tensor) -> None:
        """Writes this rank's columns of what the cache lacks of a request, on ranks of the last stage."""
        batch, sequence = request.tokens.shape
        lacking = self._lacking.pop(request.number)
        width = self._layout.padded_vocab_size // self._layout.tensor_size
        check_output(self._payload, output, batch, sequence, width)
        tensors, top = whole_rows(self._payload, output.detach(), self._shard, self._layout.tensor_group)
        if self._payload.whole and request.number % self._layout.tensor_size != self._layout.tensor_rank:
            return
        if self._payload.name != "topk":
            tensors = [encode(self._payload, tensors[0], top)]
        for key, part in lacking:
            own = [tensor[part.start : part.stop, part.row] for tensor in tensors]
            self._try(self._writer.add, key, own, Span(0, part.width), part.width, self._shard)

    def finish(self) -> None:
        """Writes what is left; raises on every rank if one could not."""
        if self._writer is not None:
            self._try(self._writer.close)
        self._raise_together()

    def abandon(self) -> None:
        """Writes what this rank has, after an error or an interrupt."""
        if self._writer is not None:
            with suppress(CacheError):
                self._writer.close()

    def _try(self, write: Callable[..., None], *arguments: Any) -> None:
        """An error is kept, because other ranks wait for this one: the next batch raises it on all of them."""
        try:
            write(*arguments)
        except CacheError as error:
            self._error = self._error or error

    def _raise_together(self) -> None:
        """Collective. The error of the first rank that has one, as a ValueError on the others."""
        text = "" if self._error is None else str(self._error) or repr(self._error)
        said = self._replica_group.first_text(text)
        if self._error is not None:
            raise self._error
        if said:
            raise ValueError(said)


class _Drawn(NamedTuple):
    """A question, and which of its sequences the cache lacks."""

    question: Question
    lacking: list[int]


class _Draw:
    """On the first rank of a replica: draws questions and passes over those whose sequences are all in the cache.

    over: the questions have ended. found: sequences that the cache had, of what was drawn last.
    """

    def __init__(self, questions: Iterator[Question], lacking: Lacking, limits: Handshake) -> None:
        self.over = False
        self.found = 0
        self._questions = questions
        self._lacking = lacking
        self._limits = limits
        self._kept: _Drawn | None = None  # of another shape than those before it

    def next(self, limit: int, seconds: float) -> list[_Drawn]:
        """Up to `limit` questions of one shape, fewer where drawing them takes longer than that many seconds."""
        deadline, drawn = time.monotonic() + seconds, []
        self.found = 0
        while len(drawn) < limit:
            one, self._kept = self._kept or self._next(deadline), None
            if one is None:
                break
            if drawn and _shape(one.question) != _shape(drawn[0].question):
                self._kept = one
                break
            drawn.append(one)
        return drawn

    def _next(self, deadline: float) -> _Drawn | None:
        while not self.over and time.monotonic() < deadline:
            question = next(self._questions, None)
            if question is None:
                self.over = True
                break
            check_question(self._limits, *question[:3])
            parts, lacking = self._lacking.of(question)
            self.found += len(parts) - len(lacking)
            if lacking:
                return _Drawn(question, list(lacking))
        return None


def _shape(question: Question) -> tuple[int, ...]:
    return (*question.tokens.shape, len(question.edges))


def _numbers(drawn: Sequence[_Drawn]) -> Tensor:
    """Questions as one int64 tensor, for a broadcast."""
    found = []
    for question, lacking in drawn:
        parts = (
            question.tokens.flatten(),
            question.edges,
            *question.context,
            torch.tensor(lacking),
        )
        found.append(torch.tensor([question.tokens.shape[0], *map(len, parts)]))
        found += [part.cpu().long() for part in parts]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _drawn_of(numbers: Tensor) -> Iterator[_Drawn]:
    """What `_numbers` was given."""
    while len(numbers):
        batch, *lengths = numbers[:6].tolist()
        tokens, edges, context, places, lacking = numbers[6 : 6 + sum(lengths)].split(lengths)
        yield _Drawn(Question(tokens.view(batch, -1), edges, Context(context, places)), lacking.tolist())
        numbers = numbers[6 + sum(lengths) :]


def _stated(replica_group: ReplicaGroup, teacher: Prepared, settings: DistillSettings) -> Handshake:
    """Collective. What the replica would state to a student: the cache's header says the same."""
    layout, identity = teacher.layout, teacher.identity
    own = Handshake.of(
        settings.link,
        vocab_size=layout.vocab_size,
        sequence_length=layout.sequence_length,
        padded_vocab_size=layout.padded_vocab_size,
        tensor_size=layout.tensor_size,
        copies=layout.data_size,
        head=teacher.head.facts if teacher.head else None,
        tokenizer=identity.tokenizer,
        checkpoint=identity.checkpoint,
        teacher_context_length=settings.link.teacher_context_length,
        positions=teacher.positions,
    )
    return agreed(replica_group, own, place_of(layout), identity.weights)


def _check(teacher: Prepared, settings: DistillSettings) -> None:
    """ValueError for contexts that the model has no positions for."""
    layout, context = teacher.layout, settings.link.teacher_context_length
    if context and 0 < teacher.positions < layout.sequence_length + context:
        what = (
            f"at most {teacher.positions - layout.sequence_length}, for the positions of the teacher's model"
        )
        raise expected(label("teacher_context_length"), what, context)
