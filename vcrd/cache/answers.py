"""The answers of a teacher from a folder, in place of the link to a teacher job or beside it.

`CachedAnswers` has the interface of `StudentLink`. The request leader finds the answers to a micro-batch by the digests
of its sequences, and tells the other ranks which ones (`channel`). Each rank then reads its own columns and positions
ahead of the training (`reading`). What the folder lacks is an error, or is asked of a teacher job, whose answers are
added to the folder (`recorder`).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from operator import add
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.link.buffers import HostMemory
from vcrd.link.errors import HandshakeRefused, LinkError
from vcrd.link.handshake import Handshake, Tokenizer
from vcrd.link.plan import Place
from vcrd.link.question import NO_CONTEXT, Context, Question
from vcrd.link.student import StudentLink, Waits, check_question
from vcrd.link.tracing import span
from vcrd.link.transport.opening import indexed
from vcrd.settings import LinkSettings, TeacherSource
from vcrd.teacher_logits import DenseLogits, HiddenStates, TeacherLogits, TopKLogits, factor_of

from .channel import Channel, spread
from .files import OUTPUT_LAYER, Cache, CacheHeader, CacheWriter
from .reading import Planner, Reading, open_files
from .recorder import Recorder

_log = logging.getLogger("vcrd")
_PARTING = 5.0  # seconds that close() gives the reader


class CachedAnswers:
    """One rank of the last pipeline stage of the student, which takes the answers of one teacher from a folder.

    columns: the true vocabulary columns that `receive` returns.
    """

    def __init__(
        self, settings: LinkSettings, handshake: Handshake, place: Place, opened: Opened, device: torch.device
    ) -> None:
        self.columns = handshake.shards()[place.tensor]
        self._settings = settings
        self._handshake = handshake
        self._place = place
        self._device = device
        self._link = link = opened.link
        self._header = opened.cache.header
        self._waits = Waits()
        self._requesting = threading.Lock()
        self._requested = 0
        self._taken = 0
        self._head: Tensor | None = None  # the output layer on the device
        # One block of memory more than answers may be ready: that of the answer in use.
        memory = HostMemory(device, handshake.credits + 1)
        self._recorder = None
        if opened.writer is not None:
            has_head = OUTPUT_LAYER in opened.cache
            self._recorder = Recorder(opened.writer, link, place, handshake.context_size, device, has_head)
        planner = Planner(opened.cache, link) if place.is_request_leader else None
        self._reading = Reading(opened.cache, place, handshake, memory, planner, settings.timeout)
        self._channel = Channel(
            settings,
            place,
            handshake.context_size,
            handshake.tensor_size,
            hear=self._reading.hear,
            fail=self._reading.fail,
            left=self._reading.expect_no_more,
        )
        self._reading.begin(self._channel)
        # Forgotten answers must not leave threads behind that still run when the interpreter exits.
        self._finalizer = weakref.finalize(self, _end, self._reading, link, self._recorder, self._channel)

    @classmethod
    def connect(
        cls,
        settings: LinkSettings,
        source: TeacherSource,
        *,
        tensor_rank: int,
        tensor_size: int,
        data_rank: int,
        data_size: int,
        context_rank: int = 0,
        context_size: int = 1,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        **stated: Any,
    ) -> CachedAnswers:
        """Opens the folder `source.cache`. Every rank of the last pipeline stage of the student calls it. If the source
        has an address too, it first connects to the teacher job there, as `StudentLink.connect` does.

        group: the tensor- and context-parallel ranks of this data-parallel rank, the request leader first; None where
        there is only one. stated: `vocab_size`, `padded_vocab_size`, `sequence_length` and `tokenizer`, which are, like
        the other arguments, those of `StudentLink.connect`. Collectives in a group of several ranks: three broadcasts
        and an all-gather, of the names of the files and some bytes.
        Raises HandshakeRefused on every rank of the group where the folder is no cache, or where its teacher, payload
        or tokenizer does not fit the student or the teacher job. LinkError where the ranks do not meet within
        `connect_timeout`.
        """
        if tensor_size * context_size != (1 if group is None else group.size()):
            raise expected(
                "group", f"{tensor_size * context_size} ranks", "None" if group is None else group.size()
            )
        place, device = Place(data_rank, context_rank, tensor_rank), indexed(torch.device(device))
        stated |= dict(tensor_size=tensor_size, context_size=context_size, data_size=data_size)
        handshake, link = Handshake.of_student(settings, **stated), None
        if source.address is not None:
            link = StudentLink.connect(
                settings,
                tensor_rank=tensor_rank,
                data_rank=data_rank,
                context_rank=context_rank,
                device=device,
                called=source.name,
                **stated,
            )
        try:
            opened = _opened(settings, source.cache, handshake, place, link, group)
            answers = cls(settings, handshake, place, opened, device)
        except BaseException:
            if link is not None:
                link.close()
            raise
        try:
            answers._channel.meet(group)
        except BaseException:
            answers.close()
            raise
        return answers

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the teacher of the cache has stated; None if it has stated none."""
        return self._header.tokenizer

    @property
    def waits(self) -> Waits:
        """How long `receive` has waited, and for what. `arriving` is the part in which answers were read."""
        if self._link is None:
            return self._waits
        return Waits(*map(add, vars(self._waits).values(), vars(self._link.waits).values()))

    @property
    def served_by(self) -> tuple[int | None, int]:
        """As of the link to the teacher job; (None, 0) without one."""
        return (None, 0) if self._link is None else self._link.served_by

    @property
    def bytes_received(self) -> int:
        """Bytes read from the folder and received from the teacher job so far."""
        return self._reading.bytes + (0 if self._link is None else self._link.bytes_received)

    def request(
        self, tokens: Tensor, boundaries: Tensor | Sequence[int] = (), context: Context = NO_CONTEXT
    ) -> int:
        """Requests the answer to tokens [b, s], as `StudentLink.request` does, with the same checks. Does not block.

        Reading begins at once, if a credit is free. Returns the number of the micro-batch: 0, 1, 2 ..
        """
        if not self._place.is_request_leader:
            raise expected("request", "a call on tensor rank 0 and context rank 0", f"one on {self._place}")
        edges = torch.as_tensor(boundaries).flatten().cpu()
        context = Context(*(each.detach().cpu() for each in context))
        check_question(self._handshake, tokens, edges, context)
        if self._reading.failure:
            raise self._reading.failure
        # Copies in any case, because the caller may reuse its buffers.
        question = Question(
            tokens.detach().to("cpu", torch.int32, copy=True),
            edges.to(torch.int64, copy=True),
            Context(*(each.clone() for each in context)),
        )
        with self._requesting:
            number = self._requested
            self._requested += 1
            self._reading.ask(number, question)
        return number

    def receive(self, number: int) -> TeacherLogits:
        """The answer to micro-batch `number`, bit for bit as `StudentLink.receive` has returned it when it was added.

        Called on every rank, for 0, 1, 2 .. in this order. AnswersMissing on every rank of the replica where the folder
        lacks an answer and there is no teacher job. LinkError where a rank of the replica is gone or cannot read, or
        where the answer is not there after `timeout` seconds. Errors of the link, where the teacher job is asked.
        """
        if number != self._taken:
            raise expected("number", f"the next one, {self._taken}", number)
        if self._place.is_request_leader and number >= self._requested:
            raise expected("number", f"one that was requested, below {self._requested}", number)
        late = not self._reading.is_ready(number)
        begun, before = time.perf_counter(), self._reading.seconds
        with span("wait", number):
            plan, upload = self._reading.take(number, self._settings.timeout)
        self._taken += 1
        waited = time.perf_counter() - begun
        if upload is not None:
            self._waits.add(waited, self._reading.seconds - before, late)
            return self._formed(upload.ready())
        self._waits.seconds += waited
        answer = self._link.receive(plan.live)
        self._recorder.add(plan, answer)
        if self._head is None and isinstance(answer, HiddenStates):
            self._head = answer.weight
        return answer

    def close(self) -> None:
        """Ends reading, says goodbye to the teacher job, and writes what is still to be added. Idempotent."""
        self._finalizer()

    def _formed(self, tensors: list[Tensor]) -> TeacherLogits:
        if self._header.payload == "topk":
            return TopKLogits(*tensors)
        if self._header.payload != "hidden":
            return DenseLogits(tensors[0])
        head, states = self._header.head, tensors[0]
        if self._head is None:  # as it is multiplied: converted here once, not once per micro-batch
            self._head = factor_of(self._reading.head.to(self._device), states.dtype)
        return HiddenStates(states, self._head, head.scale, head.softcap)


