"""The student's end of the link: asks ahead, receives its own vocabulary columns of the teacher's logits."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from .channel import Channel, Tag
from .errors import TeacherLost
from .facts import Facts
from .header import Header, Kind
from .inbox import Inbox
from .payload import payload_named
from .plan import Roster, responses
from .rendezvous import Meeting, join_store
from .settings import LinkSettings

_log = logging.getLogger("vcrd")
_PARTING = 10.0  # seconds that close() gives the goodbyes


class StudentLink:
    """One rank of the student's last pipeline stage, linked to the teacher replica that serves its data rank.

    columns: the true vocabulary columns that `receive` returns. waited: seconds spent waiting in `receive`.
    """

    def __init__(
        self,
        settings: LinkSettings,
        facts: Facts,
        teacher: Facts,
        roster: Roster,
        channel: Channel,
        seat: tuple[int, int],
        store: dist.Store,
        device: torch.device,
    ) -> None:
        data_rank, self._tensor_rank = seat
        self.columns = facts.shards()[self._tensor_rank]
        self.waited = 0.0
        self._settings = settings
        self._facts = facts
        self._roster = roster
        self._channel = channel
        self._store = store  # the host's store lives as long as someone holds it
        self._device = device
        pieces = [p for p in responses(teacher.shards(), facts.shards()) if p.receiver == self._tensor_rank]
        self._inbox = Inbox(
            channel,
            roster,
            self.columns,
            pieces,
            payload_named(settings.payload),
            facts.sequence_length,
            settings.max_tokens,
        )
        self._asking = threading.Lock()  # a loader thread may ask while the training loop receives
        self._asked = 0  # by request()
        self._sent = 0  # of these, those that went out
        self._given = 0  # by receive()
        self._queue: deque[Tensor] = deque()
        self._on_their_way: deque[tuple[int, dist.Work, dist.Work]] = deque()
        # A forgotten link must not leave threads behind that would run into the interpreter's end.
        self._finalizer = weakref.finalize(self, self._inbox.drop)

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
        store: dist.Store | None = None,
        device: torch.device | str = "cpu",
    ) -> StudentLink:
        """Joins the teacher; every rank of the student's last pipeline stage calls it, and blocks until it is
        there.

        vocab_size: true columns. padded_vocab_size: the student's, divided evenly over tensor_size.
        sequence_length: the longest that will be asked for. store: what `host_store` returned, on the rank
        that called it; None connects to `settings.address`. device: where `receive` puts its result. Raises
        TeacherLost or LinkError after `connect_timeout`, HandshakeRefused when the jobs do not fit.
        """
        if not 0 <= tensor_rank < tensor_size:
            raise ValueError(f"tensor_rank must be in [0, {tensor_size}), got {tensor_rank}")
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank must be in [0, {data_size}), got {data_rank}")
        own = Facts(
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            payload=settings.payload,
            max_tokens=settings.max_tokens,
            padded_vocab_size=padded_vocab_size,
            tensor_size=tensor_size,
            copies=data_size,
            credits=settings.credits,
        )
        own.shards()  # raises ValueError for a layout that cannot be
        if store is None:
            store = join_store(settings, tick=lambda: None)
        meeting = Meeting(store, settings)
        if data_rank == 0 and tensor_rank == 0:
            meeting.student_states(own)
        facts, teacher, roster, replica = meeting.student_reads(data_rank, tensor_rank)
        rank = roster.student(data_rank, tensor_rank)
        complaint = None if own == facts else f"{roster.describe(rank)} states {own}, the first rank {facts}"
        channel = meeting.take_seat(roster, replica, rank, complaint)
        _log.info("%s is linked to teacher replica %d", roster.describe(rank), replica)
        return cls(
            settings, facts, teacher, roster, channel, (data_rank, tensor_rank), store, torch.device(device)
        )

    @property
    def bytes_received(self) -> int:
        """Payload bytes that have arrived so far, headers not counted."""
        return self._inbox.bytes_received

    def request(self, tokens: Tensor) -> int:
        """Asks for the teacher's logits of tokens [b, s], any integer dtype; on tensor rank 0 only. Never
        blocks.

        Returns the micro-batch's number, 0, 1, 2 .. It goes out at once if a credit is free, else as soon as
        `receive` frees one. Raises TeacherLost when the link has ended.
        """
        if self._tensor_rank:
            raise ValueError(
                f"request must be called on tensor rank 0 only, got tensor rank {self._tensor_rank}"
            )
        self._check_tokens(tokens)
        self._inbox.check()
        # A copy even of what is int32 on the CPU already: the caller may reuse its buffer.
        tokens = tokens.detach().to("cpu", torch.int32, copy=True).contiguous()
        with self._asking:
            number = self._asked
            self._asked += 1
            self._queue.append(tokens)
            self._send_what_credits_allow()
        return number

    def receive(self, number: int) -> Tensor:
        """The teacher's logits [s, b, columns.width] of micro-batch `number`, each row up to a shift.

        float16 or float32, or uint8 codes for the loss to decode, as the payload. Called on every rank, for
        0, 1, 2 .. in this order. Raises TeacherLost when the teacher is gone or has not answered after `timeout`
        seconds in here.
        """
        if number != self._given:
            raise ValueError(f"number must be the next one, {self._given}, got {number}")
        if self._tensor_rank == 0 and number >= self._asked:
            raise ValueError(f"number must have been asked for, below {self._asked}, got {number}")
        begun = time.perf_counter()
        try:
            logits = self._inbox.take(number, self._settings.timeout).to(self._device)
        finally:
            self.waited += time.perf_counter() - begun
        with self._asking:
            self._given += 1
            self._send_what_credits_allow()
        return logits

    def close(self) -> None:
        """Parts from the teacher, or drops a link that failed. Idempotent; 10 seconds at the very most."""
        if self._finalizer.detach() is None:
            return
        self._inbox.finish(min(_PARTING, self._settings.timeout))
        self._queue.clear()
        self._on_their_way.clear()
        self._store = None

    def _check_tokens(self, tokens: Tensor) -> None:
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
        if sequence > self._facts.sequence_length or batch * sequence > self._settings.max_tokens:
            raise ValueError(
                f"tokens must be at most {self._facts.sequence_length} long and {self._settings.max_tokens} "
                f"in all, got {list(tokens.shape)}"
            )
        low, high = (int(edge) for edge in tokens.aminmax())
        if low < 0 or high >= self._facts.vocab_size:
            raise ValueError(f"tokens must be in [0, {self._facts.vocab_size}), got {low} to {high}")

    def _send_what_credits_allow(self) -> None:
        while self._on_their_way and self._on_their_way[0][0] < self._given:
            self._on_their_way.popleft()  # answered, so long since sent
        try:
            while self._queue and self._sent - self._given < self._facts.credits:
                self._send(self._queue.popleft())
        except ConnectionError:
            # Not raised from here: receive() has an answer to give first.
            self._inbox.fail(
                TeacherLost(f"{self._roster.describe(self._roster.intake)} closed its connection")
            )

    def _send(self, tokens: Tensor) -> None:
        batch, sequence = tokens.shape
        number, intake = self._sent, self._roster.intake
        self._sent += 1
        self._inbox.expect(number, (sequence, batch))
        head = self._channel.post_header(Header(Kind.REQUEST, number, sequence, batch), intake)
        self._on_their_way.append((number, head, self._channel.post(tokens, intake, Tag.TOKENS)))
