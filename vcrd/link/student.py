"""The student's end of the link: asks ahead, receives its own part of the teacher's answers, outlives a teacher."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from vcrd.settings import LinkSettings

from .answers import Hidden, TopK
from .errors import HandshakeRefused, LinkError, TeacherLost
from .handshake import Handshake, Tokenizer, served_by
from .header import Header, Kind
from .plan import Place, check_boundaries
from .reassembly import Reassembly
from .rendezvous import ask, ask_until, listen, local_host
from .student_connections import StudentConnections
from .tracing import span
from .transport import Arrived, Endpoint
from .waits import Waits
from .wire import dial

_log = logging.getLogger("vcrd")
_PARTING = 10.0  # seconds that close() gives the goodbyes
_SAY_AGAIN = 30.0  # seconds between two log lines while a teacher is waited for
_LOOK = 0.5  # seconds between two questions for a refusal, while the first teacher is waited for
_QUESTIONS = 500  # a second, from all ranks together: rank 0 answers each in a thread of its own
_LINGER = 4 * _LOOK  # seconds for the others to ask for a refusal too: rank 0 takes the rendezvous along


class StudentLink:
    """One rank of the student's last pipeline stage, linked to the teacher replica that serves its data rank.

    columns: the true vocabulary columns that `receive` returns. waits: how long `receive` waited, and for what.
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
        self._asking = threading.Lock()  # a loader thread may ask while the training loop receives
        self._asked = 0  # by request()
        self._sent = 0  # of these, those that went out to this epoch's teacher
        self._epoch = 0
        self._given = 0  # by receive()
        self._requests: dict[int, tuple[Tensor, Tensor]] = {}  # what might have to be asked for (again)
        sock = listen(local_host(settings), 0)
        me = weakref.WeakMethod(self._send_what_credits_allow)
        self._connections = StudentConnections(
            settings,
            handshake,
            place,
            sock,
            self._reassembly,
            self._changed,
            lambda: (me() or (lambda: None))(),
            endpoint,
        )
        # A forgotten link must not leave threads behind that would run into the interpreter's end.
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
    ) -> StudentLink:
        """Joins the teacher; every rank of the student's last pipeline stage calls it, and blocks until it is
        there. Rank 0 of the student's world has called `host_rendezvous` before, or is about to.

        vocab_size: true columns. padded_vocab_size: the student's, divided evenly over tensor_size.
        sequence_length: the longest that will be asked for, before any split over context_size. data_rank: without
        context parallelism. device: where `receive` puts its result. tokenizer: whose ids are asked for, the same on
        every rank; None if not known. Raises TeacherLost or LinkError after
        `connect_timeout`, HandshakeRefused when the jobs do not fit.
        """
        for name, rank, size in (
            ("tensor", tensor_rank, tensor_size),
            ("data", data_rank, data_size),
            ("context", context_rank, context_size),
        ):
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank must be in [0, {size}), got {rank}")
        settings.shared_secret()  # a file that cannot be read is told before anything is opened
        # One block more than are on their way or complete: the one in use, until the next one is taken.
        # With credits 0 nothing is asked for early, and one request is under way at a time.
        credits = max(1, settings.credits)
        endpoint = Endpoint(settings.transport, torch.device(device), credits + 1)
        place = Place(data_rank, context_rank, tensor_rank)
        handshake = Handshake.of(
            settings,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            padded_vocab_size=padded_vocab_size,
            tensor_size=tensor_size,
            copies=data_size,
            context_size=context_size,
            credits=credits,
            nccl=endpoint.nccl_version,
            tokenizer=tokenizer,
            identity=settings.identity,
        )
        link = cls(settings, handshake, place, endpoint)
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
    def waited(self) -> float:
        """Seconds spent waiting in `receive`."""
        return self.waits.seconds

    @property
    def served_by(self) -> tuple[int | None, int]:
        """The teacher replica that serves this rank, None before one came, and how many replicas there are."""
        session = self._connections.session
        return self._connections.replica, session.teacher.copies if session else 0

    @property
    def bytes_received(self) -> int:
        """Bytes that have arrived from the teacher so far: payloads, headers, and its output layer if it sent that."""
        return self._connections.bytes_received

    def request(self, tokens: Tensor, boundaries: Tensor | Sequence[int] = ()) -> int:
        """Asks for the teacher's answer to tokens [b, s], any integer dtype; on the first rank of a data rank (tensor
        and context rank 0) only. Blocks for the teacher only where one that has stopped lets megabytes of tokens pile
        up, and then for `timeout` seconds at most.

        tokens: the whole sequences, before any split over context ranks. boundaries: of sequences that are packed into
        one row (b = 1), their edges from 0 to s, as Megatron's cu_seqlens; no token then sees another sequence's. Then
        `sequence_length` bounds each of them and `max_tokens` the row.
        Returns the micro-batch's number, 0, 1, 2 .. It goes out at once if a credit is free, else as soon as
        `receive` frees one, and again to a teacher that comes after one that was lost.
        """
        if not self._place.asks:
            raise ValueError(
                f"request must be called on tensor rank 0 and context rank 0 only, got {self._place}"
            )
        edges = torch.as_tensor(boundaries).flatten().cpu()
        self._check_tokens(tokens, edges)
        if self._connections.failure:
            raise self._connections.failure
        # A copy even of what is int32 on the CPU already: the caller may reuse its buffer.
        tokens = tokens.detach().to("cpu", torch.int32, copy=True).contiguous()
        with self._asking:
            number = self._asked
            self._requests[number] = (tokens, edges.to(torch.int32, copy=True))
            self._asked += 1
        self._send_what_credits_allow()
        return number

    def receive(self, number: int) -> Tensor | TopK | Hidden:
        """The teacher's answer to micro-batch `number`, for this rank's positions and columns.

        Logits [s / context_size, b, columns.width], each row up to a shift: float16 or float32, or uint8 codes for the
        loss to decode, as the payload; or `TopK` or `Hidden`. Called on every rank, for 0, 1, 2 .. in this order.
        Positions are in the order in which Megatron's context parallelism holds them (`plan.context_rows`).

        A teacher that is lost, or gives no sign of life for `timeout` seconds in here, is waited for; TeacherLost when
        none came back within `connect_timeout` seconds in here.
        """
        if number != self._given:
            raise ValueError(f"number must be the next one, {self._given}, got {number}")
        if self._place.asks and number >= self._asked:
            raise ValueError(f"number must have been asked for, below {self._asked}, got {number}")
        there = number < self._reassembly.complete
        with self.waits.counted(there, lambda: self._reassembly.seconds_arriving), span("wait", number):
            arrived = self._wait_for(number)
        with self._asking:
            self._given += 1
        self._send_what_credits_allow()
        return self._formed(arrived.ready())

    def close(self) -> None:
        """Parts from the teacher, or drops a link that failed. Idempotent; some 10 seconds at the very most."""
        if self._finalizer.detach() is None:
            return
        if self._connections.failure:
            self._connections.end()
        else:
            self._connections.part(min(_PARTING, self._settings.timeout))
        self._requests.clear()

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
            lambda r: "asker" in r,
            self._settings.connect_timeout,
            apart=self._apart,
        )
        if reply is None:
            raise LinkError(
                f"the student's ranks did not all meet {self._within()}: rank 0 of its world hosts the rendezvous"
            )
        if not self._place.asks:
            self._join_asker(tuple(reply["asker"]), deadline)
        if self._place.asks:
            _log.info("waiting for a teacher at %s", self._settings.address)
        next_question = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._connections.linked or self._connections.failure, _LOOK)
                if self._connections.failure:
                    raise self._connections.failure
                if self._connections.linked:
                    break
            self._give_up_one_that_stopped()
            if time.monotonic() > deadline:
                raise TeacherLost(self._nobody_came(reply))
            if time.monotonic() < next_question:
                continue
            try:
                reply = ask(self._settings, hello)
            except ConnectionError:
                pass  # the next question may be answered
            next_question = time.monotonic() + self._apart
        _log.info("%s is linked to teacher replica %d", self._place, self._connections.replica)

    def _give_up_one_that_stopped(self) -> None:
        """A teacher that began to join and gives no sign of life must not keep another one out."""
        session, seconds = self._connections.session, self._settings.timeout
        if session is not None and time.monotonic() - session.heard > seconds:
            self._connections.lose(session.epoch, f"it did not finish joining within {seconds:g} seconds")

    def _join_asker(self, address: tuple, deadline: float) -> None:
        asker = Place(self._place.data, 0, 0)
        place = [self._place.data, self._place.context, self._place.tensor]
        hello = {"run": self._settings.name, "role": "sibling", "place": place}
        while True:
            try:
                connection, reply = dial(address, self._settings.shared_secret(), hello)
                break
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise LinkError(f"{asker} cannot be reached {self._within()}: {error}") from None
            time.sleep(_LOOK)
        if reply.get("state") != "welcome":
            connection.close()
            raise HandshakeRefused(f"the link is refused: {reply.get('reason')}")
        self._connections.join_asker(connection, asker)

    def _nobody_came(self, reply: dict) -> str:
        replicas, came = reply.get("replicas", 0), reply.get("came", [])
        if not replicas:
            return f"no teacher came {self._within()}"
        replica = served_by(self._handshake, replicas, self._place.data)
        how = "did not join" if replica in came else "did not come"
        return f"teacher replica {replica} {how} {self._within()}"

    def _within(self) -> str:
        return (
            f"to {self._settings.address} within {self._settings.connect_timeout:g} seconds (connect_timeout)"
        )

    def _wait_for(self, number: int) -> Arrived:
        begun = said = time.monotonic()
        while True:
            with self._changed:
                session = self._connections.session
                arrived = self._reassembly.take(number) if self._connections.head_is_here else None
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
                    with self.waits.lost(session is None):
                        self._changed.wait(min(left, 1.0))
            if left <= 0:
                self._give_up(session, number)
            elif session is None and now > said:
                self._say_for_whom(left)
                said = now + _SAY_AGAIN

    def _give_up(self, session, number: int) -> None:
        """Time is over: a teacher that gave no sign of life is lost; one that was lost does not come back."""
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

    def _say_for_whom(self, left: float) -> None:
        level = logging.WARNING if self._place.asks else logging.DEBUG
        replica, reason = self._connections.replica, self._connections.lost_because
        _log.log(level, "waiting up to %.0f s for teacher replica %s, lost because %s", left, replica, reason)

    def _formed(self, tensors: list[Tensor]) -> Tensor | TopK | Hidden:
        if self._settings.payload == "topk":
            return TopK(*tensors)
        if self._settings.payload != "hidden":
            return tensors[0]
        head = self._connections.teacher_head
        if self._head is None:
            self._head = self._connections.head.weight.to(self._device)
        return Hidden(tensors[0], self._head, head.scale, head.softcap)

    def _check_tokens(self, tokens: Tensor, boundaries: Tensor) -> None:
        if (
            tokens.dim() != 2
            or tokens.dtype.is_floating_point
            or tokens.dtype == torch.bool
            or not tokens.numel()
        ):
            raise ValueError(
                f"tokens must be a non-empty integer tensor [b, s], got {tokens.dtype} {list(tokens.shape)}"
            )
        batch, sequence = tokens.shape
        too_long = sequence > self._handshake.sequence_length and not len(boundaries)
        if too_long or batch * sequence > self._handshake.max_tokens:
            raise ValueError(
                f"tokens must be at most {self._handshake.sequence_length} long and {self._handshake.max_tokens} "
                f"in all, got {list(tokens.shape)}"
            )
        low, high = (int(edge) for edge in tokens.aminmax())
        if low < 0 or high >= self._handshake.vocab_size:
            raise ValueError(f"tokens must be in [0, {self._handshake.vocab_size}), got {low} to {high}")
        if len(boundaries) and batch > 1:
            raise ValueError(f"boundaries must come with one row of packed sequences, got {batch} rows")
        if len(boundaries) and (boundaries.dtype.is_floating_point or boundaries.dtype == torch.bool):
            raise ValueError(f"boundaries must be integers, got {boundaries.dtype}")
        if len(boundaries) > sequence + 1:
            raise ValueError(
                f"boundaries must be at most {sequence + 1} edges for {sequence} tokens, got {len(boundaries)}"
            )
        longest = self._handshake.sequence_length
        check_boundaries(sequence, boundaries.tolist(), self._handshake.context_size, longest)

    def _send_what_credits_allow(self) -> None:
        """Sends what the credits let out: asked for, and not yet complete on every rank and given out here."""
        who = f"the first rank of teacher replica {self._connections.replica}"
        with self._asking:
            session, settled = self._connections.session, self._connections.settled
            for number in [n for n in self._requests if n < settled]:
                del self._requests[number]
            if session is None or not session.ready:
                return
            if session.epoch != self._epoch:
                self._epoch, self._sent = session.epoch, settled
            try:
                while (
                    self._sent < self._asked
                    and self._sent - min(self._given, settled) < self._handshake.credits
                ):
                    self._send(session, self._sent)
                    self._sent += 1
                return
            except ConnectionError:
                reason = f"{who} closed its connection"
            except TimeoutError as error:
                reason = f"{who} {error}"
        self._connections.lose(session.epoch, reason)

    def _send(self, session, number: int) -> None:
        tokens, boundaries = self._requests[number]
        batch, sequence = tokens.shape
        self._reassembly.expect(number, (sequence, batch))
        header = Header(
            Kind.REQUEST, number=number, sequence=sequence, batch=batch, boundaries=len(boundaries)
        )
        with span("request", number):
            session.requests.send(header, tokens, boundaries, seconds=self._settings.timeout)
