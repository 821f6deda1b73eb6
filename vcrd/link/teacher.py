"""The end of the teacher: it receives requests, broadcasts them to its ranks, and answers in shards."""

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
from torch.nn.functional import pad

from vcrd.errors import expected
from vcrd.settings import LinkSettings

from .connection import Header, Kind
from .errors import LinkError, StudentLost
from .handshake import Handshake, Head, Identity, TeacherPlace, Tokenizer
from .payload import STATE_DTYPES, check_output, encode, payload_named, whole_rows
from .plan import Place, context_rows
from .question import Context
from .replica_group import KEEPALIVE, Outcome, ReplicaGroup, outcome_of
from .requests import Request
from .teacher_session import TeacherSession, join
from .tracing import span
from .transport.opening import Endpoint

_log = logging.getLogger("vcrd")
_PARTING = 10.0  # seconds that close() gives the goodbyes
_WEIGHTS = 1 << 62  # the modulus of the digest of the weights: a share fits into int64
_UNKNOWN = Identity()
_IDLE, _BATCH, _DONE = range(3)  # what rank 0 tells the other ranks


class TeacherLink:
    """One rank of a teacher replica. All ranks of the replica stay in step over `group`. Rank 0 of `group` receives the
    requests, and the ranks of the last stage answer.

    `next_batch` waits for a lost student and drops its requests, because the student sends them again. A replica that
    loses one of its own ranks fails as a whole, with LinkError on every rank.

    Attributes:
        blocked: seconds in which `respond` has waited for earlier answers to be sent.
    """

    def __init__(
        self,
        settings: LinkSettings,
        handshake: Handshake,
        replica_group: ReplicaGroup,
        endpoint: Endpoint,
        place: TeacherPlace,
        tensor_group: dist.ProcessGroup | None,
        head_weight: Tensor | None,
    ) -> None:
        self._settings = settings
        self._handshake = handshake
        self._replica_group = replica_group
        self._endpoint = endpoint
        self._place = place
        self._tensor_group = tensor_group
        self._payload = handshake.content()
        self._head_weight = head_weight
        self._shard = handshake.shards()[place.sender or 0]
        self._done = False  # every student rank has said goodbye
        self.blocked = 0.0
        self._sessions: list[TeacherSession] = []  # the open one, if any; the finalizer ends it
        # A forgotten link must not leave threads behind that still run when the interpreter exits.
        self._finalizer = weakref.finalize(self, _end_all, self._sessions)

    @classmethod
    def connect(
        cls,
        settings: LinkSettings,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        sequence_length: int,
        place: TeacherPlace,
        group: dist.ProcessGroup | None,
        tensor_group: dist.ProcessGroup | None,
        head: Head | None = None,
        head_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        identity: Identity = _UNKNOWN,
        positions: int = 0,
    ) -> TeacherLink:
        """Joins the student job. Every rank of the replica calls it, and blocks until the student ranks are connected.

        Args:
            vocab_size: true columns.
            padded_vocab_size: that of the teacher, a multiple of the tensor size.
            group: all ranks of this replica, any backend; None when this rank is the whole replica. Its rank 0 receives
                the requests.
            tensor_group: the tensor-parallel group, for the row maximum and the top k; None when there is one tensor
                rank.
            head, head_weight: with the payload "hidden", on the last stage: the output layer, and the rows of it that
                this rank has, [padded_vocab_size / tensor size, head.size].
            device: where `respond`'s outputs lie; None: the current GPU, or the CPU where torch finds none.
            identity: its tokenizer and checkpoint count on rank 0 only.
            positions: the longest sequence that the model takes, with the context that the student does not see; 0 for
                no limit.

        Raises on every rank: StudentLost or LinkError after `connect_timeout`, HandshakeRefused
        when the jobs do not fit, ValueError when the arguments of the ranks differ.
        """
        if place.is_last_stage and place.tensor_size > 1 and tensor_group is None:
            raise expected("tensor_group", f"a group for tensor_size {place.tensor_size}", "None")
        settings.shared_secret()  # an unreadable file raises its error before any collective
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        endpoint = Endpoint(settings.transport, where, sockets=settings.sockets)
        handshake = Handshake.of(
            settings,
            vocab_size=vocab_size,
            sequence_length=sequence_length,
            padded_vocab_size=padded_vocab_size,
            tensor_size=place.tensor_size,
            copies=place.replicas,
            head=head,
            nccl=endpoint.nccl_version,
            tokenizer=identity.tokenizer,
            checkpoint=identity.checkpoint,
            positions=positions,
        )
        if settings.payload == "hidden" and place.is_last_stage:
            head_weight = _checked_head(head, head_weight, padded_vocab_size // place.tensor_size)
        replica_group = ReplicaGroup(group)
        handshake = agreed(replica_group, handshake, place, identity.weights)
        link = cls(settings, handshake, replica_group, endpoint, place, tensor_group, head_weight)
        link._join()
        return link

    def next_batch(self, limit: int) -> list[Request] | None:
        """The next 1 to `limit` requests, all of one shape, oldest first; the same list on every rank.

        Waits without a limit while the students request nothing, and up to `connect_timeout` seconds for a lost
        student. Returns None once every data-parallel rank has said goodbye. Raises StudentLost when no student has
        come back, LinkError when a rank of this replica is lost. Collectives over `group`: one all-reduce of 7 int64,
        about once a second while waiting, and one broadcast per batch.
        """
        if limit < 1:
            raise expected("limit", "at least 1", limit)
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
        """Sends the answer, of any float dtype, to the student ranks that need it.

        Args:
            output: logits [s, b, padded_vocab_size / tensor_size]; with the payload "hidden" the last hidden states [s,
                b, head.size], the same on every tensor rank.

        Called on every rank of the last stage, for each request of a batch in order. Encodes at once and sends in
        the background. Blocks while four responses are under way. The loss of a student raises its error in
        `next_batch`, not here.

        Collectives over `tensor_group`: one all-reduce for the payloads that are relative to the row's maximum; for
        "topk" those of `top_k_of`.
        """
        if self._place.sender is None:
            raise expected("respond", "a call on a rank of the last stage", "one on another stage")
        width = self._handshake.padded_vocab_size // self._handshake.tensor_size
        check_output(self._payload, output, *request.tokens.shape, width)
        session = self._sessions[0]
        with span("encode", request.number):
            tensors, top = whole_rows(self._payload, output.detach(), self._shard, self._tensor_group)
        if session.failure:
            return
        begun = time.perf_counter()
        session.responses.room.acquire()
        self.blocked += time.perf_counter() - begun
        with span("encode", request.number):
            session.responses.post(self._pieces(session, request, tensors, top))

    @property
    def bytes_sent(self) -> int:
        """Bytes of responses that this rank has given to the network since the student last joined."""
        # Another thread may call this while the session is replaced.
        responses = next((session.responses for session in list(self._sessions)), None)
        return responses.bytes_sent if responses else 0

    def close(self) -> None:
        """Closes the link of this rank, after `next_batch` has returned None or on an error. Idempotent, bounded."""
        if self._finalizer.detach() is None:
            return
        while self._sessions:
            session = self._sessions.pop()
            if self._done:
                session.finish(min(_PARTING, self._settings.timeout))
            else:  # no goodbye will arrive
                session.end()

    def _pieces(
        self, session: TeacherSession, request: Request, tensors: list[Tensor], top: Tensor | None
    ) -> list[tuple[Place, Header, list[Tensor]]]:
        """The pieces that this rank sends of one response: for each receiver, its positions and columns."""
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
            response.append((place, header, parts))
        return response

    def _join(self) -> None:
        session = join(
            self._settings,
            self._handshake,
            self._replica_group,
            self._endpoint,
            replica=self._place.replica,
            tensor_rank=self._place.sender,
            head_weight=self._head_weight,
        )
        self._sessions.append(session)
        if session.responses and self._head_weight is not None:
            session.send_head(self._head_weight)
        if self._replica_group.leads:
            ranks = sorted({place.data for place in session.places})
            _log.info("teacher replica %d serves student data ranks %s", self._place.replica, ranks)

    def _rejoin(self, failure: LinkError | None) -> None:
        """Collective. Ends the session that has failed and waits for the student to come back."""
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
        self, requests: list[Request], count: int, batch: int, sequence: int, edges: int, context: int
    ) -> list[Request]:
        """The requests on every rank. context: the longest; shorter ones are filled up for the one broadcast."""
        widths = (3, batch * sequence, edges, context, context)
        rows = [
            torch.cat(
                [
                    torch.tensor([r.number, r.data_rank, len(r.context.tokens)]),
                    r.tokens.flatten(),
                    r.boundaries,
                    *(pad(part, (0, context - len(part))) for part in r.context),
                ]
            )
            for r in requests
        ]
        table = self._replica_group.share(torch.stack(rows) if rows else None, (count, sum(widths)))
        found = []
        for row in table:
            facts, tokens, boundaries, *parts = row.split(widths)
            number, data_rank, length = facts.tolist()
            shared = Context(*(part[:length] for part in parts))
            found.append(Request(number, data_rank, tokens.view(batch, sequence), boundaries, shared))
        return found


