"""The teacher's end of the link: takes in requests, spreads them over its ranks, answers in shards."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from . import facts as stated
from .channel import Channel, Tag
from .crew import KEEPALIVE, Crew, Outcome, outcome_of
from .delivery import Delivery
from .errors import LinkError, StudentLost
from .facts import Facts
from .header import Header, Kind
from .intake import Intake, Request
from .payload import encode, payload_named, row_max
from .plan import Roster, responses
from .rendezvous import Meeting, join_store
from .settings import LinkSettings

_log = logging.getLogger("vcrd")
_PARTING = 10.0  # seconds that close() gives the goodbyes
_IDLE, _BATCH, _DONE = range(3)  # what rank 0 says to the others


class TeacherLink:
    """One rank of a teacher replica. The ranks of its last stage, and its rank 0, have a seat in the link's
    group; all ranks of the replica stay in step over `group`, their own.

    A link that fails raises in `next_batch`, on every rank of the replica alike: one rank that raised alone
    would leave the others in a collective.
    """

    def __init__(
        self,
        settings: LinkSettings,
        facts: Facts,
        student: Facts,
        roster: Roster,
        crew: Crew,
        channel: Channel | None,
        tensor_rank: int,
        is_last_stage: bool,
        tensor_group: dist.ProcessGroup | None,
        store: dist.Store | None,
    ) -> None:
        self._facts = facts
        self._roster = roster
        self._crew = crew
        self._channel = channel
        self._payload = payload_named(settings.payload)
        self._parting = min(_PARTING, settings.timeout)
        self._width = facts.padded_vocab_size // facts.tensor_size
        self._shard = facts.shards()[tensor_rank]
        self._pieces = [p for p in responses(facts.shards(), student.shards()) if p.sender == tensor_rank]
        self._tensor_group = tensor_group
        self._store = store
        self._intake: Intake | None = None
        self._delivery: Delivery | None = None
        if channel:
            self._intake = Intake(
                channel, roster, facts.vocab_size, facts.sequence_length, facts.max_tokens, student.credits
            )
            # A forgotten link must not leave threads behind that would run into the interpreter's end.
            self._finalizer = weakref.finalize(self, self._intake.drop)
        if channel and is_last_stage:
            self._delivery = Delivery(channel, roster, self._intake, settings.timeout)

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
        replica: int,
        replicas: int,
        is_last_stage: bool,
        group: dist.ProcessGroup | None,
        tensor_group: dist.ProcessGroup | None,
    ) -> TeacherLink:
        """Joins the student job; every rank of the replica calls it, and blocks until the students are there.

        vocab_size: true columns. padded_vocab_size: the teacher's, divided evenly over tensor_size.
        group: all ranks of this replica, any backend; None when this rank is all of it. Its rank 0 takes in
        the requests. tensor_group: the tensor-parallel group, for the row maximum; None when tensor_size is
        1. Raises, on every rank alike, StudentLost or LinkError after `connect_timeout`, HandshakeRefused
        when the jobs do not fit, ValueError when the replica's ranks contradict each other.
        """
        facts = Facts(
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            payload=settings.payload,
            max_tokens=settings.max_tokens,
            padded_vocab_size=padded_vocab_size,
            tensor_size=tensor_size,
            copies=replicas,
        )
        facts.shards()  # raises ValueError for a layout that cannot be
        if not 0 <= tensor_rank < tensor_size:
            raise ValueError(f"tensor_rank must be in [0, {tensor_size}), got {tensor_rank}")
        if not 0 <= replica < replicas:
            raise ValueError(f"replica must be in [0, {replicas}), got {replica}")
        if is_last_stage and tensor_size > 1 and tensor_group is None:
            raise ValueError(f"tensor_group must be given for tensor_size {tensor_size}, got None")
        crew = Crew(group)
        facts = _agreed(crew, facts, replica, tensor_rank if is_last_stage else -1)
        student, store = _meet(crew, settings, facts, replica)
        roster = stated.roster(student, facts, replica)
        rank = roster.sender(tensor_rank) if is_last_stage else roster.intake if crew.leads else None
        channel, store = _take_seat(crew, settings, roster, replica, rank, store)
        if crew.leads:
            _log.info("teacher replica %d is linked to student data ranks %s", replica, roster.data_ranks)
        return cls(
            settings, facts, student, roster, crew, channel, tensor_rank, is_last_stage, tensor_group, store
        )

    def next_batch(self, limit: int) -> list[Request] | None:
        """The next 1 to `limit` requests, all of one shape, oldest first; the same list on every rank.

        Waits for as long as the students ask nothing. None once every student rank has said goodbye. Raises
        StudentLost or LinkError. Collectives over `group`: one all-reduce of 5 int64, about once a second
        while waiting, and one broadcast per batch.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        while True:
            requests = self._intake.take(limit, KEEPALIVE) if self._crew.leads else []
            failure = self._intake.failure if self._intake else None
            failed, kind, *shape = self._crew.agree([failure is not None, *_command(requests)])
            if failed:
                self._crew.conclude(outcome_of(failure) if failure else Outcome.DONE, str(failure or ""))
            if kind == _DONE:
                return None
            if kind == _BATCH:
                return self._spread(requests, *shape)

    def respond(self, request: Request, logits: Tensor) -> None:
        """Sends logits [s, b, padded_vocab_size / tensor_size], any float dtype, to those who need them.

        Called on every rank of the last stage, for each request of a batch in order. Encodes at once, sends
        in the background; blocks while as many responses as may be are under way. A student that is lost is
        raised by `next_batch`, not here. Collectives over `tensor_group`: one all-reduce for the
        payloads that are relative to the row's maximum.
        """
        if self._delivery is None:
            raise ValueError("respond must be called on ranks of the last stage only")
        batch, sequence = request.tokens.shape
        if logits.shape != (sequence, batch, self._width) or not logits.dtype.is_floating_point:
            raise ValueError(
                f"logits must be a float tensor {[sequence, batch, self._width]}, "
                f"got {logits.dtype} {list(logits.shape)}"
            )
        logits = logits.detach()[..., : self._shard.width]
        top = row_max(logits, self._tensor_group) if self._payload.relative else None
        if self._intake.failure:
            return
        self._delivery.wait_for_room()
        works = []
        for piece in self._pieces:
            columns = logits[..., piece.start - self._shard.start : piece.stop - self._shard.start]
            wire = encode(self._payload, columns, top)
            header = Header(
                Kind.RESPONSE, request.number, sequence, batch, piece.start, piece.stop, self._payload.code
            )
            works += self._post(self._roster.student(request.data_rank, piece.receiver), header, wire)
        self._delivery.add(works)

    def close(self) -> None:
        """Ends this rank's part: after `next_batch` gave None, or on a failure. Idempotent, bounded."""
        if self._channel is None or self._finalizer.detach() is None:
            return
        self._intake.finish(self._parting)
        if self._delivery:
            self._delivery.stop(self._parting)
        self._store = None

    def _spread(self, requests: list[Request], count: int, batch: int, sequence: int) -> list[Request]:
        rows = [torch.cat([torch.tensor([r.number, r.data_rank]), r.tokens.flatten()]) for r in requests]
        table = self._crew.share(torch.stack(rows) if rows else None, (count, 2 + batch * sequence))
        return [
            Request(int(number), int(data_rank), row.view(batch, sequence))
            for (number, data_rank), row in zip(table[:, :2], table[:, 2:], strict=True)
        ]

    def _post(self, student: int, header: Header, wire: Tensor) -> list[tuple[int, dist.Work]]:
        try:
            with self._intake.listening(student) as listening:
                if not listening:
                    return []
                works = [(student, self._channel.post_header(header, student))]
                if wire.numel():
                    works.append((student, self._channel.post(wire, student, Tag.PAYLOAD)))
                return works
        except ConnectionError:
            self._intake.fail(StudentLost(f"{self._roster.describe(student)} closed its connection"))
            return []


