"""The teacher's end of the link: takes in requests, spreads them over its ranks, answers in shards."""

from __future__ import annotations

import json
import logging
import struct
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.settings import LinkSettings

from .errors import LinkError, StudentLost
from .handshake import Handshake, Head, Tokenizer
from .header import Header, Kind
from .payload import STATE_DTYPES, encode, payload_named, row_max
from .plan import Place, context_rows
from .replica_group import KEEPALIVE, Outcome, ReplicaGroup, outcome_of
from .requests import Request
from .teacher_session import TeacherSession, join
from .topk import top_k_of
from .tracing import span
from .transport import Endpoint, Outgoing

_log = logging.getLogger("vcrd")
_PARTING = 10.0  # seconds that close() gives the goodbyes
_WEIGHTS = 1 << 62  # the modulus of what stands for the weights: a share fits into int64
_IDLE, _BATCH, _DONE = range(3)  # what rank 0 says to the others


class TeacherLink:
    """One rank of a teacher replica. All ranks of the replica stay in step over `group`, their own; its rank 0 takes in
    the requests, and the ranks of its last stage answer.

    A lost student is waited for, inside `next_batch`, and its requests are forgotten: it asks again. A replica that
    loses one of its own ranks is lost as a whole and raises LinkError, on every rank alike.

    blocked: seconds in which `respond` waited for earlier answers to be sent.
    """

    def __init__(
        self,
        settings: LinkSettings,
        handshake: Handshake,
        replica_group: ReplicaGroup,
        endpoint: Endpoint,
        replica: int,
        tensor_rank: int | None,
        tensor_group: dist.ProcessGroup | None,
        head_weight: Tensor | None,
    ) -> None:
        self._settings = settings
        self._handshake = handshake
        self._replica_group = replica_group
        self._endpoint = endpoint
        self._replica = replica
        self._tensor_rank = tensor_rank  # None before the last stage
        self._tensor_group = tensor_group
        self._payload = handshake.content()
        self._head_weight = head_weight
        self._shard = handshake.shards()[tensor_rank or 0]
        self._done = False  # every student has said goodbye
        self.blocked = 0.0
        self._sessions: list[
            TeacherSession
        ] = []  # the one that stands, if any: what a forgotten link has to end
        # A forgotten link must not leave threads behind that would run into the interpreter's end.
        self._finalizer = weakref.finalize(self, _end_all, self._sessions)

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
        head: Head | None = None,
        head_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        tokenizer: Tokenizer | None = None,
        weights: int | None = None,
        checkpoint: str = "",
    ) -> TeacherLink:
        """Joins the student job; every rank of the replica calls it, and blocks until the students are there.

        vocab_size: true columns. padded_vocab_size: the teacher's, divided evenly over tensor_size.
        group: all ranks of this replica, any backend; None when this rank is all of it. Its rank 0 takes in
        the requests. tensor_group: the tensor-parallel group, for the row maximum and the top k; None when
        tensor_size is 1. head, head_weight: with the payload "hidden", on the last stage: what the output layer is,
        and this rank's rows of it, [padded_vocab_size / tensor_size, head.size]. device: where `respond`'s outputs lie;
        None: the current GPU, or the CPU where torch finds none. tokenizer: that the model was trained with, None if
        not known. weights: this rank's share of a number that stands for the replica's weights, from 0 to 2^62 - 1: the
        shares of its ranks are added modulo 2^62; None if not known. checkpoint: what people call these weights. Of
        tokenizer and checkpoint rank 0's count.

        Raises, on every rank alike, StudentLost or LinkError after `connect_timeout`, HandshakeRefused
        when the jobs do not fit, ValueError when the replica's ranks contradict each other.
        """
        if not 0 <= tensor_rank < tensor_size:
            raise ValueError(f"tensor_rank must be in [0, {tensor_size}), got {tensor_rank}")
        if not 0 <= replica < replicas:
            raise ValueError(f"replica must be in [0, {replicas}), got {replica}")
        if is_last_stage and tensor_size > 1 and tensor_group is None:
            raise ValueError(f"tensor_group must be given for tensor_size {tensor_size}, got None")
        settings.shared_secret()  # a file that cannot be read is told before any collective
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        endpoint = Endpoint(settings.transport, where, sockets=settings.sockets)
        handshake = Handshake.of(
            settings,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            padded_vocab_size=padded_vocab_size,
            tensor_size=tensor_size,
            copies=replicas,
            head=head,
            nccl=endpoint.nccl_version,
            tokenizer=tokenizer,
            checkpoint=checkpoint,
        )
        if settings.payload == "hidden" and is_last_stage:
            head_weight = _checked_head(head, head_weight, padded_vocab_size // tensor_size)
        replica_group = ReplicaGroup(group)
        handshake = _agreed(replica_group, handshake, replica, tensor_rank if is_last_stage else -1)
        handshake = _identified(replica_group, handshake, weights)
        own = tensor_rank if is_last_stage else None
        link = cls(settings, handshake, replica_group, endpoint, replica, own, tensor_group, head_weight)
        link._join()
        return link

    def next_batch(self, limit: int) -> list[Request] | None:
        """The next 1 to `limit` requests, all of one shape, oldest first; the same list on every rank.

        Waits for as long as the students ask nothing, and up to `connect_timeout` seconds for a lost student. None
        once every student rank has said goodbye. Raises StudentLost when no student came back, LinkError when a rank
        of this replica is lost. Collectives over `group`: one all-reduce of 6 int64, about once a second
        while waiting, and one broadcast per batch.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        while True:
            session = self._sessions[0]
            requests, done = session.take(limit, KEEPALIVE) if self._replica_group.leads else ([], False)
            failure = session.failure
            failed, kind, *shape = self._replica_group.agree([failure is not None, *_command(requests, done)])
            if kind == _DONE:
                self._done = True
                return None
            if failed:
                self._rejoin(failure)
            elif kind == _BATCH:
                return self._spread(requests, *shape)

    def respond(self, request: Request, output: Tensor) -> None:
        """Sends the answer, of any float dtype, to those who need it.

        output: logits [s, b, padded_vocab_size / tensor_size]; with the payload "hidden" the last hidden states
        [s, b, head.size], the same on every tensor rank. Called on every rank of the last stage, for each request of a
        batch in order. Encodes at once, sends in the background; blocks while as many responses as may be are under
        way. A student that is lost shows in `next_batch`, not here. Collectives over `tensor_group`: one all-reduce
        for the payloads that are relative to the row's maximum; for "topk" those of `top_k_of`.
        """
        if self._tensor_rank is None:
            raise ValueError("respond must be called on ranks of the last stage only")
        self._check_output(request, output)
        session = self._sessions[0]
        with span("encode", request.number):
            tensors, top = self._whole_rows(output.detach())
        if session.failure:
            return
        begun = time.perf_counter()
        session.responses.wait_for_room()
        self.blocked += time.perf_counter() - begun
        with span("encode", request.number):
            response = self._pieces(session, request, tensors, top)
        session.responses.post(response)

    @property
    def bytes_sent(self) -> int:
        """Bytes of responses that this rank has handed to the network since the student last joined."""
        # Another thread may read this while the session is replaced.
        responses = next((session.responses for session in list(self._sessions)), None)
        return responses.bytes_sent if responses else 0

    def close(self) -> None:
        """Ends this rank's part: after `next_batch` gave None, or on a failure. Idempotent, bounded."""
        if self._finalizer.detach() is None:
            return
        while self._sessions:
            session = self._sessions.pop()
            if self._done:
                session.finish(min(_PARTING, self._settings.timeout))
            else:  # no student is about to say goodbye
                session.end()

    def _whole_rows(self, output: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """What concerns whole rows of the vocabulary, before they are cut into pieces; with their maxima if needed."""
        if self._payload.name == "hidden":
            return [output], None
        logits = output[..., : self._shard.width]
        if self._payload.name == "topk":
            return list(top_k_of(logits, self._payload.top_k, self._shard, self._tensor_group)), None
        return [logits], row_max(logits, self._tensor_group) if self._payload.relative else None

    def _pieces(
        self, session: TeacherSession, request: Request, tensors: list[Tensor], top: Tensor | None
    ) -> list[tuple[Place, Header, list[Outgoing]]]:
        """What this rank sends of one response: by receiver, the positions and columns that it lacks."""
        batch, sequence = request.tokens.shape
        boundaries, response = request.boundaries.tolist(), []
        for place, piece in session.pieces:
            if place.data != request.data_rank or not session.responses.wants(place, request.number):
                continue
            spans = context_rows(sequence, place.context, session.student.context_size, boundaries)
            parts = [_rows(tensor, spans) for tensor in tensors]
            if not self._payload.whole:
                columns = slice(piece.start - self._shard.start, piece.stop - self._shard.start)
                shift = None if top is None else _rows(top, spans)
                parts = [encode(self._payload, parts[0][..., columns], shift, self._endpoint.memory.empty)]
            elif self._payload.name == "hidden":  # the caller may reuse its buffer
                parts = [encode(self._payload, parts[0], empty=self._endpoint.memory.empty)]
            header = Header(
                Kind.RESPONSE,
                number=request.number,
                sequence=sequence,
                batch=batch,
                boundaries=len(boundaries),
                start=piece.start,
                stop=piece.stop,
                payload=self._payload.code,
            )
            response.append((place, header, [session.responses.stage(place, part) for part in parts]))
        return response

    def _check_output(self, request: Request, output: Tensor) -> None:
        batch, sequence = request.tokens.shape
        hidden = self._payload.name == "hidden"
        width = (
            self._payload.state_size
            if hidden
            else self._handshake.padded_vocab_size // self._handshake.tensor_size
        )
        if output.shape != (sequence, batch, width) or not output.dtype.is_floating_point:
            raise ValueError(
                f"{'states' if hidden else 'logits'} must be a float tensor {[sequence, batch, width]}, "
                f"got {output.dtype} {list(output.shape)}"
            )

    def _join(self) -> None:
        session = join(
            self._settings,
            self._handshake,
            self._replica_group,
            self._endpoint,
            self._replica,
            self._tensor_rank,
            self._head_weight,
        )
        self._sessions.append(session)
        if session.responses and self._head_weight is not None:
            session.send_head(self._head_weight)
        if self._replica_group.leads:
            ranks = sorted({place.data for place in session.places})
            _log.info("teacher replica %d serves student data ranks %s", self._replica, ranks)

    def _rejoin(self, failure: LinkError | None) -> None:
        """Collective. Ends the session that failed and waits for the student to come back."""
        try:
            self._replica_group.conclude(outcome_of(failure) if failure else Outcome.DONE, str(failure or ""))
        except StudentLost as lost:
            reason = str(lost)
        finally:
            while self._sessions:
                self._sessions.pop().end()
        if self._replica_group.leads:
            seconds = self._settings.connect_timeout
            _log.warning("%s; waiting up to %g seconds for it to come back", reason, seconds)
        try:
            self._join()
        except StudentLost as error:
            raise StudentLost(f"{reason}, and {error}") from None

    def _spread(
        self, requests: list[Request], count: int, batch: int, sequence: int, edges: int
    ) -> list[Request]:
        rows = [
            torch.cat([torch.tensor([r.number, r.data_rank]), r.tokens.flatten(), r.boundaries])
            for r in requests
        ]
        table = self._replica_group.share(
            torch.stack(rows) if rows else None, (count, 2 + batch * sequence + edges)
        )
        return [
            Request(
                int(number),
                int(data_rank),
                row[: batch * sequence].view(batch, sequence),
                row[batch * sequence :],
            )
            for (number, data_rank), row in zip(table[:, :2], table[:, 2:], strict=True)
        ]


def _rows(tensor: Tensor, spans: Sequence) -> Tensor:
    if len(spans) == 1 and spans[0].width == tensor.shape[0]:
        return tensor
    return torch.cat([tensor[span.start : span.stop] for span in spans])


def _command(requests: list[Request], done: bool) -> Sequence[int]:
    """What rank 0 says, and the other ranks' zeros under it: kind, count, b, s, boundaries."""
    if done:
        return (_DONE, 0, 0, 0, 0)
    if not requests:
        return (_IDLE, 0, 0, 0, 0)
    return (_BATCH, len(requests), *requests[0].tokens.shape, len(requests[0].boundaries))


def _checked_head(head: Head | None, weight: Tensor | None, width: int) -> Tensor:
    """The weight on the CPU, as it travels; ValueError if it does not fit what `head` says."""
    if head is None or weight is None:
        raise ValueError(
            "head and head_weight must be given on the last stage with the payload 'hidden', got None"
        )
    if weight.shape != (width, head.size) or weight.dtype != STATE_DTYPES[head.dtype]:
        raise ValueError(
            f"head_weight must be {head.dtype} {[width, head.size]}, got {weight.dtype} {list(weight.shape)}"
        )
    return weight.detach().cpu().contiguous()


def _agreed(replica_group: ReplicaGroup, handshake: Handshake, replica: int, sender: int) -> Handshake:
    """The handshake with the last stage's output layer in it, on every rank.

    ValueError on every rank if the ranks do not make up one replica. sender: this rank's tensor rank if it is on the
    last stage, else -1.
    """
    own = [
        handshake.vocab_size,
        handshake.padded_vocab_size,
        handshake.sequence_length,
        handshake.tensor_size,
        handshake.copies,
        handshake.max_tokens,
        handshake.top_k,
        payload_named(handshake.payload).code,
        replica,
    ]
    rows = replica_group.gather([sender, *_head_numbers(handshake.head), handshake.nccl, *own])
    if any(row[6:] != rows[0][6:] for row in rows):
        raise ValueError(
            f"the ranks of a teacher replica must be given equal arguments, got {[row[6:] for row in rows]}"
        )
    senders = sorted(row[0] for row in rows if row[0] >= 0)
    if senders != list(range(handshake.tensor_size)):
        raise ValueError(
            f"group must hold each tensor rank of the last stage once, got tensor ranks {senders}"
        )
    heads = [row[1:5] for row in rows if row[0] >= 0]
    if any(head != heads[0] for head in heads):
        raise ValueError(f"head must be equal on every rank of the last stage, got {heads}")
    versions = {row[5] for row in rows if row[0] >= 0}
    nccl = versions.pop() if len(versions) == 1 else 0
    return replace(handshake, head=_head_of(heads[0]), nccl=nccl)


def _identified(replica_group: ReplicaGroup, handshake: Handshake, weights: int | None) -> Handshake:
    """The handshake on every rank with rank 0's tokenizer and checkpoint, and the digest of the replica's weights."""
    own = {name: handshake.plain()[name] for name in ("tokenizer", "checkpoint")}
    found = json.loads(replica_group.share_text(json.dumps(own)))
    tokenizer = None if found["tokenizer"] is None else Tokenizer(**found["tokenizer"])
    shares = replica_group.gather([weights is not None, (weights or 0) % _WEIGHTS])
    digest = (
        f"{sum(share for _, share in shares) % _WEIGHTS:016x}" if all(known for known, _ in shares) else ""
    )
    return replace(handshake, tokenizer=tokenizer, checkpoint=found["checkpoint"], weights=digest)


def _head_numbers(head: Head | None) -> list[int]:
    """A head as integers that a collective can carry, the two floats bit by bit."""
    if head is None:
        return [0, 0, 0, 0]
    bits = struct.unpack("<2q", struct.pack("<2d", head.scale, head.softcap))
    return [head.size, list(STATE_DTYPES).index(head.dtype), *bits]


def _head_of(numbers: Sequence[int]) -> Head | None:
    size, dtype, *bits = numbers
    if not size:
        return None
    scale, softcap = struct.unpack("<2d", struct.pack("<2q", *bits))
    return Head(size, list(STATE_DTYPES)[dtype], scale, softcap)


def _end_all(sessions: list[TeacherSession]) -> None:
    while sessions:
        sessions.pop().end()
