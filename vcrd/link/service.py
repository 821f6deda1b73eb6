"""One epoch of a teacher replica: how its ranks join the students, and the connections that stand then."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from . import facts as stated
from .connection import Connection, digest_of
from .crew import Crew, Outcome, outcome_of
from .delivery import Delivery
from .errors import HandshakeRefused, LinkError, StudentLost
from .facts import Facts
from .header import Header, Kind
from .intake import Intake, Request
from .plan import Piece, Place, overlaps, pieces_of
from .rendezvous import ask_until
from .settings import LinkSettings
from .transport import Endpoint
from .wire import Address, dial

_log = logging.getLogger("vcrd")
_DIAL = (
    30.0  # seconds for a student rank to let a sender in, once the rank that asks has let the first one in
)
_PAUSE = 0.02  # seconds between two attempts at first; it doubles up to
_LONGEST_PAUSE = 0.25
_INSISTING = ("nccl",)  # the settings of `transport` that allow no other one


class Service:
    """This rank's connections of one epoch. intake: on rank 0. delivery: on ranks of the last stage.

    pieces: what this rank sends of each response, with its receivers. head_pieces: its rows of the output layer.
    """

    def __init__(
        self, student: Facts, teacher: Facts, places: tuple[Place, ...], tensor_rank: int | None
    ) -> None:
        self.student = student
        self.places = places
        self.pieces: list[tuple[Place, Piece]] = []
        self.head_pieces: dict[Place, Piece] = {}
        self.intake: Intake | None = None
        self.delivery: Delivery | None = None
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
        """The student ranks that this rank sends to."""
        wanted = {place for place, _ in self.pieces} | self.head_pieces.keys()
        return [place for place in self.places if place in wanted]

    @property
    def failure(self) -> LinkError | None:
        if self.intake and self.intake.failure:
            return self.intake.failure
        return self.delivery.failure if self.delivery else None

    def take(self, limit: int, seconds: float) -> tuple[list[Request], bool]:
        """On rank 0: the next requests, and whether every student has left."""
        requests = self.intake.take(limit, seconds)
        return requests, not requests and self.intake.all_left

    def admit(
        self,
        connections: dict[Place, Connection],
        replies: dict[Place, dict],
        timeout: float,
        endpoint: Endpoint,
    ) -> None:
        """Takes over what the students have let in."""
        firsts = {place: reply["first"] for place, reply in replies.items()}
        self._lack_head = {place for place, reply in replies.items() if reply["head"]}
        self.delivery = Delivery(connections, firsts, timeout, endpoint)

    def send_head(self, weight: Tensor) -> None:
        """This rank's rows of the output layer [columns, size], to those who lack them."""
        for place in self._lack_head:
            piece = self.head_pieces[place]
            header = Header(Kind.HEAD, self._teacher.head.size, start=piece.start, stop=piece.stop)
            self.delivery.send_head(place, header, self.rows_of(weight, piece))

    def rows_of(self, weight: Tensor, piece: Piece) -> Tensor:
        return weight[piece.start - self._first_column : piece.stop - self._first_column]

    def finish(self, seconds: float) -> None:
        """Waits, at most that long, until the students have parted; then closes."""
        if self.delivery:
            self.delivery.finish(0.0 if self.failure else seconds)
        if self.intake:
            self.intake.end(seconds)

    def end(self) -> None:
        """Closes everything at once."""
        if self.intake:
            self.intake.end(1.0)
        if self.delivery:
            self.delivery.end(1.0)


def join(
    settings: LinkSettings,
    facts: Facts,
    crew: Crew,
    endpoint: Endpoint,
    replica: int,
    tensor_rank: int | None,
    head_weight: Tensor | None,
    setting: str,
) -> Service:
    """Collective over the crew: every rank's connections of a new epoch.

    Rank 0 first asks the rendezvous for an epoch and lets the ranks that ask admit it, all of which takes at most the
    seconds of `setting`, connect_timeout or rejoin_timeout; then every rank of the last stage dials its students and
    makes a transport to each of them.
    StudentLost, on every rank alike, when they do not come in time; HandshakeRefused when the jobs do not fit.
    """
    knocking = _Knocking(settings, facts, replica, setting)
    while True:
        try:
            found = json.loads(crew.follow_leader(knocking.run))
        except BaseException:
            knocking.give_up()
            raise
        student = stated.read(found["facts"], "student")
        if crew.leads:
            for doubt in found.get("doubts", []):  # the student's log has it too
                _log.warning("teacher replica %d: %s", replica, doubt)
        service = Service(student, facts, student.places(replica, facts.copies), tensor_rank)
        if crew.leads:
            service.intake = Intake(student, knocking.connections)
        hello = {
            "run": settings.name,
            "role": "sender",
            "replica": replica,
            "epoch": found["epoch"],
            "sender": tensor_rank,
            "facts": facts.plain(),
        }
        addresses = dict(zip(service.places, map(tuple, found["addresses"]), strict=True))
        outcome, text = Outcome.DONE, ""
        try:
            if tensor_rank is not None:
                _dial_students(settings, service, hello, addresses, head_weight, endpoint)
        except LinkError as error:
            outcome, text = outcome_of(error), str(error)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            outcome, text = (
                Outcome.BROKEN,
                f"a rank of this teacher replica cannot dial the student: {error!r}",
            )
        try:
            crew.conclude(outcome, text)
            _open_transports(settings, student, facts, crew, service, endpoint)
        except (
            StudentLost
        ) as error:  # on every rank: a student rank that was there has gone, or changed its mind
            service.end()
            knocking.reason = str(error)
            continue
        except LinkError:
            service.end()
            raise
        if service.delivery:
            service.delivery.begin()
        if service.intake:
            service.intake.begin(settings.timeout)
        return service


