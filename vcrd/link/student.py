"""The end of the student: it requests in advance, receives its part of the answers, and outlives a teacher."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import sub

import torch
from torch import Tensor

from vcrd.errors import expected
from vcrd.settings import LinkSettings
from vcrd.teacher_logits import DenseLogits, HiddenStates, TeacherLogits, TopKLogits, factor_of

from .connection import dial
from .errors import HandshakeRefused, LinkError, TeacherLost
from .handshake import Handshake, Tokenizer, served_by
from .plan import Place, check_boundaries
from .question import NO_CONTEXT, Context, check_context
from .reassembly import Reassembly
from .rendezvous import ask, ask_until, listen, local_host
from .student_connections import StudentConnections
from .tracing import span
from .transport import Arrived
from .transport.opening import Endpoint

_log = logging.getLogger("vcrd")
_PARTING = 10.0  # seconds that close() gives the goodbyes
_SAY_AGAIN = 30.0  # seconds between two log lines while the student waits for a teacher
_LOOK = 0.5  # seconds between two checks while the student waits for its first teacher
_QUESTIONS = 500  # to the rendezvous per second, from all ranks: it answers each in a thread of its own
_LINGER = 4 * _LOOK  # seconds in which the other ranks learn of a refusal before rank 0 closes the rendezvous


@dataclass
class Waits:
    """Running sums of the waits of one rank: they tell a slow network from a slow teacher.

    seconds: time in `receive` without the answer. arriving: the part of it in which bytes from the teacher arrived.
    while_lost: the part of it in which no teacher was connected. In the rest the teacher had not begun to answer.
    answers: the number of answers taken. late: the number of these that were incomplete when they were needed. It does
    not count by time, because an idle machine may need milliseconds to wake.
    """

    seconds: float = 0.0
    arriving: float = 0.0
    while_lost: float = 0.0
    answers: int = 0
    late: int = 0

    def add(self, seconds: float, arriving: float, late: bool) -> None:
        """Adds the wait for one answer."""
        self.seconds += seconds
        self.arriving += min(seconds, arriving)
        self.answers += 1
        self.late += late

    def since(self, before: Waits) -> Waits:
        """The sums since the copy `before` was made."""
        return Waits(*map(sub, vars(self).values(), vars(before).values()))


class StudentLink:
    """One rank of the last pipeline stage of the student, linked to the teacher replica that serves its data-parallel
    rank.

    Attributes:
        columns: the true vocabulary columns that `receive` returns.
        waits: how long `receive` has waited, and for what.
    """

    def __init__(
        self, settings: LinkSettings, handshake: Handshake, place: Place, endpoint: Endpoint
    ) -> None:
        self.columns = handshake.shards()[place.tensor]
        self.waits = Waits()
        self._settings = settings
        self._handshake = handshake
        self._place = place
        self._device = endpoint.device
        self._head: Tensor | None = None  # the output layer on the device
        self._changed = threading.Condition()
        self._apart = handshake.ranks / _QUESTIONS  # seconds between two questions of this rank
        self._reassembly = Reassembly(handshake, place, self._changed)
        sock = listen(local_host(settings), 0)
        self._connections = StudentConnections(
            settings, handshake, place, sock, self._reassembly, self._changed, endpoint
        )
        # A forgotten link must not leave threads behind that still run when the interpreter exits.
        self._finalizer = weakref.finalize(self, self._connections.drop)

    @classmethod
    def connect(
        cls,
        settings: LinkSettings,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        sequence_length: int,
        tensor_rank: int,
        tensor_size: int,
        data_rank: int,
        data_size: int,
        context_rank: int = 0,
        context_size: int = 1,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
        called: str = "",
    ) -> StudentLink:
        """Connects to the teacher. Every rank of the last pipeline stage of the student calls it, and blocks until the
        teacher is connected. Rank 0 of the student's world calls `host_rendezvous` before or at the same time.

        Args:
            vocab_size: true columns.
            padded_vocab_size: that of the student, a multiple of tensor_size.
            sequence_length: of the longest request, before any split over context_size.
            data_rank: without context parallelism.
            device: where `receive` puts its result.
            tokenizer: the one that made the tokens, the same on every rank; None if not known.
            called: the name of the teacher in the log, where there are several.

        Raises TeacherLost or LinkError after `connect_timeout`, HandshakeRefused when the jobs do not fit.
        """
        for name, rank, size in (
            ("tensor", tensor_rank, tensor_size),
            ("data", data_rank, data_size),
            ("context", context_rank, context_size),
        ):
            if not 0 <= rank < size:
                raise expected(f"{name}_rank", f"an integer in [0, {size})", rank)
        settings.shared_secret()  # an unreadable file raises its error before anything is opened
        handshake = Handshake.of_student(
            settings,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            padded_vocab_size=padded_vocab_size,
            tensor_size=tensor_size,
            data_size=data_size,
            context_size=context_size,
            tokenizer=tokenizer,
        )
        # One block more than responses may arrive or be complete: that of the response in use.
        endpoint = Endpoint(settings.transport, torch.device(device), handshake.credits + 1)
        handshake = replace(handshake, nccl=endpoint.nccl_version)
        link = cls(settings, handshake, Place(data_rank, context_rank, tensor_rank), endpoint)
        link._connections.called = called
        try:
            link._join()
        except HandshakeRefused:
            time.sleep(max(_LINGER, 2 * link._apart))
            link.close()
            raise
        except BaseException:
            link.close()
            raise
        return link

    @property
    def served_by(self) -> tuple[int | None, int]:
        """The teacher replica that serves this rank (None before one has connected), and the number of replicas."""
        session = self._connections.session
        return self._connections.replica, session.teacher.copies if session else 0

    @property
    def teacher(self) -> Handshake:
        """What the teacher has stated, that of the newest epoch if it has come back."""
        return self._connections.teacher

    @property
    def output_layer(self) -> Tensor | None:
        """With the payload "hidden": the teacher's output layer, [columns.width, size] in its dtype on the CPU.
        Otherwise None. Blocks until all of it has arrived; TeacherLost after `timeout` seconds.
        """
        head, seconds = self._connections.head, self._settings.timeout
        with self._changed:
            self._changed.wait_for(lambda: head.complete or self._connections.failure, seconds)
            if head.complete:  # also after the link is closed
                return head.weight
            raise self._connections.failure or TeacherLost(
                f"the output layer did not arrive within {seconds:g} seconds (timeout)"
            )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that the teacher has stated; None if it has stated none."""
        return self.teacher.tokenizer

    @property
    def bytes_received(self) -> int:
        """Bytes received from the teacher so far: payloads, headers, and its output layer if it was sent."""
        return self._connections.bytes_received

    def request(
        self, tokens: Tensor, boundaries: Tensor | Sequence[int] = (), context: Context = NO_CONTEXT
    ) -> int:
        """Requests the answer of the teacher to tokens [b, s] of any integer dtype. Only on request leaders (tensor
        and context rank 0). Blocks only where a teacher has stopped and megabytes of tokens are unsent, and then for at
        most `timeout` seconds.

        Args:
            tokens: the whole sequences, before any split over context ranks.
            boundaries: for sequences that are packed into one row (b = 1), their edges from 0 to s, as cu_seqlens in
                Megatron. No token then attends to another sequence, `sequence_length` limits each sequence, and
                `max_tokens` limits the row.
            context: tokens that only the teacher sees; it answers for `tokens` alone. The setting
                `teacher_context_length` limits it for each sequence.

        Returns the number of the micro-batch: 0, 1, 2 .. The request is sent at once if a credit is free, else as soon
        as `receive` frees one. It is sent again to a teacher that replaces a lost one.
        """
        if not self._place.is_request_leader:
            raise expected("request", "a call on tensor rank 0 and context rank 0", f"one on {self._place}")
        edges = torch.as_tensor(boundaries).flatten().cpu()
        context = Context(*(part.detach().cpu() for part in context))
        check_question(self._handshake, tokens, edges, context)
        if self._connections.failure:
            raise self._connections.failure
        # A copy in any case, because the caller may reuse its buffer.
        tokens = tokens.detach().to("cpu", torch.int32, copy=True).contiguous()
        context = Context(*(part.to(torch.int32, copy=True).contiguous() for part in context))
        return self._connections.request(tokens, edges.to(torch.int32, copy=True), context)

    def receive(self, number: int) -> TeacherLogits:
        """The answer of the teacher to micro-batch `number`, for the positions and columns of this rank.

        The payload decides the form. `DenseLogits` [s / context_size, b, columns.width], each row up to a shift:
        float16, float32, or uint8 codes. `TopKLogits`, the same on every tensor rank. `HiddenStates`, with this rank's
        rows of the teacher's output layer. Called on every rank, for 0, 1, 2 .. in this order. Positions are in the
        order in which Megatron's context parallelism holds them (`plan.context_rows`).

        While the teacher is lost, or after it has given no sign of life for `timeout` seconds in here, this waits for
        another one. TeacherLost when none has come back within `connect_timeout` seconds in here.
        """
        taken, requested = self._connections.taken, self._connections.requested
        if number != taken:
            raise expected("number", f"the next one, {taken}", number)
        if self._place.is_request_leader and number >= requested:
            raise expected("number", f"one that was requested, below {requested}", number)
        late = number >= self._reassembly.complete
        begun, before = time.perf_counter(), self._reassembly.seconds_arriving
        try:
            with span("wait", number):
                arrived = self._wait_for(number)
        finally:
            arriving = self._reassembly.seconds_arriving - before
            self.waits.add(time.perf_counter() - begun, arriving, late)
        self._connections.send_requests(taken=1)
        return self._formed(arrived.ready())

    def close(self) -> None:
        """Says goodbye to the teacher, or drops a link that has failed. Idempotent; takes about 10 seconds at most."""
        if self._finalizer.detach() is None:
            return
        if self._connections.failure:
            self._connections.end()
        else:
            self._connections.part(min(_PARTING, self._settings.timeout))

    def _join(self) -> None:
        deadline = time.monotonic() + self._settings.connect_timeout
        place = [self._place.data, self._place.context, self._place.tensor]
        hello = {
            "role": "student",
            "place": place,
            "address": self._connections.address,
            "handshake": self._handshake.plain(),
        }
        reply, _ = ask_until(
            self._settings,
            hello,
            lambda r: "leader" in r,
            self._settings.connect_timeout,
            apart=self._apart,
        )
        if reply is None:
            raise LinkError(
                f"the student's ranks did not all meet {self._within()}: rank 0 of its world hosts the rendezvous"
            )
        if not self._place.is_request_leader:
            self._join_leader(tuple(reply["leader"]), deadline)
        if self._place.is_request_leader:
            _log.info("waiting for a teacher at %s", self._settings.rendezvous)
        next_question = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._connections.linked or self._connections.failure, _LOOK)
                if self._connections.failure:
                    raise self._connections.failure
                if self._connections.linked:
                    break
            self._lose_one_that_stopped()
            if time.monotonic() > deadline:
                raise TeacherLost(self._nobody_came(reply))
            if time.monotonic() < next_question:
                continue
            try:
                reply = ask(self._settings, hello)
            except ConnectionError:
                pass  # the next question may get an answer
            next_question = time.monotonic() + self._apart
        _log.info("%s is linked to %s", self._place, self._connections.served_by)

    def _lose_one_that_stopped(self) -> None:
        """A teacher that stops while it connects must not keep another one out."""
        session, seconds = self._connections.session, self._settings.timeout
        if session is not None and time.monotonic() - session.heard > seconds:
            self._connections.lose(session.epoch, f"it did not finish joining within {seconds:g} seconds")

    def _join_leader(self, address: tuple, deadline: float) -> None:
        leader = Place(self._place.data, 0, 0)
        place = [self._place.data, self._place.context, self._place.tensor]
        hello = {"run": self._settings.name, "role": "peer", "place": place}
        while True:
            try:
                connection, reply = dial(address, self._settings.shared_secret(), hello)
                break
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise LinkError(f"{leader} cannot be reached {self._within()}: {error}") from None
            time.sleep(_LOOK)
        if reply.get("state") != "welcome":
            connection.close()
            raise HandshakeRefused(f"the link is refused: {reply.get('reason')}")
        self._connections.join_leader(connection, leader)

    def _nobody_came(self, reply: dict) -> str:
        replicas, came = reply.get("replicas", 0), reply.get("came", [])
        if not replicas:
            return f"no teacher came {self._within()}"
        replica = served_by(self._handshake, replicas, self._place.data)
        how = "did not join" if replica in came else "did not come"
        return f"teacher replica {replica} {how} {self._within()}"

    def _within(self) -> str:
        return f"to {self._settings.rendezvous} within {self._settings.connect_timeout:g} seconds (connect_timeout)"

    def _wait_for(self, number: int) -> Arrived:
        begun = said = time.monotonic()
        while True:
            with self._changed:
                session = self._connections.session
                arrived = self._reassembly.take(number) if self._connections.head.complete else None
                if arrived is not None:
                    return arrived
                if self._connections.failure:
                    raise self._connections.failure
                now = time.monotonic()
                if session is None:
                    left = max(begun, self._connections.lost_at) + self._settings.connect_timeout - now
                else:
                    left = max(begun, session.heard) + self._settings.timeout - now
                if left > 0:
                    waiting = time.perf_counter()
                    self._changed.wait(min(left, 1.0))
                    if session is None:
                        self.waits.while_lost += time.perf_counter() - waiting
            if left <= 0:
                self._give_up(session, number)
            elif session is None and now > said:
                self._log_wait(left)
                said = now + _SAY_AGAIN

    def _give_up(self, session, number: int) -> None:
        """At a time limit: a silent teacher is lost, and after a lost one the student gives up."""
        if session is not None:
            seconds = self._settings.timeout
            self._connections.lose(
                session.epoch, f"it did not answer micro-batch {number} within {seconds:g} seconds"
            )
            return
        self._connections.give_up(
            f"teacher replica {self._connections.replica} is lost ({self._connections.lost_because}), "
            f"and none came back within {self._settings.connect_timeout:g} seconds (connect_timeout)"
        )

    def _log_wait(self, left: float) -> None:
        level = logging.WARNING if self._place.is_request_leader else logging.DEBUG
        who, reason = self._connections.served_by, self._connections.lost_because
        _log.log(level, "waiting up to %.0f s for %s, lost because %s", left, who, reason)

    def _formed(self, tensors: list[Tensor]) -> TeacherLogits:
        if self._settings.payload == "topk":
            return TopKLogits(*tensors)
        if self._settings.payload != "hidden":
            return DenseLogits(tensors[0])
        head, states = self._connections.teacher.head, tensors[0]
        if self._head is None:  # as it is multiplied: converted here once, not once per micro-batch
            self._head = factor_of(self._connections.head.weight.to(self._device), states.dtype)
        return HiddenStates(states, self._head, head.scale, head.softcap)


