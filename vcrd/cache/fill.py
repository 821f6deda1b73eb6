"""Fills a cache from a served teacher: asks it about micro-batches through the link and writes its answers."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from os import PathLike
from typing import NamedTuple

import torch
import torch.distributed as dist

from vcrd.errors import expected
from vcrd.link.errors import LinkError
from vcrd.link.handshake import Tokenizer
from vcrd.link.plan import Span
from vcrd.link.question import NO_CONTEXT, Question
from vcrd.link.rendezvous import host_rendezvous
from vcrd.link.student import StudentLink
from vcrd.settings import DistillSettings, label

from .files import OUTPUT_LAYER, Cache, CacheHeader, CacheWriter, key_of
from .recorder import tensors_of
from .sequences import Part, parts_of, question_about

FILE_BYTES = 256 << 20
REPORT_SECONDS = 10.0  # between two calls of `report`
REFRESH_SECONDS = 10.0  # between two looks for what other writers have added


class Filled(NamedTuple):
    """What a fill has done so far. written, found: sequences that it has written, and that were in the cache already.
    tokens, bytes: of the answers that it has written. seconds: since the teacher was connected.
    """

    written: int = 0
    found: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        speed = self.tokens / max(self.seconds, 1e-9)
        return (
            f"{self.written:,} sequences written ({self.found:,} more were there), {self.bytes / 1e9:,.4g} GB, "
            f"{speed:,.0f} tokens/s"
        )


def fill(
    questions: Iterable[Question],
    folder: str | PathLike,
    settings: DistillSettings | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    tokenizer: Tokenizer | None = None,
    file_bytes: int = FILE_BYTES,
    report: Callable[[Filled], None] | None = None,
) -> Filled:
    """Asks the teacher job at the address of the settings about each question and writes what the cache lacks.

    It is a student of the link without a model. A micro-batch whose sequences are all in the cache is not asked about,
    so that a fill that was interrupted goes on where it ended. A micro-batch that is partly there is asked about as a
    whole, because a model's rounding depends on the shape of its input; only the missing sequences are written.

    questions: this rank's share of the data, for example of `vcrd.megatron.question_of`.
    settings: default `DistillSettings.from_environment()`. It must state `vocab_size` and `sequence_length`, as the
        teacher does. `teacher` is not read. Of the loss only `validity` is: with "privileged" each question is asked
        with its context and without it, as the training does.
    group: the ranks that fill together, each with its own share; any backend. None: this rank alone. Rank 0 hosts the
        rendezvous, and so the address must be one of its own host.
    tokenizer: the one that made the tokens, to be compared with the teacher's.
    file_bytes: a file is written when this rank has answers of that size, and at the end.
    report: called with the state of this rank, about every 10 seconds.

    Returns the sums over the ranks, and the seconds of the slowest. Collectives over `group`: two all-reduces of a few
    float64, at the end. A process that is killed loses what is not in a file yet, an interrupt less. Raises
    ValueError for settings that do not fit or a question that cannot be asked, LinkError if the teacher is refused or
    lost, OSError if the folder cannot be written.
    """
    settings = DistillSettings.from_environment() if settings is None else settings
    _check(settings)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    rendezvous = host_rendezvous(settings.link) if rank == 0 else None
    try:
        link = StudentLink.connect(
            settings.link,
            vocab_size=settings.vocab_size,
            padded_vocab_size=settings.vocab_size,
            sequence_length=settings.sequence_length,
            tensor_rank=0,
            tensor_size=1,
            data_rank=rank,
            data_size=size,
            tokenizer=tokenizer,
        )
        try:
            ahead = settings.link.credits
            filling = _Filling(link, folder, ahead, file_bytes, Progress(report), leads=rank == 0)
            filled = filling.run(questions_for(settings, questions))
        finally:
            link.close()
        # A teacher that is lost needs the rendezvous to come back: until every rank has ended.
        return _summed(filled, group)
    finally:
        if rendezvous is not None:
            rendezvous.close()


def questions_for(settings: DistillSettings, questions: Iterable[Question]) -> Iterator[Question]:
    """What a training with these settings asks. With validity "privileged" these are two questions for each that has a
    context: without it, for the answer that is distilled, and with it, for that of the judge."""
    for question in questions:
        if settings.validity == "privileged" and len(question.context.tokens):
            yield question._replace(context=NO_CONTEXT)
        yield question


class Lacking:
    """Finds what a cache lacks of a question, also beside other writers. What it has named it does not name again."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._named: set[bytes] = set()
        self._refreshed = time.monotonic()

    def of(self, question: Question) -> tuple[list[Part], dict[int, bytes]]:
        """All sequences of the question; of those that the cache lacks, the index and the key."""
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._cache.refresh()
            self._refreshed = time.monotonic()
        parts = parts_of(*question.tokens.shape, question.edges.tolist())
        lacking = {}
        for index, part in enumerate(parts):
            key = key_of(*question_about(part, question.tokens, question.context))
            if key not in self._named and key not in self._cache:
                self._named.add(key)
                lacking[index] = key
        return parts, lacking


