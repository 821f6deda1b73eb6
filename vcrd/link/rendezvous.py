"""How the two jobs meet: the student job hosts an address book, and each side asks it until the other is there.

Every question is one greeted connection (`wire`): a JSON hello, a JSON reply, and it closes. So nobody holds a place
that outlives it, and a process may die in the middle of anything. Roles:

- "student": a rank of the student's last stage registers its handshake and where it listens; it asks again until all
  ranks of its data rank are known, and again while it waits for a teacher, to hear of a refusal.
- "teacher": the first rank of a teacher replica states its handshake. Once the students are complete it gets theirs,
  every address that it has to dial, and an epoch that is larger than any before. Every replica passes here, also one
  that comes back, so its weights are compared here with those of the run's first teacher.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from vcrd.settings import LinkSettings

from . import addresses
from . import handshake as stated
from . import header as headers
from .connection import Connection
from .errors import HandshakeRefused, LinkError
from .handshake import Handshake
from .plan import Place, places, replica_of
from .wire import Address, Listener, dial, versions_differ

_log = logging.getLogger("vcrd")
Reply = dict
UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError)  # what reading the wrong JSON raises
_WAITING = {"state": "waiting"}
_PAUSE, _LONGEST_PAUSE = 0.02, 0.25  # seconds between two questions
_MOST_RUNS = 1024  # that one address book holds


def host_rendezvous(settings: LinkSettings) -> Rendezvous:
    """Opens the rendezvous at `settings.address`, an address of this machine, or writes its file. Never blocks.

    Called on rank 0 of the student's world, which keeps the result and closes it when the run ends. LinkError when the
    address is taken or is not of this machine, or when the file cannot be written.
    """
    return Rendezvous(settings)


class Rendezvous:
    """The address book of every run that meets at one address."""

    def __init__(self, settings: LinkSettings) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        secret = settings.shared_secret()
        self._settings = settings
        self._listener = Listener(_listening(settings), secret, self._answer)
        try:
            addresses.publish(settings.address, self._listener.address)
        except LinkError:
            self._listener.close()
            raise

    def close(self) -> None:
        """Idempotent. Links that stand do not notice; a lost teacher could not come back."""
        addresses.withdraw(self._settings.address, self._listener.address)
        self._listener.close()

    def _answer(self, hello: dict) -> tuple[Reply, None]:
        with self._lock:
            name = hello.get("run")
            if not isinstance(name, str):
                return _refused("the link is refused: a greeting names no run"), None
            if name not in self._runs and len(self._runs) >= _MOST_RUNS:
                return _refused(f"the link is refused: more than {_MOST_RUNS} runs meet here"), None
            run = self._runs.setdefault(name, _Run())
            try:
                if hello.get("role") == "student":
                    return run.student(hello), None
                if hello.get("role") == "teacher":
                    return run.teacher(hello), None
                return _refused("the link is refused: a greeting names no role"), None
            except HandshakeRefused as error:
                return _refused(str(error)), None
            except UNREADABLE as error:
                return _refused(f"the link is refused: a greeting cannot be read ({error!r:.200})"), None


class _Run:
    """What is known of one run."""

    def __init__(self) -> None:
        self._handshake: Handshake | None = None  # the student's
        self._complaint: str | None = None
        self._students: dict[Place, Address] = {}
        self._replicas = 0  # 0 until the first of them has got an epoch
        self._epochs: dict[int, int] = {}
        self._first: Handshake | None = None  # of the first teacher that got an epoch, and stated its weights
        self._said: set[str] = set()  # doubts that were named
        # By replica: how many it said there are, and why it may not join.
        self._refusals: dict[int, tuple[int, str]] = {}

    def student(self, hello: dict) -> Reply:
        place = Place(*(int(rank) for rank in hello["place"]))
        address = (str(hello["address"][0]), int(hello["address"][1]))
        handshake = stated.read(hello["handshake"], "student")
        sizes = (handshake.copies, handshake.context_size, handshake.tensor_size)
        ranks = (place.data, place.context, place.tensor)
        if not all(0 <= rank < size for rank, size in zip(ranks, sizes, strict=True)):
            raise ValueError(f"there is no {place}")
        if self._handshake is None:
            self._handshake = handshake
        if handshake != self._handshake:
            self._complaint = (
                f"the link is refused: {place} states {handshake}, the first rank {self._handshake}"
            )
        if self._students.setdefault(place, address) != address:
            self._complaint = f"the link is refused: two ranks connected as {place}"
        if self._complaint:
            return _refused(self._complaint)
        if refusal := self._refusal_for(place):
            return _refused(refusal)
        reply = {"state": "waiting", "replicas": self._replicas, "came": sorted(self._epochs)}
        own = places([place.data], self._handshake.context_size, self._handshake.tensor_size)
        if all(other in self._students for other in own):
            reply |= {"state": "ready", "asker": self._students[own[0]]}
        return reply

    def teacher(self, hello: dict) -> Reply:
        replica, protocol = int(hello["replica"]), hello["protocol"]
        if not 0 <= replica < 1 << 20:
            raise ValueError(f"there is no teacher replica {replica}")
        handshake = stated.read({**hello["handshake"], "protocol": protocol}, "teacher")
        if self._complaint:
            return _refused(self._complaint)
        replicas = self._replicas or handshake.copies
        if protocol != headers.PROTOCOL:  # it does not wait to be told: it knows from the greeting
            reason = f"the link is refused: {versions_differ(headers.PROTOCOL, protocol)}"
            return self._turned_away(replica, replicas, reason)
        if self._handshake is None:
            return _WAITING
        if reason := stated.refusal(self._handshake, handshake, replicas, self._first):
            return self._turned_away(replica, replicas, reason)
        self._refusals.pop(replica, None)
        wanted = self._handshake.places(replica, replicas)
        if not all(place in self._students for place in wanted):
            return _WAITING
        self._replicas = replicas
        self._epochs[replica] = self._epochs.get(replica, 0) + 1
        doubts = [
            doubt
            for doubt in stated.doubts(self._handshake, handshake, self._first)
            if doubt not in self._said
        ]
        for doubt in doubts:
            _log.warning("teacher replica %d: %s", replica, doubt)
        self._said.update(doubts)
        if self._first is None and handshake.weights:
            self._first = handshake
        return {
            "state": "ready",
            "doubts": doubts,
            "epoch": self._epochs[replica],
            "handshake": self._handshake.plain(),
            "addresses": [self._students[place] for place in wanted],
        }

    def _turned_away(self, replica: int, replicas: int, reason: str) -> Reply:
        """The students that it would serve are refused too, for as long as they wait for their first teacher."""
        self._refusals[replica] = (replicas, reason)
        _log.warning("teacher replica %d is turned away: %s", replica, reason)
        return _refused(reason)

    def _refusal_for(self, place: Place) -> str | None:
        for replica, (replicas, reason) in self._refusals.items():
            sensible = 1 <= replicas <= self._handshake.copies
            if not sensible or replica_of(place.data, self._handshake.copies, replicas) == replica:
                return reason
        return None


def ask(settings: LinkSettings, hello: dict) -> Reply:
    """One question to the rendezvous. ConnectionError if it is not there, HandshakeRefused with its reason."""
    connection, reply = _dial_first(settings, {"run": settings.name, **hello})
    connection.close()
    if reply.get("state") == "refused":
        raise HandshakeRefused(str(reply.get("reason")))
    try:
        for host, port in [*reply.get("addresses", ()), *([reply["asker"]] if "asker" in reply else ())]:
            if not isinstance(host, str) or type(port) is not int:
                raise ValueError
        doubts = reply.get("doubts", [])
        if not isinstance(doubts, list) or not all(isinstance(doubt, str) for doubt in doubts):
            raise ValueError
        if reply["state"] not in ("waiting", "ready"):
            raise ValueError
    except UNREADABLE:
        raise LinkError(f"{settings.address} answers what cannot be read: {str(reply):.200}") from None
    return reply


def _dial_first(settings: LinkSettings, hello: dict) -> tuple[Connection, Reply]:
    """Of the students' files that a pattern finds, some may be left over from runs that were killed."""
    *others, last = addresses.candidates(settings.address)
    for address in others:
        with suppress(ConnectionError):
            return dial(address, settings.shared_secret(), hello)
    return dial(last, settings.shared_secret(), hello)


