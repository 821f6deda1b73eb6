"""One epoch of a teacher replica: how its ranks connect to the student ranks, and the open connections."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from vcrd.settings import LinkSettings

from . import handshake as stated
from .connection import Address, Connection, Header, Kind, dial, digest_of
from .errors import HandshakeRefused, LinkError, StudentLost
from .handshake import Handshake
from .plan import Piece, Place, overlaps, pieces_of
from .rendezvous import ask_until
from .replica_group import Outcome, ReplicaGroup, outcome_of
from .requests import Request, RequestReceiver
from .respond import ResponseSender
from .transport.opening import Endpoint

_log = logging.getLogger("vcrd")
_DIAL = 30.0  # seconds for a student rank to admit a sender, once the request leader has admitted the replica
_PAUSE, _LONGEST_PAUSE = 0.02, 0.25  # seconds between two attempts: first, and at most
_INSISTING = ("nccl",)  # settings of `transport` that allow no other transport


class TeacherSession:
    """The connections of this rank in one epoch. requests: on rank 0. responses: on ranks of the last stage.

    pieces: what this rank sends of each response, with the receivers. head_pieces: what it sends of the output layer.
    """

    def __init__(
        self, student: Handshake, teacher: Handshake, places: tuple[Place, ...], tensor_rank: int | None
    ) -> None:
        self.student = student
        self.places = places
        self.pieces: list[tuple[Place, Piece]] = []
        self.head_pieces: dict[Place, Piece] = {}
        self.requests: RequestReceiver | None = None
        self.responses: ResponseSender | None = None
        self._lack_head: set[Place] = set()
        self._teacher = teacher
        if tensor_rank is None:
            return
        shards, whole = (teacher.shards(), student.shards()), teacher.content().whole
        self._first_column = shards[0][tensor_rank].start
        for place in places:
            mine = [p for p in pieces_of(place, *shards, whole) if p.sender == tensor_rank]
            self.pieces += [(place, piece) for piece in mine]
            if teacher.head is not None:
                for piece in overlaps(*shards):
                    if (piece.sender, piece.receiver) == (tensor_rank, place.tensor):
                        self.head_pieces[place] = piece

    @property
    def receivers(self) -> list[Place]:
        """The student ranks to which this rank sends."""
        wanted = {place for place, _ in self.pieces} | self.head_pieces.keys()
        return [place for place in self.places if place in wanted]

    @property
    def failure(self) -> LinkError | None:
        if self.requests and self.requests.failure:
            return self.requests.failure
        return self.responses.failure if self.responses else None

    def take(self, limit: int, seconds: float) -> tuple[list[Request], bool]:
        """On rank 0: the next requests, and whether every data-parallel rank has left."""
        requests = self.requests.take(limit, seconds)
        return requests, not requests and self.requests.all_left

    def admit(
        self,
        connections: dict[Place, Connection],
        replies: dict[Place, dict],
        timeout: float,
        endpoint: Endpoint,
    ) -> None:
        """Takes over the connections that the student ranks have admitted, with their replies."""
        firsts = {place: reply["first"] for place, reply in replies.items()}
        self._lack_head = {place for place, reply in replies.items() if reply["head"]}
        self.responses = ResponseSender(connections, firsts, timeout, endpoint)

    def send_head(self, weight: Tensor) -> None:
        """Sends the rows of the output layer [columns, size] that this rank has to the student ranks that lack them."""
        for place in self._lack_head:
            piece = self.head_pieces[place]
            header = Header(Kind.HEAD, self._teacher.head.size, start=piece.start, stop=piece.stop)
            self.responses.send_head(place, header, self.rows_of(weight, piece))

    def rows_of(self, weight: Tensor, piece: Piece) -> Tensor:
        return weight[piece.start - self._first_column : piece.stop - self._first_column]

    def finish(self, seconds: float) -> None:
        """Waits, at most that long, until the student ranks have said goodbye; then closes."""
        if self.responses:
            self.responses.finish(0.0 if self.failure else seconds)
        if self.requests:
            self.requests.end(seconds)

    def end(self) -> None:
        """Closes everything at once."""
        if self.requests:
            self.requests.end(1.0)
        if self.responses:
            self.responses.end(1.0)


def join(
    settings: LinkSettings,
    handshake: Handshake,
    replica_group: ReplicaGroup,
    endpoint: Endpoint,
    replica: int,
    tensor_rank: int | None,
    head_weight: Tensor | None,
) -> TeacherSession:
    """Collective over `replica_group`: the connections of every rank in a new epoch.

    First rank 0 gets an epoch from the rendezvous and connects to the request leaders. That takes at most
    `connect_timeout` seconds. Then every rank of the last stage connects to its student ranks and makes a transport to
    each of them.
    StudentLost on every rank when the student is not there in time; HandshakeRefused when the jobs do not fit.
    """
    admission = _Admission(settings, handshake, replica)
    while True:
        try:
            found = json.loads(replica_group.follow_leader(admission.run))
        except BaseException:
            admission.give_up()
            raise
        student = stated.read(found["handshake"], "student")
        if replica_group.leads:
            for doubt in found.get("doubts", []):  # the log of the student has it too
                _log.warning("teacher replica %d: %s", replica, doubt)
        session = TeacherSession(student, handshake, student.places(replica, handshake.copies), tensor_rank)
        if replica_group.leads:
            session.requests = RequestReceiver(student, admission.connections)
        hello = {
            "run": settings.name,
            "role": "sender",
            "replica": replica,
            "epoch": found["epoch"],
            "sender": tensor_rank,
            "handshake": handshake.plain(),
        }
        addresses = dict(zip(session.places, map(tuple, found["addresses"]), strict=True))
        outcome, text = Outcome.DONE, ""
        try:
            if tensor_rank is not None:
                _dial_students(settings, session, hello, addresses, head_weight, endpoint)
        except LinkError as error:
            outcome, text = outcome_of(error), str(error)
        except Exception as error:  # the other ranks must get every error
            outcome, text = (
                Outcome.BROKEN,
                f"a rank of this teacher replica cannot dial the student: {error!r}",
            )
        try:
            replica_group.conclude(outcome, text)
            _open_transports(settings, student, handshake, replica_group, session, endpoint)
        except StudentLost as error:  # on every rank: a student rank is gone or waits for another epoch
            session.end()
            admission.reason = str(error)
            continue
        except LinkError:
            session.end()
            raise
        if session.responses:
            session.responses.begin()
        if session.requests:
            session.requests.begin(settings.timeout)
        return session


def _open_transports(
    settings: LinkSettings,
    student: Handshake,
    teacher: Handshake,
    replica_group: ReplicaGroup,
    session: TeacherSession,
    endpoint: Endpoint,
) -> None:
    """Collective over `replica_group`. One kind of transport for all pairs: TCP for all where one pair has failed."""
    name, reason = stated.transport_of(student, teacher, endpoint.missing)
    why = _opened(replica_group, session, name, reason)
    if why and {student.transport, teacher.transport} & {*_INSISTING}:
        reason = f"transport is {name!r}, and {why}"
        if session.responses:
            with suppress(LinkError):  # the student may be gone
                session.responses.refuse(reason)
        replica_group.conclude(Outcome.REFUSED, f"the link is refused: {reason}")
    if why:
        reason = why
        _opened(replica_group, session, "tcp", reason)
    if replica_group.leads and reason and endpoint.is_news(reason):
        _log.warning("tensors travel over TCP: %s", reason)


def _opened(replica_group: ReplicaGroup, session: TeacherSession, name: str, reason: str) -> str:
    """Collective over `replica_group`. Opens the transport of every pair. "", or on every rank the first reason."""
    outcome, text, why = Outcome.DONE, "", ""
    try:
        why = session.responses.open(name, reason) if session.responses else ""
    except LinkError as error:
        outcome, text = outcome_of(error), str(error)
    except Exception as error:  # the other ranks must get every error
        outcome, text = (
            Outcome.BROKEN,
            f"a rank of this teacher replica cannot open its transports: {error!r}",
        )
    replica_group.conclude(outcome, text)
    return replica_group.first_text(why)


class _Admission:
    """How rank 0 gets its replica admitted. connections: to the request leaders, by data-parallel rank."""

    def __init__(self, settings: LinkSettings, handshake: Handshake, replica: int) -> None:
        self._settings = settings
        self._hello = {"replica": replica, "handshake": handshake.plain()}
        self._deadline = time.monotonic() + settings.connect_timeout
        self._pause = _PAUSE
        self.connections: dict[int, Connection] = {}
        self.reason = ""  # why the last epoch failed

    def run(self, tick: Callable[[], None]) -> str:
        """The reply of the rendezvous, as text, once every request leader has admitted its epoch."""
        while True:
            if self.reason:
                if time.monotonic() > self._deadline:
                    raise StudentLost(f"the student could not be joined {self._within()}: {self.reason}")
                self._pause_between(tick)
            reply = self._found(tick)
            student = stated.read(reply["handshake"], "student")
            places = student.places(self._hello["replica"], self._hello["handshake"]["copies"])
            leaders = [
                (p, tuple(a)) for p, a in zip(places, reply["addresses"], strict=True) if p.is_request_leader
            ]
            self.connections = {}
            try:
                for place, address in leaders:
                    self._connect(place, address, int(reply["epoch"]), tick)
            except ConnectionError as error:  # this epoch cannot be completed: start again
                self.give_up()
                self.reason = str(error)
                continue
            return json.dumps(reply)

    def give_up(self) -> None:
        for connection in self.connections.values():
            connection.close()

    def _pause_between(self, tick: Callable[[], None]) -> None:
        tick()
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _found(self, tick: Callable[[], None]) -> dict:
        left = max(0.0, self._deadline - time.monotonic())
        hello = {"role": "teacher", **self._hello}
        reply, answered = ask_until(self._settings, hello, lambda r: r["state"] == "ready", left, tick)
        if reply is None and not answered:
            raise StudentLost(
                f"nobody answered {self._within()}: rank 0 of the student's world hosts the rendezvous"
            )
        if reply is None:
            raise StudentLost(f"the student's ranks did not all come {self._within()}")
        return reply

    def _connect(self, place: Place, address: Address, epoch: int, tick: Callable[[], None]) -> None:
        hello = {"run": self._settings.name, "role": "requests", "epoch": epoch, **self._hello}
        while True:
            connection, reply = dial(address, self._settings.shared_secret(), hello)
            if reply.get("state") == "welcome":
                self.connections[place.data] = connection
                return
            connection.close()
            if reply.get("state") == "refused":
                raise HandshakeRefused(str(reply.get("reason")))
            if reply.get("state") != "busy":
                raise ConnectionError(f"{place} waits for a later epoch")
            if time.monotonic() > self._deadline:
                raise StudentLost(f"{place} still has a teacher replica {hello['replica']} {self._within()}")
            self._pause_between(tick)

    def _within(self) -> str:
        seconds = self._settings.connect_timeout
        return f"at {self._settings.rendezvous} within {seconds:g} seconds (connect_timeout)"


def _dial_students(
    settings: LinkSettings,
    session: TeacherSession,
    hello: dict,
    addresses: dict[Place, Address],
    head_weight: Tensor | None,
    endpoint: Endpoint,
) -> None:
    connections: dict[Place, Connection] = {}
    replies: dict[Place, dict] = {}
    digests: dict[Piece, str] = {}
    secret = settings.shared_secret()
    try:
        for place in session.receivers:
            piece = session.head_pieces.get(place)
            if piece is not None and piece not in digests:
                digests[piece] = digest_of(session.rows_of(head_weight, piece))
            own = {**hello, "digest": digests.get(piece)}
            connections[place], replies[place] = _admitted(place, addresses[place], secret, own)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    session.admit(connections, replies, settings.timeout, endpoint)


def _admitted(place: Place, address: Address, secret: str, hello: dict) -> tuple[Connection, dict]:
    deadline = time.monotonic() + _DIAL
    while True:
        try:
            connection, reply = dial(address, secret, hello)
        except ConnectionError as error:
            raise StudentLost(f"{place} cannot be reached: {error}") from None
        first = reply.get("first")
        if (
            reply.get("state") == "welcome"
            and type(first) is int
            and 0 <= first < 1 << 48
            and "head" in reply
        ):
            return connection, reply
        connection.close()
        if reply.get("state") == "refused":
            raise HandshakeRefused(str(reply.get("reason")))
        if reply.get("state") != "busy" or time.monotonic() > deadline:
            raise StudentLost(f"{place} does not wait for epoch {hello['epoch']}")
        time.sleep(_PAUSE)