def _rows(tensor: Tensor, spans: Sequence) -> Tensor:
    if len(spans) == 1 and spans[0].width == tensor.shape[0]:
        return tensor
    return torch.cat([tensor[span.start : span.stop] for span in spans])


def _command(requests: list[Request], done: bool) -> Sequence[int]:
    """What rank 0 tells the other ranks, which contribute zeros: kind, count, b, s, boundaries, longest context."""
    if not requests:
        return (_DONE if done else _IDLE, 0, 0, 0, 0, 0)
    longest = max(len(request.context.tokens) for request in requests)
    first = requests[0]
    return (_BATCH, len(requests), *first.tokens.shape, len(first.boundaries), longest)


def _checked_head(head: Head | None, weight: Tensor | None, width: int) -> Tensor:
    """The weight on the CPU, in the form in which it is sent; ValueError if it does not fit `head`."""
    if head is None or weight is None:
        raise expected("head, head_weight", "both on the last stage with the payload 'hidden'", "None")
    if weight.shape != (width, head.size) or weight.dtype != STATE_DTYPES[head.dtype]:
        raise expected(
            "head_weight", f"{head.dtype} {[width, head.size]}", f"{weight.dtype} {list(weight.shape)}"
        )
    return weight.detach().cpu().contiguous()


def agreed(
    replica_group: ReplicaGroup, handshake: Handshake, place: TeacherPlace, weights: int | None
) -> Handshake:
    """What a replica states, on every rank: with the output layer of the last stage, and with the tokenizer and the
    checkpoint of rank 0. weights: this rank's share of the digest, as in `Identity`.

    ValueError on every rank if the ranks do not form one replica. Collectives: a few of some int64.
    """
    return _identified(replica_group, _as_one(replica_group, handshake, place), weights)