class Progress:
    """Counts, and reports about every 10 seconds."""

    def __init__(self, report: Callable[[Filled], None] | None) -> None:
        self._report = report
        self._begun = self._reported = time.monotonic()
        self._filled = Filled()

    @property
    def filled(self) -> Filled:
        return self._filled._replace(seconds=time.monotonic() - self._begun)

    def found(self, sequences: int) -> None:
        self._count(found=sequences)

    def wrote(self, tokens: int, bytes: int) -> None:
        """Another sequence."""
        self._count(written=1, tokens=tokens, bytes=bytes)

    def _count(self, **more: int) -> None:
        before = self._filled
        self._filled = before._replace(**{name: getattr(before, name) + n for name, n in more.items()})
        now = time.monotonic()
        if self._report is not None and now - self._reported > REPORT_SECONDS:
            self._reported = now
            self._report(self.filled)


class _Filling:
    """One rank's fill, with a connected link. leads: it writes the output layer."""

    def __init__(
        self,
        link: StudentLink,
        folder: str | PathLike,
        ahead: int,
        file_bytes: int,
        progress: Progress,
        leads: bool,
    ) -> None:
        self._link = link
        self._ahead = ahead
        self._leads = leads
        self._teacher = link.teacher
        header = CacheHeader.of(self._teacher)
        self._writer = CacheWriter(folder, header, file_bytes)
        self._cache = Cache(folder, header)
        self._lacking = Lacking(self._cache)
        self._progress = progress
        self._under_way: deque[tuple[int, list[tuple[bytes, Part]]]] = deque()

    def run(self, questions: Iterable[Question]) -> Filled:
        try:
            if self._leads and self._teacher.head is not None and OUTPUT_LAYER not in self._cache:
                self._writer.add_head(self._link.output_layer, self._link.columns)
            for question in questions:
                self._ask(question)
                while len(self._under_way) > self._ahead:
                    self._take()
            while self._under_way:
                self._take()
        finally:
            self._writer.close()
        return self._progress.filled

    def _ask(self, question: Question) -> None:
        parts, lacking = self._lacking.of(question)
        self._progress.found(len(parts) - len(lacking))
        if lacking:
            number = self._link.request(question.tokens, question.edges, question.context)
            self._under_way.append((number, [(key, parts[index]) for index, key in lacking.items()]))

    def _take(self) -> None:
        """Writes the oldest answer that was asked for."""
        number, lacking = self._under_way.popleft()
        tensors = tensors_of(self._link.receive(number))
        self._refuse_other_weights()
        for key, part in lacking:
            own = [tensor[part.start : part.stop, part.row] for tensor in tensors]
            self._writer.add(key, own, Span(0, part.width), part.width, self._link.columns)
            self._progress.wrote(part.width, sum(tensor.nbytes for tensor in own))

    def _refuse_other_weights(self) -> None:
        """With identity "warn" the link lets a teacher with other weights come back. A cache is of one teacher."""
        now = self._link.teacher
        if now.weights != self._teacher.weights:
            raise LinkError(
                f"the teacher came back with the weights {now.named_weights}, and the cache is of "
                f"{self._teacher.named_weights}"
            )


def stop_at_sigterm() -> None:
    """From now on SIGTERM ends this process with exit status 0, after a fill has written what has arrived."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def _check(settings: DistillSettings) -> None:
    for name in ("vocab_size", "sequence_length"):
        if getattr(settings, name) is None:
            raise expected(label(name), "the teacher's, because there is no model to take it from", "none")
    teachers = replace(settings.link, teacher=None).teachers()
    if len(teachers) != 1 or teachers[0].name or teachers[0].address is None:
        got = repr(settings.link.address)
        raise expected(label("address"), "the address of one teacher job, without a name", got)


def _summed(filled: Filled, group: dist.ProcessGroup | None) -> Filled:
    if group is None:
        return filled
    on_gpu = "gloo" not in dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    sums = torch.tensor(filled[:-1], dtype=torch.float64, device=device)
    slowest = torch.tensor([filled.seconds], dtype=torch.float64, device=device)
    try:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LinkError(f"this rank has filled its share, and another rank is lost: {reason}") from error
    return Filled(*map(int, sums.tolist()), float(slowest))
