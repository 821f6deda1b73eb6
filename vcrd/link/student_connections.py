"""The connections of one student rank: which teacher epoch may connect, and what happens when it is lost.

The last-stage ranks of one data-parallel rank act together. The first of them is the request leader, the others are its
peers. The leader sends the requests and admits one teacher epoch at a time. It tells its peers when the senders of an
epoch may connect and when an epoch has ended, and they report their progress to it. So all of them see the same
teacher, and a response that a lost teacher left unfinished on any of them is requested again.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vcrd.settings import LinkSettings

from . import handshake as stated
from .connection import (
    GREETING_SECONDS,
    LARGEST_FIELD,
    LONGEST_TEXT,
    Connection,
    Header,
    Kind,
    Listener,
    digest_of,
)
from .errors import HandshakeRefused, LinkError, TeacherLost
from .handshake import Handshake
from .payload import STATE_DTYPES
from .plan import Piece, Place, Shard, overlaps, pieces_of, places
from .question import Context
from .reassembly import Reassembly
from .rendezvous import UNREADABLE
from .tracing import span
from .transport.opening import Endpoint, Receiver, TransportRefused

_log = logging.getLogger("vcrd")
Keep = Callable[[Connection], None]
Start = Callable[[Callable[[Connection], None], Connection], None]
_BUSY = {"state": "busy"}  # not now: another teacher is connected, or something else has to happen first
_OVER = {"state": "over"}  # this epoch cannot connect any more, a later one can


class StudentSession:
    """One epoch of the teacher for one student rank: its handshake, what each sender sends, and the open connections.

    pieces: what each sender sends of a response. head_pieces: what each sender has of the output layer, with the
    payload "hidden".
    """

    def __init__(self, epoch: int, student: Handshake, teacher: Handshake, place: Place) -> None:
        self.epoch = epoch
        self.teacher = teacher
        self.payload = teacher.content()
        shards = teacher.shards(), student.shards()
        self.pieces = {p.sender: p for p in pieces_of(place, *shards, self.payload.whole)}
        self.head_pieces: dict[int, Piece] = {}
        if teacher.head is not None:
            self.head_pieces = {p.sender: p for p in overlaps(*shards) if p.receiver == place.tensor}
        self.head_weight: Tensor | None = None  # the memory for head_pieces
        self.senders: dict[int, Connection] = {}
        self.requests: Connection | None = None
        self.ready = False  # on the request leader: the teacher has said that all connections are open
        self.begun = time.monotonic()

    @cached_property
    def expected(self) -> frozenset[int]:
        return frozenset(self.pieces) | frozenset(self.head_pieces)

    @property
    def connected(self) -> bool:
        return self.expected == self.senders.keys()

    @property
    def connections(self) -> list[Connection]:
        return [*self.senders.values(), *([self.requests] if self.requests else [])]

    @property
    def heard(self) -> float:
        """The time.monotonic() of the last sign of life of the teacher."""
        return max([self.begun, *(connection.heard for connection in self.connections)])

    def end(self) -> None:
        for connection in self.connections:
            connection.end()


class Head:
    """The columns of the output layer of the teacher that this rank holds. Each piece is checked by its SHA-256.

    A complete layer is kept. A teacher that comes back, in any layout, must have the same layer and does not send it
    again. The lock of `StudentConnections` guards all methods except `receive`.
    """

    def __init__(self, columns: Shard) -> None:
        self._columns = columns
        self._missing: set[tuple[int, int]] = set()
        self._digests: dict[tuple[int, int], str] = {}
        self.weight: Tensor | None = None  # [columns.width, state size]

    @property
    def complete(self) -> bool:
        """Whether all pieces have arrived, or the payload needs none."""
        return not self._missing

    def begin(self, session: StudentSession) -> None:
        """Begins an epoch. An incomplete layer starts again in new memory: readers of the old epoch may still write."""
        head = session.teacher.head
        if head is not None and (self.weight is None or self._missing):
            self.weight = torch.empty(self._columns.width, head.size, dtype=STATE_DTYPES[head.dtype])
            self._missing = {_key(piece) for piece in session.head_pieces.values()}
            self._digests = {}
        session.head_weight = self.weight

    def has(self, piece: Piece, digest: str) -> bool:
        """Whether these rows have arrived already; HandshakeRefused if they have arrived and differ."""
        if self._missing:
            return False
        if _key(piece) not in self._digests:  # the teacher has come back in another layout
            self._digests[_key(piece)] = digest_of(self._rows(self.weight, piece))
        if self._digests[_key(piece)] != digest:
            raise HandshakeRefused(
                "the link is refused: the teacher came back with another output layer than before"
            )
        return True

    def receive(
        self, piece: Piece, header: Header, digest: str, session: StudentSession, connection: Connection
    ) -> None:
        """Receives the rows that follow a header; LinkError if they are not those that were announced."""
        size = session.teacher.head.size
        if (header.start, header.stop, header.number) != (piece.start, piece.stop, size):
            raise LinkError(f"its part {header.start}:{header.stop} of the output layer is not expected")
        if self.weight is session.head_weight and _key(piece) not in self._missing:
            raise LinkError(f"its part {header.start}:{header.stop} of the output layer was not requested")
        rows = self._rows(session.head_weight, piece)
        connection.receive(rows)
        if digest_of(rows) != digest:
            raise LinkError("a part of the output layer arrived damaged: its SHA-256 differs")

    def arrived(self, piece: Piece, digest: str, session: StudentSession) -> None:
        """Notes a piece after `receive`."""
        if self.weight is session.head_weight:
            self._missing.discard(_key(piece))
            self._digests[_key(piece)] = digest

    def _rows(self, weight: Tensor, piece: Piece) -> Tensor:
        return weight[piece.start - self._columns.start : piece.stop - self._columns.start]


def _key(piece: Piece) -> tuple[int, int]:
    return piece.start, piece.stop


class PeerChannel:
    """The connections among the last-stage ranks of one data-parallel rank: the request leader has one to each peer,
    each peer has one to the leader.

    changed: guards the fields. timeout: seconds within which a rank must receive something of a message. start: runs a
    reader in a thread of its own. hear: called, without the lock, with each message and its text; a LinkError that it
    raises ends that connection. lost: called when a rank is gone without a goodbye.
    """

    def __init__(
        self,
        handshake: Handshake,
        place: Place,
        timeout: float,
        changed: threading.Condition,
        start: Start,
        hear: Callable[[Place, Header, str], None],
        lost: Callable[[LinkError], None],
    ) -> None:
        others = places([place.data], handshake.context_size, handshake.tensor_size)[1:]
        self._place = place
        self._awaited = set(others) if place.is_request_leader else {Place(place.data, 0, 0)}
        self._timeout = timeout
        self._changed = changed
        self._start = start
        self._hear = hear
        self._lost = lost
        self._connections: dict[Place, Connection] = {}
        # On the request leader, for each peer, the number below which responses are complete there.
        self.progress = dict.fromkeys(others if place.is_request_leader else (), 0)
        self._left: set[Place] = set()

    @property
    def all_here(self) -> bool:
        return self._connections.keys() == self._awaited

    @property
    def connections(self) -> list[Connection]:
        return list(self._connections.values())

    def expects(self, place: Place) -> bool:
        return place in self._awaited and place not in self._connections

    def join(self, place: Place, connection: Connection) -> None:
        """Adds the connection of a peer to the leader. LinkError if there is one already."""
        with self._changed:
            if not self.expects(place):
                raise LinkError(f"{place} is not expected at {self._place}")
            self._connections[place] = connection
            self._changed.notify_all()
        self._start(partial(self._read, place), connection)

    def tell(self, header: Header, text: str = "", but: Place | None = None) -> None:
        """Sends a message to all of them except `but`."""
        raw = text.encode()[: header.length]
        for place, connection in list(self._connections.items()):
            if place == but or place in self._left:
                continue
            try:
                connection.send(header, raw, seconds=self._timeout)
            except (ConnectionError, TimeoutError) as error:
                if place not in self._left:
                    self._lost(LinkError(f"{place} is gone: {error}"))

    def _read(self, place: Place, connection: Connection) -> None:
        try:
            while (header := connection.receive_header()).kind != Kind.GOODBYE:
                if header.kind == Kind.PROGRESS and self._place.is_request_leader:
                    with self._changed:  # two threads of the peer may have sent this in either order
                        self.progress[place] = max(self.progress[place], header.number)
                self._hear(place, header, connection.receive_text(header))
            self._left.add(place)
        except (ConnectionError, LinkError) as error:
            self._lost(LinkError(f"{place} is gone: {error}"))


class StudentConnections:
    """All connections of one student rank, and on the request leader the requests.

    changed: guards everything here and in `reassembly`, and is notified of every change.
    """

    def __init__(
        self,
        settings: LinkSettings,
        handshake: Handshake,
        place: Place,
        sock: socket.socket,
        reassembly: Reassembly,
        changed: threading.Condition,
        endpoint: Endpoint,
    ) -> None:
        self._settings = settings
        self._handshake = handshake
        self._place = place
        self._reassembly = reassembly
        self._changed = changed
        self._endpoint = endpoint
        self.head = Head(handshake.shards()[place.tensor])
        self.session: StudentSession | None = None
        self.teacher: Handshake | None = None  # of the newest epoch
        self.replica: int | None = None  # the teacher replica that serves this rank, once one has connected
        self.called = ""  # the name of the teacher, where there are several
        self.lost_at = time.monotonic()
        self.lost_because = "none has come yet"
        self.failure: LinkError | None = None
        self.requested = 0  # micro-batches that `request` was called for
        self.taken = 0  # of these, responses that the training thread has taken
        # A loader thread may call `request` while the training thread takes responses.
        self._requesting = threading.Lock()
        # Requests that a teacher may still need: tokens, boundaries, context.
        self._unsettled: dict[int, tuple[Tensor, Tensor, Context]] = {}
        self._sent = 0  # requests below this number have gone to the teacher of `_sent_epoch`
        self._sent_epoch = 0
        self._joined = 0  # the newest epoch whose senders may connect
        self._over = 0  # the newest epoch that was lost
        # No other teacher is admitted before this time: one has been welcomed and may not have read the reply yet.
        self._admitting = 0.0
        self._parting = False
        self._bytes = 0  # received in epochs that have ended
        self._peers = PeerChannel(
            handshake, place, settings.timeout, changed, self._start, self._from_peer, self.fail
        )
        self._threads: list[threading.Thread] = []
        self._listener = Listener(sock, settings.shared_secret(), self._answer)
        self.address = self._listener.address

    @property
    def linked(self) -> bool:
        """Whether a teacher is connected by all of its connections."""
        session = self.session
        if session is None or not session.connected:
            return False
        return session.ready or not self._place.is_request_leader

    @property
    def bytes_received(self) -> int:
        with self._changed:
            session = self.session
            return self._bytes + (sum(c.received for c in session.connections) if session else 0)

    def join_leader(self, connection: Connection, leader: Place) -> None:
        """The connection to the request leader, on every other rank."""
        self._peers.join(leader, connection)

    def request(self, tokens: Tensor, boundaries: Tensor, context: Context) -> int:
        """Sends a request, int32 on the CPU, as soon as the credits allow it. Returns its number."""
        with self._requesting:
            number = self.requested
            self._unsettled[number] = (tokens, boundaries, context)
            self.requested += 1
        self.send_requests()
        return number

    def send_requests(self, taken: int = 0) -> None:
        """Sends the requests that the credits allow: those that are not yet complete on every rank and taken here.

        taken: responses that the training thread has taken since the last call.
        """
        who = f"the first rank of teacher replica {self.replica}"
        with self._requesting:
            self.taken += taken
            session = self.session
            # Responses below this number are complete on every rank.
            settled = min([self._reassembly.complete, *self._peers.progress.values()])
            for number in [n for n in self._unsettled if n < settled]:
                del self._unsettled[number]
            if session is None or not session.ready:
                return
            if session.epoch != self._sent_epoch:
                self._sent_epoch, self._sent = session.epoch, settled
            try:
                while (
                    self._sent < self.requested
                    and self._sent - min(self.taken, settled) < self._handshake.credits
                ):
                    self._send_request(session, self._sent)
                    self._sent += 1
                return
            except ConnectionError:
                reason = f"{who} closed its connection"
            except TimeoutError as error:
                reason = f"{who} {error}"
        self.lose(session.epoch, reason)

    def _send_request(self, session: StudentSession, number: int) -> None:
        tokens, boundaries, context = self._unsettled[number]
        batch, sequence = tokens.shape
        self._reassembly.expect(number, (sequence, batch))
        header = Header(
            Kind.REQUEST,
            number=number,
            sequence=sequence,
            batch=batch,
            boundaries=len(boundaries),
            context=len(context.tokens),
        )
        with span("request", number):
            session.requests.send(header, tokens, boundaries, *context, seconds=self._settings.timeout)

    def lose(self, epoch: int, reason: str, told_by: Place | None = None) -> None:
        """Ends an epoch, here and on the other ranks of this data-parallel rank. Only the first reason counts."""
        with self._changed:
            if epoch <= self._over or self._parting:
                return
            self._over = epoch
            session = self.session
            if session is not None and session.epoch <= epoch:
                self._bytes += sum(connection.received for connection in session.connections)
                self.session = None
                self.lost_at, self.lost_because = time.monotonic(), reason
                session.end()
            self._changed.notify_all()
        level = logging.WARNING if self._place.is_request_leader else logging.DEBUG
        _log.log(level, "%s is lost to %s: %s", self.served_by, self._place, reason)
        self._peers.tell(_with_text(Kind.LOST, epoch, reason), reason, but=told_by)

    @property
    def served_by(self) -> str:
        """The teacher replica that serves this rank, in words."""
        return (
            f"replica {self.replica} of teacher {self.called}"
            if self.called
            else f"teacher replica {self.replica}"
        )

    def give_up(self, reason: str, told_by: Place | None = None) -> None:
        """Stops waiting for a teacher, here and on the other ranks: TeacherLost with this reason on all of them."""
        with self._changed:
            if self.failure or self._parting:
                return
            self.failure = TeacherLost(reason)
            self._changed.notify_all()
        self._peers.tell(_with_text(Kind.GIVE_UP, 0, reason), reason, but=told_by)

    def fail(self, error: LinkError) -> None:
        """Notes an error that no other teacher can fix. The first error stays."""
        with self._changed:
            if not self._parting:
                self.failure = self.failure or error
                self._changed.notify_all()

    def part(self, seconds: float) -> None:
        """Says goodbye to the teacher and the other ranks, receives what is under way, and closes everything."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._parting = True
            session = self.session
            connections = [*(session.connections if session else []), *self._peers.connections]
        for connection in connections:
            try:
                connection.send(Header(Kind.GOODBYE), seconds=max(0.01, deadline - time.monotonic()))
            except (ConnectionError, TimeoutError):
                pass  # the other end is gone already
        self._join(deadline)
        self.end()

    def end(self) -> None:
        """Ends everything without a goodbye, and waits at most a second for the threads."""
        self.drop()
        self._join(time.monotonic() + 1.0)
        self._unsettled.clear()

    def drop(self) -> None:
        """Ends everything at once, in any thread. Waits only for greetings that are under way."""
        with self._changed:
            self._parting = True
            session = self.session
            self.failure = self.failure or LinkError("the link is closed")
            self._changed.notify_all()
        self._listener.close()
        for connection in [*(session.connections if session else []), *self._peers.connections]:
            connection.end()

    # Answers to the hellos at the listener, each in a thread of its own.

    def _answer(self, hello: dict) -> tuple[dict, Keep | None]:
        try:
            if hello.get("run") != self._settings.name:
                return _refused(f"{self._place} belongs to run {self._settings.name!r}"), None
            answers = {
                "peer": self._admit_peer,
                "requests": self._admit_teacher,
                "sender": self._admit_sender,
            }
            with self._changed:
                if self._parting:
                    return _OVER, None
                return answers[hello["role"]](hello)
        except HandshakeRefused as error:
            _log.warning("%s refuses a %s: %s", self._place, hello.get("role"), error)
            return _refused(str(error)), None
        except UNREADABLE as error:
            return _refused(f"a greeting cannot be read ({error!r:.200})"), None

    def _admit_peer(self, hello: dict) -> tuple[dict, Keep | None]:
        place = Place(*(int(rank) for rank in hello["place"]))
        if not (self._place.is_request_leader and self._peers.expects(place)):
            return _refused(f"{place} is not expected at {self._place}"), None
        return {"state": "welcome"}, partial(self._peers.join, place)

    def _admit_teacher(self, hello: dict) -> tuple[dict, Keep | None]:
        teacher, epoch = self._stated(hello)
        if not self._place.is_request_leader:
            return _refused(f"{self._place} is not a request leader"), None
        now = time.monotonic()
        if self.session is not None or not self._peers.all_here or now < self._admitting:
            return _BUSY, None
        if epoch <= self._over:
            return _OVER, None
        self._admitting = now + GREETING_SECONDS
        return {"state": "welcome"}, partial(
            self._keep_request_receiver, epoch, teacher, int(hello["replica"])
        )

    def _keep_request_receiver(
        self, epoch: int, teacher: Handshake, replica: int, connection: Connection
    ) -> None:
        with self._changed:
            self._admitting = 0.0
            if self.session is not None or epoch <= self._over or self._parting:
                connection.close()
                return
            self._joined = epoch
            session = self._begin(epoch, teacher, replica)
            session.requests = connection
        self._peers.tell(Header(Kind.JOIN, epoch))
        take = partial(self._from_request_receiver, session)
        who = f"the first rank of teacher replica {replica}"
        self._start(partial(self._read_teacher, session, take, who), Receiver(connection, self._endpoint))

    def _admit_sender(self, hello: dict) -> tuple[dict, Keep | None]:
        teacher, epoch = self._stated(hello)
        sender, digest = int(hello["sender"]), str(hello.get("digest"))
        if epoch > self._joined:
            return _BUSY, None  # the request leader has not told this rank yet
        if epoch < self._joined or epoch <= self._over:
            return _OVER, None
        session = self.session or self._begin(epoch, teacher, int(hello["replica"]))
        if session.teacher != teacher or sender not in session.expected or sender in session.senders:
            return _refused(f"sender {sender} is not expected at {self._place}"), None
        piece = session.head_pieces.get(sender)
        lacks_head = piece is not None and not self.head.has(piece, digest)
        reply = {"state": "welcome", "first": self._reassembly.complete, "head": lacks_head}
        return reply, partial(self._keep_sender, session, sender, digest)

    def _keep_sender(self, session: StudentSession, sender: int, digest: str, connection: Connection) -> None:
        with self._changed:
            if self.session is not session or sender in session.senders or self._parting:
                connection.close()
                return
            session.senders[sender] = connection
            self._changed.notify_all()
        who = f"tensor rank {sender} of teacher replica {self.replica}"
        receiver = Receiver(connection, self._endpoint)
        take = partial(self._from_sender, session, sender, digest, receiver)
        self._start(partial(self._read_teacher, session, take, who), receiver)

    def _stated(self, hello: dict) -> tuple[Handshake, int]:
        teacher = stated.read(hello["handshake"], "teacher")
        if reason := stated.refusal(self._handshake, teacher, teacher.copies):
            raise HandshakeRefused(reason)
        if self.teacher is not None and self.teacher.head != teacher.head:
            raise HandshakeRefused(
                f"the link is refused: the teacher came back with {teacher.head}, before it had {self.teacher.head}"
            )
        replica = stated.served_by(self._handshake, teacher.copies, self._place.data)
        if int(hello["replica"]) != replica or self.replica not in (None, replica):
            raise HandshakeRefused(f"{self._place} is not served by teacher replica {hello['replica']}")
        epoch = int(hello["epoch"])
        if not 0 < epoch < LARGEST_FIELD:
            raise ValueError(f"there is no epoch {epoch}")
        return teacher, epoch

    def _begin(self, epoch: int, teacher: Handshake, replica: int) -> StudentSession:
        self.replica = replica
        self.teacher = teacher
        self.session = session = StudentSession(epoch, self._handshake, teacher, self._place)
        self.head.begin(session)
        self._reassembly.begin(epoch, session.pieces)
        self._changed.notify_all()
        return session

    # Readers, one thread for each connection.

    def _start(self, read: Callable[[Any], None], end: Connection | Receiver) -> None:
        def run() -> None:
            try:
                read(end)
            finally:
                end.close()

        thread = threading.Thread(target=run, name="vcrd-link-reader", daemon=True)
        # Started under the lock: another thread that finds it in the list may join it, and only a started thread can
        # be joined.
        with self._changed:
            self._threads = [other for other in self._threads if other.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _join(self, deadline: float) -> None:
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _read_teacher(
        self, session: StudentSession, take: Callable[..., None], who: str, receiver: Receiver
    ) -> None:
        connection = receiver.connection
        try:
            while (header := connection.receive_header(receiver.check)).kind != Kind.GOODBYE:
                take(header)
            self.lose(session.epoch, f"{who} said goodbye unasked")  # without effect while this end closes
        except ConnectionError as error:
            how = "closed its connection" if connection.is_over else f"cannot be received from: {error}"
            _log.debug("%s: %s", who, error)
            self.lose(session.epoch, f"{who} {how}")
        except TransportRefused as error:
            self.give_up(f"the link is refused: {error}")
        except LinkError as error:
            self.lose(session.epoch, f"{who} sent what is refused: {error}")
        except Exception as error:  # the waiting thread must get every error
            _log.exception("a reader of the link failed")
            self.lose(session.epoch, f"a reader of the link failed: {error!r}")

    def _from_request_receiver(self, session: StudentSession, header: Header) -> None:
        if header.kind != Kind.READY:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
        with self._changed:
            session.ready = True
            self._changed.notify_all()
        self.send_requests()

    def _from_sender(
        self, session: StudentSession, sender: int, digest: str, receiver: Receiver, header: Header
    ) -> None:
        if header.kind == Kind.TRANSPORT:
            receiver.switch(header)
            reason = receiver.reason and (self._endpoint.missing or receiver.reason)
            if reason and self._place.is_request_leader and self._endpoint.is_news(reason):
                _log.warning("tensors travel over TCP: %s", reason)
            return
        if header.kind == Kind.HEAD and sender in session.head_pieces:
            piece = session.head_pieces[sender]
            with self._reassembly.arriving():
                self.head.receive(piece, header, digest, session, receiver.connection)
            with self._changed:
                self.head.arrived(piece, digest, session)
                self._changed.notify_all()
            return
        if header.kind != Kind.RESPONSE or receiver.transport is None:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
        if self._reassembly.receive_piece(session.epoch, sender, header, session.payload, receiver.transport):
            if self._place.is_request_leader:
                self.send_requests()
            else:
                self._peers.tell(Header(Kind.PROGRESS, self._reassembly.complete))

    def _from_peer(self, place: Place, header: Header, text: str) -> None:
        if header.kind == Kind.LOST:
            self.lose(header.number, text, told_by=place)
        elif header.kind == Kind.GIVE_UP:
            self.give_up(text, told_by=place)
        elif header.kind == Kind.PROGRESS and self._place.is_request_leader:
            self.send_requests()
        elif header.kind == Kind.JOIN and not self._place.is_request_leader:
            # LOST of the epoch before may arrive later, and the messages of two epochs in either order.
            self.lose(header.number - 1, f"epoch {header.number} began", told_by=place)
            with self._changed:
                self._joined = max(self._joined, header.number)
                self.lost_at = time.monotonic()  # a teacher has connected: the time limit starts again
        else:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")


def _with_text(kind: Kind, number: int, text: str) -> Header:
    return Header(kind, number, length=min(len(text.encode()), LONGEST_TEXT))


def _refused(reason: str) -> dict:
    return {"state": "refused", "reason": reason}