def check_question(limits: Handshake, tokens: Tensor, boundaries: Tensor, context: Context) -> None:
    """ValueError unless these are the tokens, the edges and the context of a micro-batch within the limits of the
    student."""
    if (
        tokens.dim() != 2
        or tokens.dtype.is_floating_point
        or tokens.dtype == torch.bool
        or not tokens.numel()
    ):
        raise expected("tokens", "a non-empty integer tensor [b, s]", f"{tokens.dtype} {list(tokens.shape)}")
    batch, sequence = tokens.shape
    too_long = sequence > limits.sequence_length and not len(boundaries)
    if too_long or batch * sequence > limits.max_tokens:
        raise expected(
            "tokens",
            f"rows of at most {limits.sequence_length} and {limits.max_tokens} in all",
            list(tokens.shape),
        )
    low, high = (int(edge) for edge in tokens.aminmax())
    if low < 0 or high >= limits.vocab_size:
        raise expected("tokens", f"integers in [0, {limits.vocab_size})", f"{low} to {high}")
    if len(boundaries) and batch > 1:
        raise expected("boundaries", "one row of packed sequences", f"{batch} rows")
    if len(boundaries) and (boundaries.dtype.is_floating_point or boundaries.dtype == torch.bool):
        raise expected("boundaries", "integers", boundaries.dtype)
    if len(boundaries) > sequence + 1:
        raise expected("boundaries", f"at most {sequence + 1} edges for {sequence} tokens", len(boundaries))
    longest = limits.sequence_length
    check_boundaries(sequence, boundaries.tolist(), limits.context_size, longest)
    check_context(
        context,
        batch,
        sequence,
        boundaries.tolist(),
        vocab_size=limits.vocab_size,
        longest=limits.teacher_context_length,
        most=limits.max_tokens,
    )