def _as_one(replica_group: ReplicaGroup, handshake: Handshake, place: TeacherPlace) -> Handshake:
    own = [
        handshake.vocab_size,
        handshake.padded_vocab_size,
        handshake.sequence_length,
        handshake.tensor_size,
        handshake.copies,
        handshake.max_tokens,
        handshake.top_k,
        handshake.positions,
        payload_named(handshake.payload).code,
        place.replica,
    ]
    sender = -1 if place.sender is None else place.sender
    rows = replica_group.gather([sender, *_head_numbers(handshake.head), handshake.nccl, *own])
    if any(row[6:] != rows[0][6:] for row in rows):
        raise expected(
            "arguments", "equal ones on every rank of a teacher replica", [row[6:] for row in rows]
        )
    senders = sorted(row[0] for row in rows if row[0] >= 0)
    if senders != list(range(handshake.tensor_size)):
        raise expected("group", "each tensor rank of the last stage once", f"tensor ranks {senders}")
    heads = [row[1:5] for row in rows if row[0] >= 0]
    if any(head != heads[0] for head in heads):
        raise expected("head", "an equal one on every rank of the last stage", heads)
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
    """A head as int64 numbers for a collective, the two floats as their bits."""
    if head is None:
        return [0, 0, 0, 0]
    bits = struct.unpack("<2q", struct.pack("<2d", head.scale, head.softcap or 0.0))
    return [head.size, list(STATE_DTYPES).index(head.dtype), *bits]


def _head_of(numbers: Sequence[int]) -> Head | None:
    size, dtype, *bits = numbers
    if not size:
        return None
    scale, softcap = struct.unpack("<2d", struct.pack("<2q", *bits))
    return Head(size, list(STATE_DTYPES)[dtype], scale, softcap or None)


def _end_all(sessions: list[TeacherSession]) -> None:
    while sessions:
        sessions.pop().end()