class Opened(NamedTuple):
    """A folder of answers. link, writer: with a teacher job, whose answers are added to the folder."""

    cache: Cache
    link: StudentLink | None = None
    writer: CacheWriter | None = None


def _opened(
    settings: LinkSettings,
    folder: str,
    student: Handshake,
    place: Place,
    link: StudentLink | None,
    group: dist.ProcessGroup | None,
) -> Opened:
    """Opens the folder, with the same files on every rank of the group. HandshakeRefused on every rank where one of
    them cannot use it. Two broadcasts and an all-gather of some bytes, where there are several ranks."""
    run = spread(secrets.token_hex(8), group)

    def attempt(names: Sequence[str] | None) -> tuple[Opened | None, str | None]:
        try:
            writer = None if link is None else CacheWriter(folder, CacheHeader.of(link.teacher), run=run)
            cache = Cache(folder, names=None if names is None else ())
            open_files(cache, names or (), settings.connect_timeout, lambda: False)
            return Opened(cache, link, writer), refusal(cache, student, place, link is None)
        except (LinkError, ValueError, OSError) as error:
            return None, str(error)

    opened, problem, names = None, None, ()
    if place.is_request_leader:
        opened, problem = attempt(None)
        names = () if opened is None else [file.path.name for file in opened.cache.files]
    problem, names = spread((problem, names), group)
    if not place.is_request_leader and problem is None:
        opened, problem = attempt(names)
    problems = [problem]
    if group is not None and group.size() > 1:
        problems = [None] * group.size()
        dist.all_gather_object(problems, problem, group=group)
    found = next((each for each in problems if each), None)
    if found is not None:
        raise HandshakeRefused(found)
    return opened