def ask_until(
    settings: LinkSettings,
    hello: dict,
    ready: Callable[[Reply], bool],
    seconds: float,
    tick: Callable[[], None] = lambda: None,
    apart: float = 0.0,
) -> tuple[Reply | None, bool]:
    """Asks again and again. The reply that is ready, or None; and whether the rendezvous answered the last time.

    tick: called between two questions. apart: seconds that a rank of a large job leaves to the others between its
    questions; below a quarter of a second it may ask sooner.
    """
    answered, deadline = False, time.monotonic() + seconds
    longest = max(_LONGEST_PAUSE, apart)
    pause = max(_PAUSE, apart / 2)
    if apart > _LONGEST_PAUSE:
        # Of its own: the process's generator belongs to the training script, and to its checkpoints.
        time.sleep(random.Random().uniform(0.0, apart))
    while True:
        try:
            reply = ask(settings, hello)
            answered = True
            if ready(reply):
                return reply, True
        except ConnectionError as error:
            _log.debug("the rendezvous does not answer: %s", error)
            answered = False
        if time.monotonic() > deadline:
            return None, answered
        tick()
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _listening(settings: LinkSettings) -> socket.socket:
    if settings.address.startswith(addresses.FILE_SCHEME):
        own = (
            addresses.outward_address()
            if settings.interface is None
            else _interface_address(settings.interface)
        )
        return listen(own, 0)
    ((host, port),) = addresses.candidates(settings.address)
    return listen(host, port)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the host's interface; LinkError with the reason if that cannot be."""
    family, kind, _, _, address = _resolved(host, port)
    if address[0].startswith("127.0.1."):  # what Debian's /etc/hosts makes of the machine's own name
        _log.warning("%s is %s here, which no other machine reaches: give an IP address", host, address[0])
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a restarted run needs
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise LinkError(
            f"{host}:{port} cannot be listened at, which must be a free port on an address of this machine: "
            f"{error.strerror}"
        ) from error
    return listener


