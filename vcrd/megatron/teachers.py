"""The teachers of a student job behind one interface: teacher jobs, or their answers on disk.

Each sample has one teacher (`Split`). Each teacher is asked for its own samples only, over a link of its own, and the
answers are put together for the whole micro-batch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vcrd.cache.channel import Channel
from vcrd.errors import expected
from vcrd.link.buffers import Pool
from vcrd.link.errors import HandshakeRefused, LinkError
from vcrd.link.handshake import Tokenizer
from vcrd.link.payload import Empty
from vcrd.link.plan import Place
from vcrd.link.question import Context, Question
from vcrd.link.student import Waits
from vcrd.loss.api import CalibratedLoss
from vcrd.loss.divergence import DivergenceStats
from vcrd.megatron.layout import Layout
from vcrd.megatron.routing import Split
from vcrd.settings import LinkSettings, TeacherSource
from vcrd.teacher_logits import DenseLogits, HiddenStates, MixedLogits, TeacherLogits, TopKLogits

_log = logging.getLogger("vcrd")
_KEPT = 2  # free blocks of host memory that are kept for the next answers


class Source(Protocol):
    """Where the answers of one teacher come from: `StudentLink`, or `CachedAnswers`. The former documents all of it."""

    waits: Waits

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def served_by(self) -> tuple[int | None, int]: ...

    @property
    def bytes_received(self) -> int: ...

    def request(self, tokens: Tensor, boundaries: Tensor, context: Context) -> int: ...

    def receive(self, number: int) -> TeacherLogits: ...

    def close(self) -> None: ...


class Counters(NamedTuple):
    """What one rank has counted of one teacher since the run began. served_by: the replica that serves this rank, or
    None, and the number of replicas. received: bytes."""

    waits: Waits
    served_by: tuple[int | None, int]
    received: int


class Part(NamedTuple):
    """Answers in one form: they hold values for the tokens of these teachers, and anything for all others."""

    logits: TeacherLogits  # for [s, b]
    teachers: tuple[int, ...]


class Answer(NamedTuple):
    """What the teachers answer to a micro-batch, for the tokens [s, b] of this rank.

    parts: one for each form, which together hold every token. owners: int16 [s, b] on the device, the teacher of each
    token; None if there is one teacher.
    """

    parts: tuple[Part, ...]
    owners: Tensor | None = None

    @property
    def teachers(self) -> tuple[int, ...]:
        """Those that have a token here, or on another rank of the replica."""
        return tuple(sorted(teacher for part in self.parts for teacher in part.teachers))

    def tokens_of(self, *teachers: int) -> Tensor | None:
        """bool [s, b]: the tokens of these teachers; None for all tokens."""
        if self.owners is None or teachers == self.teachers:
            return None
        found = self.owners == teachers[0]
        for teacher in teachers[1:]:
            found |= self.owners == teacher
        return found

    def loss(
        self,
        calibrated: Callable[..., CalibratedLoss],
        logits: Tensor,
        labels: Tensor,
        *,
        mask: Tensor,
        validity: Any = None,
        judge: Answer | None = None,
        **arguments: Any,
    ) -> CalibratedLoss:
        """What `calibrated` (`validity_calibrated_kl` or a fused head) gives, [s, b], with all teachers.

        It is called once for each form, with a mask of the tokens that have an answer in that form. Each of these calls
        has its collectives, and in backward its gradient of the student's logits, which autograd adds. Each token gets
        bit for bit what it would get alone. validity: an estimator, or None for that of the configuration. It is called
        once for each form as well, with -1 as both actions of the tokens that have their answer in another form. judge:
        the answer to the same micro-batch with the teacher's context, for validity "privileged".
        """
        out = None
        for number, part in enumerate(self.parts):
            here = self.tokens_of(*part.teachers)
            if judge is not None:
                arguments["judge"] = judge.parts[number].logits
            if validity is not None:
                judges = callable(validity) and here is not None
                arguments["validity"] = _only(validity, here) if judges else validity
            of_part = calibrated(
                logits,
                part.logits,
                labels,
                mask=mask if here is None else torch.where(here, mask, torch.zeros_like(mask)),
                **arguments,
            )
            out = of_part if out is None else _merged(here, of_part, out)
        return out


def _only(validity: Callable[..., Any], here: Tensor) -> Callable[..., Any]:
    def judged(stats: DivergenceStats) -> tuple[Tensor, Tensor]:
        student, teacher = (
            torch.where(here, each, -1) for each in (stats.student_action, stats.teacher_action)
        )
        return validity(stats._replace(student_action=student, teacher_action=teacher))

    return judged


def _merged(here: Tensor, out: CalibratedLoss, other: CalibratedLoss) -> CalibratedLoss:
    """`out` where `here`, else `other`."""

    def chosen(mine, theirs):
        return [torch.where(here, *pair) for pair in zip(mine, theirs, strict=True)]

    return CalibratedLoss(*chosen(out[:3], other[:3]), out.stats._make(chosen(out.stats, other.stats)))


def answer_of(given: Answer | TeacherLogits) -> Answer:
    return given if isinstance(given, Answer) else Answer((Part(given, (0,)),))


class Teachers:
    """On every rank of the last stage: `request` on the ranks that ask, and `receive` on all, in the same order.

    sources: by name, in the order of the settings. The name "" is that of an only teacher without a name. mixture: the
    weights of the teachers if all of them answer every token; empty if each sample has one teacher.

    With several teachers, a rank that asks tells the ranks that share its micro-batches which teacher has which
    sequences: one small message per micro-batch over TCP, sent with the request. No device waits for it.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        layout: Layout,
        settings: LinkSettings,
        mixture: tuple[float, ...] = (),
    ) -> None:
        self._mixture = mixture
        self.sources = dict(sources)
        self._names = tuple(sources)
        self._layout = layout
        self._settings = settings
        self._taken = [0] * len(sources)  # answers taken from each source
        self._asked = 0
        self._received = 0
        self._splits: deque[Split | ValueError] = deque()  # of micro-batches whose answers were not taken
        self._changed = threading.Condition()
        self._failure: LinkError | None = None
        on_cpu = layout.device.type == "cpu"
        self._empty = Pool(_KEPT).empty if on_cpu else partial(torch.empty, device=layout.device)
        _refuse_unlike(self.sources, settings)
        shared = len(sources) > 1 and not mixture and layout.tensor_size * layout.context_size > 1
        self._channel = self._opened() if shared else None

    @property
    def waits(self) -> Waits:
        rows = [vars(source.waits).values() for source in self.sources.values()]
        return Waits(*map(sum, zip(*rows, strict=True)))

    @property
    def bytes_received(self) -> int:
        return sum(source.bytes_received for source in self.sources.values())

    def request(self, question: Question) -> int:
        """Asks about the next micro-batch; returns its number: 0, 1, 2 .. ValueError for a teacher that is not there,
        here and in `receive` on the ranks that share the micro-batch."""
        number = self._asked
        if self._mixture:
            return self._request_of_all(question)
        try:
            split = Split.of(question, self._names)
            for teacher in split.present:
                own = split.question(question, teacher)
                with self._naming(teacher):
                    self._source(teacher).request(own.tokens, own.edges, own.context)
        except ValueError as error:
            self._tell_refusal(error)
            raise
        self._tell(asdict(split))
        if len(self._names) > 1:
            self._splits.append(split)
        self._asked += 1
        return number

    def receive(self, number: int) -> Answer:
        """The answers to micro-batch `number`: 0, 1, 2 .. in this order. Blocks until they have come."""
        if len(self.sources) == 1:
            return Answer((Part(self._answer(0), (0,)),))
        if self._mixture:
            answers = tuple(self._answer(teacher) for teacher in range(len(self._names)))
            return Answer((Part(MixedLogits(answers, self._mixture), (0,)),))
        split = self._next_split(number)
        return self._together(split, {teacher: self._answer(teacher) for teacher in split.present})

    def _request_of_all(self, question: Question) -> int:
        if question.teachers:
            what = "none with teacher_mixture, where every teacher answers every token"
            raise expected("vcrd_teacher", what, "some")
        for teacher in range(len(self._names)):
            with self._naming(teacher):
                number = self._source(teacher).request(question.tokens, question.edges, question.context)
        return number

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        for source in self.sources.values():
            source.close()

    def _source(self, teacher: int) -> Source:
        return self.sources[self._names[teacher]]

    def _answer(self, teacher: int) -> TeacherLogits:
        number = self._taken[teacher]
        with self._naming(teacher):
            answer = self._source(teacher).receive(number)
        self._taken[teacher] += 1
        return answer

    @contextlib.contextmanager
    def _naming(self, teacher: int) -> Iterator[None]:
        with naming(self._names[teacher]):
            yield

    def _together(self, split: Split, answers: dict[int, TeacherLogits]) -> Answer:
        """One answer for the whole micro-batch, of the answers of each teacher to its own sequences."""
        layout, device = self._layout, self._layout.device
        if len(answers) == 1:
            (teacher,) = answers
            shape = (split.width // layout.context_size, split.rows)
            owners = torch.full(shape, teacher, dtype=torch.int16, device=device)
            return Answer((Part(answers[teacher], (teacher,)),), owners)
        owners = split.of_tokens(layout.context_size)
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            owners = owners.pin_memory().to(device, non_blocking=True)
        forms: dict[tuple, list[int]] = {}
        for teacher, answer in answers.items():
            forms.setdefault(_form(answer, teacher), []).append(teacher)
        parts = [
            Part(
                _spread(split, layout.context_size, {each: answers[each] for each in teachers}, self._empty),
                tuple(teachers),
            )
            for teachers in forms.values()
        ]
        return Answer(tuple(parts), owners)

    def _opened(self) -> Channel:
        """Connects the ranks that share their micro-batches. One broadcast over them."""
        layout = self._layout
        place = Place(layout.data_rank, layout.context_rank, layout.tensor_rank)
        sizes = (layout.context_size, layout.tensor_size)
        # Any of the addresses says by which interface the ranks of this job reach each other.
        address = next((each.address for each in self._settings.teachers() if each.address), None)
        cache = None if address else self._settings.teachers()[0].cache
        settings = self._settings.of(TeacherSource("", address, cache))
        channel = Channel(settings, place, *sizes, self._hear, self._fail, self._leave)
        try:
            channel.meet(layout.groups.tensor_context)
        except BaseException:
            channel.close()
            raise
        return channel

    def _tell_refusal(self, error: ValueError) -> None:
        """On the ranks that share the micro-batch `receive` raises the error."""
        self._tell({"refused": str(error)})

    def _tell(self, message: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.tell(message)

    def _hear(self, message: dict[str, Any]) -> None:
        if "refused" in message:
            heard: Split | ValueError = ValueError(message["refused"])
        else:
            heard = Split(
                message["rows"], message["width"], tuple(message["edges"]), tuple(message["owners"])
            )
        with self._changed:
            self._splits.append(heard)
            self._changed.notify_all()

    def _fail(self, error: LinkError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _leave(self) -> None:
        self._fail(LinkError("the rank that asks the teachers has left"))

    def _next_split(self, number: int) -> Split:
        """How the next micro-batch is split, on every rank; waits until the rank that asks has told it."""
        if number != self._received:
            raise expected("number", f"the next one, {self._received}", number)
        seconds = self._settings.timeout
        with self._changed:
            self._changed.wait_for(lambda: self._splits or self._failure, seconds)
            if not self._splits:
                raise self._failure or LinkError(
                    f"the rank that asks the teachers did not ask about micro-batch {number} within {seconds:g} "
                    "seconds (timeout)"
                )
            split = self._splits.popleft()
        if isinstance(split, ValueError):
            raise split
        self._received += 1
        return split


@contextlib.contextmanager
def naming(teacher: str) -> Iterator[None]:
    """Around whatever reaches one teacher: an error of the link or of its settings says which one, if it has a name."""
    try:
        yield
    except (LinkError, ValueError) as error:
        if not teacher or not (isinstance(error, LinkError) or type(error) is ValueError):
            raise
        raise type(error)(f"teacher {teacher}: {error}") from error


def _form(answer: TeacherLogits, teacher: int) -> tuple:
    """Equal for answers that fit into one. Hidden states are multiplied by an output layer of their own."""
    if isinstance(answer, DenseLogits):
        return "dense", answer.logits.dtype, answer.row_max is None
    return ("topk", answer.ids.shape[-1]) if isinstance(answer, TopKLogits) else ("hidden", teacher)


def _spread(
    split: Split, context_size: int, answers: dict[int, TeacherLogits], empty: Empty
) -> TeacherLogits:
    """The answers, which have one form, as one for all tokens of the micro-batch, in memory from `empty`. What other
    teachers answer to stays uninitialised. Each answer is copied once, and the host waits for nothing."""
    tensors = {teacher: _tensors(answer) for teacher, answer in answers.items()}
    first, shape = next(iter(tensors.values())), (split.width // context_size, split.rows)
    whole = [empty(*shape, *each.shape[2:], dtype=each.dtype) for each in first]
    taken = dict.fromkeys(answers, 0)
    for teacher, span in split.runs(context_size):
        if teacher not in answers:
            continue
        for into, mine in zip(whole, tensors[teacher], strict=True):
            part = mine.narrow(split.dim, taken[teacher], span.width)
            into.narrow(split.dim, span.start, span.width).copy_(part)
        taken[teacher] += span.width
    return _like(next(iter(answers.values())), whole)


def _tensors(answer: TeacherLogits) -> list[Tensor]:
    """Those that have a row for each token."""
    if isinstance(answer, DenseLogits):
        return [answer.logits] if answer.row_max is None else [answer.logits, answer.row_max]
    if isinstance(answer, TopKLogits):
        return [answer.logprobs, answer.ids, answer.log_tail]
    return [answer.states]


def _like(answer: TeacherLogits, tensors: list[Tensor]) -> TeacherLogits:
    if isinstance(answer, HiddenStates):
        return replace(answer, states=tensors[0])
    return type(answer)(*tensors)


def _refuse_unlike(sources: Mapping[str, Source], settings: LinkSettings) -> None:
    """HandshakeRefused if two teachers have different tokenizers, by the setting `identity`: the student may not have
    stated its own. That each has the vocabulary of the student was checked when it joined."""
    known = [(name, source.tokenizer) for name, source in sources.items()]
    known = [(name, tokenizer) for name, tokenizer in known if tokenizer is not None and tokenizer.digest]
    for name, tokenizer in known[1:]:
        first, other = known[0]
        if tokenizer.digest == other.digest:
            continue
        said = (
            f"tokenizer is {other} for the teacher {first} and {tokenizer} for the teacher {name}, which give other "
            "tokens to the same ids"
        )
        if settings.identity != "warn":
            raise HandshakeRefused(f"the teachers are refused: {said}; identity 'warn' would let them in")
        _log.warning(said)