def _open_transports(
    settings: LinkSettings, student: Facts, teacher: Facts, crew: Crew, service: Service, endpoint: Endpoint
) -> None:
    """Collective over the crew. One transport for all pairs of the replica: TCP for all where it failed for one."""
    name, reason = stated.transport_of(student, teacher, endpoint.missing)
    why = _opened(crew, service, name, reason)
    if why and {student.transport, teacher.transport} & {*_INSISTING}:
        reason = f"transport is {name!r}, and {why}"
        if service.delivery:
            with suppress(LinkError):  # a student that is gone need not hear it, and the other ranks wait
                service.delivery.refuse(reason)
        crew.conclude(Outcome.REFUSED, f"the link is refused: {reason}")
    if why:
        reason = why
        _opened(crew, service, "tcp", reason)
    if crew.leads and reason and endpoint.is_news(reason):
        _log.warning("tensors travel over TCP: %s", reason)


def _opened(crew: Crew, service: Service, name: str, reason: str) -> str:
    """Collective over the crew: "" or, on every rank alike, why it could not be opened for some pair."""
    outcome, text, why = Outcome.DONE, "", ""
    try:
        why = service.delivery.open(name, reason) if service.delivery else ""
    except LinkError as error:
        outcome, text = outcome_of(error), str(error)
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        outcome, text = (
            Outcome.BROKEN,
            f"a rank of this teacher replica cannot open its transports: {error!r}",
        )
    crew.conclude(outcome, text)
    return crew.first_text(why)


class _Knocking:
    """How rank 0 gets a replica admitted; keeps the connections to the ranks that ask, by data rank."""

    def __init__(self, settings: LinkSettings, facts: Facts, replica: int, setting: str) -> None:
        self._settings = settings
        self._hello = {"replica": replica, "facts": facts.plain()}
        self._setting = setting
        self._deadline = time.monotonic() + getattr(settings, setting)
        self._pause = _PAUSE
        self.connections: dict[int, Connection] = {}
        self.reason = ""  # why the last epoch had no future

    def run(self, tick: Callable[[], None]) -> str:
        """The rendezvous' reply, as text, once every rank that asks has admitted its epoch."""
        while True:
            if self.reason:
                if time.monotonic() > self._deadline:
                    raise StudentLost(f"the student could not be joined {self._within()}: {self.reason}")
                self._rest(tick)
            reply = self._found(tick)
            student = stated.read(reply["facts"], "student")
            places = student.places(self._hello["replica"], self._hello["facts"]["copies"])
            askers = [(p, tuple(a)) for p, a in zip(places, reply["addresses"], strict=True) if p.asks]
            self.connections = {}
            try:
                for place, address in askers:
                    self._knock(place, address, int(reply["epoch"]), tick)
            except ConnectionError as error:  # that epoch has no future: begin anew
                self.give_up()
                self.reason = str(error)
                continue
            return json.dumps(reply)

    def give_up(self) -> None:
        for connection in self.connections.values():
            connection.close()

    def _rest(self, tick: Callable[[], None]) -> None:
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

    def _knock(self, place: Place, address: Address, epoch: int, tick: Callable[[], None]) -> None:
        hello = {"run": self._settings.name, "role": "intake", "epoch": epoch, **self._hello}
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
            self._rest(tick)

    def _within(self) -> str:
        seconds = getattr(self._settings, self._setting)
        return f"at {self._settings.address} within {seconds:g} seconds ({self._setting})"


def _dial_students(
    settings: LinkSettings,
    service: Service,
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
        for place in service.receivers:
            piece = service.head_pieces.get(place)
            if piece is not None and piece not in digests:
                digests[piece] = digest_of(service.rows_of(head_weight, piece))
            own = {**hello, "digest": digests.get(piece)}
            connections[place], replies[place] = _let_in(place, addresses[place], secret, own)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    service.admit(connections, replies, settings.timeout, endpoint)


def _let_in(place: Place, address: Address, secret: str, hello: dict) -> tuple[Connection, dict]:
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
