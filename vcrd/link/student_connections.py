"""Which teacher serves a student rank now: who may join, what happens when it is lost, who has to hear of it.

The ranks of one data rank's last stage stand together. The first of them asks the teacher, and decides: it admits one
teacher epoch at a time, tells the others (its peers) when senders of an epoch may connect and when an epoch is over,
and hears from them how far they got. So all of them see one teacher, and what a lost one left unfinished on any of them
is asked for again.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from vcrd.settings import LinkSettings

from . import handshake as stated
from . import header as headers
from .connection import Connection
from .errors import HandshakeRefused, LinkError, TeacherLost
from .handshake import Handshake
from .header import Header, Kind
from .peer_channel import PeerChannel
from .plan import Place
from .reassembly import Reassembly
from .rendezvous import UNREADABLE
from .student_session import Head, StudentSession
from .transport import Endpoint, Receiver, TransportRefused
from .wire import GREETING_SECONDS, Listener

_log = logging.getLogger("vcrd")
Keep = Callable[[Connection], None]
_BUSY = {"state": "busy"}  # a teacher serves, or something else has to come first: ask again
_OVER = {"state": "over"}  # this epoch has no future; another one may


class StudentConnections:
    """The connections of one student rank.

    changed: guards everything here and in `reassembly`; notified of every change. on_advance: called, without the lock,
    when requests may have become possible: the teacher is ready, or a peer got on.
    """

    def __init__(
        self,
        settings: LinkSettings,
        handshake: Handshake,
        place: Place,
        sock: socket.socket,
        reassembly: Reassembly,
        changed: threading.Condition,
        on_advance: Callable[[], None],
        endpoint: Endpoint,
    ) -> None:
        self._settings = settings
        self._handshake = handshake
        self._place = place
        self._reassembly = reassembly
        self._changed = changed
        self._on_advance = on_advance
        self._endpoint = endpoint
        self.head = Head(handshake.shards()[place.tensor])
        self.session: StudentSession | None = None
        self.teacher_head: stated.Head | None = None
        self.replica: int | None = None  # which teacher replica serves this rank, once one has come
        self.lost_at = time.monotonic()
        self.lost_because = "none has come yet"
        self.failure: LinkError | None = None
        self._joined = 0  # the newest epoch whose senders may connect
        self._over = 0  # the newest epoch that was lost
        self._admitting = 0.0  # until then nobody else is let in: one that is welcome has not heard it yet
        self._parting = False
        self._bytes = 0  # received in epochs that are over
        self._peers = PeerChannel(
            handshake, place, settings.timeout, changed, self._start, self._from_sibling, self.fail
        )
        self._threads: list[threading.Thread] = []
        self._listener = Listener(sock, settings.shared_secret(), self._answer)
        self.address = self._listener.address

    @property
    def linked(self) -> bool:
        """Whether a teacher is there and every connection to it stands."""
        session = self.session
        if session is None or not session.connected:
            return False
        return session.ready or not self._place.asks

    @property
    def head_is_here(self) -> bool:
        """Whether the teacher's output layer has arrived as a whole, or the payload needs none."""
        return self.head.complete

    @property
    def settled(self) -> int:
        """Responses below this number are complete on every rank; on the rank that asks."""
        return min([self._reassembly.complete, *self._peers.settled])

    @property
    def bytes_received(self) -> int:
        with self._changed:
            session = self.session
            return self._bytes + (sum(c.received for c in session.connections) if session else 0)

    def join_asker(self, connection: Connection, asker: Place) -> None:
        """The connection to the rank that asks, on every other rank."""
        self._peers.join(asker, connection)

    def lose(self, epoch: int, reason: str, told_by: Place | None = None) -> None:
        """Ends an epoch, here and on the peers. Only the first reason counts."""
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
        level = logging.WARNING if self._place.asks else logging.DEBUG
        _log.log(level, "teacher replica %s is lost to %s: %s", self.replica, self._place, reason)
        self._peers.tell(_with_text(Kind.LOST, epoch, reason), reason, but=told_by)

    def give_up(self, reason: str, told_by: Place | None = None) -> None:
        """No teacher is waited for any more, here and on the peers: TeacherLost with this reason on all of them."""
        with self._changed:
            if self.failure or self._parting:
                return
            self.failure = TeacherLost(reason)
            self._changed.notify_all()
        self._peers.tell(_with_text(Kind.GIVE_UP, 0, reason), reason, but=told_by)

    def fail(self, error: LinkError) -> None:
        """What no teacher can fix; the first error stays."""
        with self._changed:
            if not self._parting:
                self.failure = self.failure or error
                self._changed.notify_all()

    def part(self, seconds: float) -> None:
        """Says goodbye to teacher and peers, lets what is under way end, closes everything. Bounded."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._parting = True
            session = self.session
            connections = [*(session.connections if session else []), *self._peers.connections]
        for connection in connections:
            try:
                connection.send(Header(Kind.GOODBYE), seconds=max(0.01, deadline - time.monotonic()))
            except (ConnectionError, TimeoutError):
                pass  # it is gone already
        self._join(deadline)
        self.end()

    def end(self) -> None:
        """Ends everything, without a goodbye, and waits a second for the threads."""
        self.drop()
        self._join(time.monotonic() + 1.0)

    def drop(self) -> None:
        """Ends everything at once, from whatever thread. Waits for what is in the middle of a greeting only."""
        with self._changed:
            self._parting = True
            session = self.session
            self.failure = self.failure or LinkError("the link is closed")
            self._changed.notify_all()
        self._listener.close()
        for connection in [*(session.connections if session else []), *self._peers.connections]:
            connection.end()

    # What the listener is asked, each in a thread of its own.

    def _answer(self, hello: dict) -> tuple[dict, Keep | None]:
        try:
            if hello.get("run") != self._settings.name:
                return _refused(f"{self._place} belongs to run {self._settings.name!r}"), None
            answers = {"sibling": self._sibling, "requests": self._requests, "sender": self._sender}
            with self._changed:
                if self._parting:
                    return _OVER, None
                return answers[hello["role"]](hello)
        except HandshakeRefused as error:
            _log.warning("%s refuses a %s: %s", self._place, hello.get("role"), error)
            return _refused(str(error)), None
        except UNREADABLE as error:
            return _refused(f"a greeting cannot be read ({error!r:.200})"), None

    def _sibling(self, hello: dict) -> tuple[dict, Keep | None]:
        place = Place(*(int(rank) for rank in hello["place"]))
        if not (self._place.asks and self._peers.expects(place)):
            return _refused(f"{place} is not expected at {self._place}"), None
        return {"state": "welcome"}, partial(self._peers.join, place)

    def _requests(self, hello: dict) -> tuple[dict, Keep | None]:
        teacher, epoch = self._stated(hello)
        if not self._place.asks:
            return _refused(f"{self._place} does not ask"), None
        now = time.monotonic()
        if self.session is not None or not self._peers.all_here or now < self._admitting:
            return _BUSY, None
        if epoch <= self._over:
            return _OVER, None
        self._admitting = now + GREETING_SECONDS
        return {"state": "welcome"}, partial(self._keep_intake, epoch, teacher, int(hello["replica"]))

    def _keep_intake(self, epoch: int, teacher: Handshake, replica: int, connection: Connection) -> None:
        with self._changed:
            self._admitting = 0.0
            if self.session is not None or epoch <= self._over or self._parting:
                connection.close()
                return
            self._joined = epoch
            session = self._begin(epoch, teacher, replica)
            session.requests = connection
        self._peers.tell(Header(Kind.JOIN, epoch))
        take = partial(self._from_intake, session)
        who = f"the first rank of teacher replica {replica}"
        self._start(partial(self._read_teacher, session, take, who), Receiver(connection, self._endpoint))

    def _sender(self, hello: dict) -> tuple[dict, Keep | None]:
        teacher, epoch = self._stated(hello)
        sender, digest = int(hello["sender"]), str(hello.get("digest"))
        if epoch > self._joined:
            return _BUSY, None  # the rank that asks has not told this one yet
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
        if self.teacher_head not in (None, teacher.head):
            raise HandshakeRefused(
                f"the link is refused: the teacher came back with {teacher.head}, before it had {self.teacher_head}"
            )
        replica = stated.served_by(self._handshake, teacher.copies, self._place.data)
        if int(hello["replica"]) != replica or self.replica not in (None, replica):
            raise HandshakeRefused(f"{self._place} is not served by teacher replica {hello['replica']}")
        epoch = int(hello["epoch"])
        if not 0 < epoch < headers.LARGEST:
            raise ValueError(f"there is no epoch {epoch}")
        return teacher, epoch

    def _begin(self, epoch: int, teacher: Handshake, replica: int) -> StudentSession:
        self.replica = replica
        self.teacher_head = teacher.head
        self.session = session = StudentSession(epoch, self._handshake, teacher, self._place)
        self.head.begin(session)
        self._reassembly.begin(epoch, session.pieces)
        self._changed.notify_all()
        return session

    # What arrives, each connection in a thread of its own.

    def _start(self, read: Callable[[Any], None], end: Connection | Receiver) -> None:
        def run() -> None:
            try:
                read(end)
            finally:
                end.close()

        thread = threading.Thread(target=run, name="vcrd-link-reader", daemon=True)
        # Started in here: whoever finds it in the list may join it, which a thread that never began does not allow.
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
            self.lose(session.epoch, f"{who} said goodbye unasked")  # nothing is lost when this side parts
        except ConnectionError as error:
            how = "closed its connection" if connection.is_over else f"cannot be received from: {error}"
            _log.debug("%s: %s", who, error)
            self.lose(session.epoch, f"{who} {how}")
        except TransportRefused as error:
            self.give_up(f"the link is refused: {error}")
        except LinkError as error:
            self.lose(session.epoch, f"{who} sent what is refused: {error}")
        except Exception as error:  # whatever it is, the waiting side must hear of it
            _log.exception("a reader of the link failed")
            self.lose(session.epoch, f"a reader of the link failed: {error!r}")

    def _from_intake(self, session: StudentSession, header: Header) -> None:
        if header.kind != Kind.READY:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
        with self._changed:
            session.ready = True
            self._changed.notify_all()
        self._on_advance()

    def _from_sender(
        self, session: StudentSession, sender: int, digest: str, receiver: Receiver, header: Header
    ) -> None:
        if header.kind == Kind.TRANSPORT:
            receiver.switch(header)
            reason = receiver.reason and (self._endpoint.missing or receiver.reason)
            if reason and self._place.asks and self._endpoint.is_news(reason):
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
        if self._reassembly.place(session.epoch, sender, header, session.payload, receiver.transport):
            if self._place.asks:
                self._on_advance()
            else:
                self._peers.tell(Header(Kind.PROGRESS, self._reassembly.complete))

    def _from_sibling(self, place: Place, header: Header, text: str) -> None:
        if header.kind == Kind.LOST:
            self.lose(header.number, text, told_by=place)
        elif header.kind == Kind.GIVE_UP:
            self.give_up(text, told_by=place)
        elif header.kind == Kind.PROGRESS and self._place.asks:
            self._on_advance()
        elif header.kind == Kind.JOIN and not self._place.asks:
            # The news that the epoch before is over may come later, and the news of two epochs in either order.
            self.lose(header.number - 1, f"epoch {header.number} began", told_by=place)
            with self._changed:
                self._joined = max(self._joined, header.number)
                self.lost_at = time.monotonic()  # a teacher has come: it is waited for anew
        else:
            raise LinkError(f"a {header.kind.name.lower()} from there is not expected")


def _with_text(kind: Kind, number: int, text: str) -> Header:
    return Header(kind, number, length=min(len(text.encode()), headers.LONGEST_TEXT))


def _refused(reason: str) -> dict:
    return {"state": "refused", "reason": reason}