def refusal(cache: Cache, student: Handshake, place: Place, alone: bool) -> str | None:
    """Why a student may not train from a cache, in one sentence; None if it may. One rank warns of what it lets in.

    The setting `identity` of the student means the same as for a teacher job. alone: whether there is no teacher job.
    """
    header, folder = cache.header, cache.folder
    wanted = CacheHeader(student.payload, student.vocab_size, student.top_k, tokenizer=student.tokenizer)
    reasons, known = [], []
    for reason in header.differences(wanted):
        (known if reason.startswith("tokenizer") else reasons).append(reason)
    if student.identity == "warn":
        for reason in known if place == Place(0, 0, 0) else ():
            _log.warning("the cache %s: %s", folder, reason)
    else:
        reasons += [f"{reason}; identity 'warn' would let it in" for reason in known]
    if student.identity == "insist":
        for whose, tokenizer in (("student", student.tokenizer), ("cache", header.tokenizer)):
            if tokenizer is None or not tokenizer.digest:
                reasons.append(f"identity is 'insist', and the {whose} states no tokenizer with a vocabulary")
        if not header.weights:
            reasons.append(
                "identity is 'insist', and the cache states no digest of the weights of its teacher"
            )
    if alone and header.head is not None and OUTPUT_LAYER not in cache:
        reasons.append("it lacks the output layer of its teacher")
    return f"the cache {folder} is refused: " + "; ".join(reasons) if reasons else None


def _end(reading: Reading, link: StudentLink | None, recorder: Recorder | None, channel: Channel) -> None:
    reading.stop()
    if link is not None:
        link.close()
    reading.join(_PARTING)
    if recorder is not None:
        recorder.close()
    channel.close()