def local_host(settings: LinkSettings) -> str:
    """The IP address that this rank listens on: of `settings.interface`, or of the one that routes to the address.

    LinkError where a file is to say the address, and does not within `connect_timeout`.
    """
    if settings.interface is not None:
        return _interface_address(settings.interface)
    deadline = time.monotonic() + settings.connect_timeout
    while True:
        try:
            host, port = addresses.candidates(settings.address)[0]
            break
        except ConnectionError as error:
            if time.monotonic() > deadline:
                raise LinkError(
                    f"{error}, within {settings.connect_timeout:g} seconds (connect_timeout)"
                ) from None
        time.sleep(0.1)
    family, _, _, _, address = _resolved(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of a datagram socket: picks a route, sends nothing
        return probe.getsockname()[0]


def _interface_address(interface: str) -> str:
    with suppress(OSError):
        socket.getaddrinfo(interface, 0, flags=socket.AI_NUMERICHOST)
        return interface
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        except OSError:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise LinkError(
                f"interface must be an IP address or one of {known} with an IPv4 address, got {interface!r}"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def _resolved(host: str, port: int) -> tuple:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise LinkError(f"the host {host!r} cannot be resolved: {error.strerror}") from error


def _refused(reason: str) -> Reply:
    return {"state": "refused", "reason": reason}