def _command(requests: list[Request] | None) -> Sequence[int]:
    """What rank 0 says, and the other ranks' zeros under it: kind, count, b, s."""
    if requests is None:
        return (_DONE, 0, 0, 0)
    if not requests:
        return (_IDLE, 0, 0, 0)
    return (_BATCH, len(requests), *requests[0].tokens.shape)


def _agreed(crew: Crew, facts: Facts, replica: int, sender: int) -> Facts:
    """The facts with rank 0's place in them; ValueError on every rank if they do not make up one replica.

    sender: this rank's tensor rank if it is on the last stage, else -1.
    """
    own = [
        facts.vocab_size,
        facts.padded_vocab_size,
        facts.sequence_length,
        facts.tensor_size,
        facts.copies,
        facts.max_tokens,
        payload_named(facts.payload).code,
        replica,
    ]
    rows = crew.gather([sender, *own])
    if any(row[1:] != rows[0][1:] for row in rows):
        raise ValueError(
            f"the ranks of a teacher replica must be given equal facts, got {[row[1:] for row in rows]}"
        )
    senders = sorted(row[0] for row in rows if row[0] >= 0)
    if senders != list(range(facts.tensor_size)):
        raise ValueError(
            f"group must hold each tensor rank of the last stage once, got tensor ranks {senders}"
        )
    return replace(facts, intake_sender=rows[0][0])


def _meet(crew: Crew, settings: LinkSettings, facts: Facts, replica: int) -> tuple[Facts, dist.Store | None]:
    """The student's facts on every rank, and on rank 0 the store over which they came."""
    stores = []

    def task(tick: Callable[[], None]) -> str:
        stores.append(join_store(settings, tick))
        return Meeting(stores[0], settings, tick).teacher_states_and_reads(facts, replica).text()

    text = crew.follow_leader(task)
    return stated.read(text.encode(), "student"), stores[0] if stores else None


def _take_seat(
    crew: Crew,
    settings: LinkSettings,
    roster: Roster,
    replica: int,
    rank: int | None,
    store: dist.Store | None,
) -> tuple[Channel | None, dist.Store | None]:
    """This rank's place in the link's group, None without a seat; raises alike on every rank."""
    channel, outcome, text = None, Outcome.DONE, ""
    try:
        if rank is not None:
            store = store or join_store(settings, tick=lambda: None)
            channel = Meeting(store, settings).take_seat(roster, replica, rank, complaint=None)
    except LinkError as error:
        outcome, text = outcome_of(error), str(error)
    try:
        crew.conclude(outcome, text)
    except LinkError:
        if channel:
            channel.close()
        raise
    return channel, store
