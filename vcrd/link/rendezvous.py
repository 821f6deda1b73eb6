"""How the two jobs find each other: the student job hosts the rendezvous, and both jobs ask it for each other.

The address of the rendezvous is "host:port", or it is in a file on a shared file system, "file:/path". With a file
nobody has to know a host before the jobs run. Rank 0 of the student's world listens at a free port and writes
"host:port" into the file. All others read the file before each question, so they find a student that starts again on
another host. A teacher may have a pattern, "file:/path/*". It connects to the student whose file is the oldest of those
that answer.

Each question is one connection (`connection.dial`): a JSON hello, a JSON reply, and the connection is closed. So no
connection outlives a question, and any process may die at any point. The roles are:

- "student": a rank of the student's last stage registers its handshake and its address. It asks again until all ranks
  of its data-parallel rank are known. It also asks while it waits for a teacher, to learn of a refusal.
- "teacher": the first rank of a teacher replica sends its handshake. Once the student ranks are complete it gets the
  handshake of the student, all addresses to connect to, and an epoch that is larger than any before. Every replica asks
  here, also one that comes back. So its weights are compared here with those of the first teacher of the run.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vcrd.settings import FILE_SCHEME, LinkSettings, host_and_port

from . import connection as wire
from . import handshake as stated
from .connection import Address, Connection, Listener, dial, versions_differ
from .errors import HandshakeRefused, LinkError
from .handshake import Handshake
from .plan import Place, places, replica_of

_log = logging.getLogger("vcrd")
Reply = dict
UNREADABLE = (ArithmeticError, LookupError, TypeError, ValueError)  # the errors of reading unexpected JSON
_WAITING = {"state": "waiting"}
_PAUSE, _LONGEST_PAUSE = 0.02, 0.25  # seconds between two questions
_MOST_RUNS = 1024  # of one rendezvous


def host_rendezvous(settings: LinkSettings) -> Rendezvous:
    """Opens the rendezvous at `settings.rendezvous`, an address of this machine, or writes its file. Does not block.

    Called on rank 0 of the student's world, which keeps the result and closes it when the run ends. LinkError when the
    address is taken or is not of this machine, or when the file cannot be written.
    """
    return Rendezvous(settings)


class Rendezvous:
    """The rendezvous of all runs that use one address."""

    def __init__(self, settings: LinkSettings) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        secret = settings.shared_secret()
        self._settings = settings
        self._listener = Listener(_listening(settings), secret, self._answer)
        try:
            publish(settings.rendezvous, self._listener.address)
        except LinkError:
            self._listener.close()
            raise

    def close(self) -> None:
        """Closes the rendezvous. Idempotent. Open links do not notice, but a lost teacher cannot come back."""
        withdraw(self._settings.rendezvous, self._listener.address)
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
    """The state of one run."""

    def __init__(self) -> None:
        self._handshake: Handshake | None = None  # the student's
        self._complaint: str | None = None
        self._students: dict[Place, Address] = {}
        self._replicas = 0  # 0 until the first replica has got an epoch
        self._epochs: dict[int, int] = {}
        self._first: Handshake | None = (
            None  # of the first teacher that has got an epoch and stated its weights
        )
        self._said: set[str] = set()  # doubts that have been logged
        # By replica: how many replicas it has stated, and why it may not join.
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
            reply |= {"state": "ready", "leader": self._students[own[0]]}
        return reply

    def teacher(self, hello: dict) -> Reply:
        replica, protocol = int(hello["replica"]), hello["protocol"]
        if not 0 <= replica < 1 << 20:
            raise ValueError(f"there is no teacher replica {replica}")
        handshake = stated.read({**hello["handshake"], "protocol": protocol}, "teacher")
        if self._complaint:
            return _refused(self._complaint)
        replicas = self._replicas or handshake.copies
        if protocol != wire.PROTOCOL:  # the teacher knows it from the greeting already
            reason = f"the link is refused: {versions_differ(wire.PROTOCOL, protocol)}"
            return self._refuse_teacher(replica, replicas, reason)
        if self._handshake is None:
            return _WAITING
        if reason := stated.refusal(self._handshake, handshake, replicas, self._first):
            return self._refuse_teacher(replica, replicas, reason)
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

    def _refuse_teacher(self, replica: int, replicas: int, reason: str) -> Reply:
        """Student ranks that wait for this replica as their first teacher are refused too."""
        self._refusals[replica] = (replicas, reason)
        _log.warning("teacher replica %d is refused: %s", replica, reason)
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
        for host, port in [*reply.get("addresses", ()), *([reply["leader"]] if "leader" in reply else ())]:
            if not isinstance(host, str) or type(port) is not int:
                raise ValueError
        doubts = reply.get("doubts", [])
        if not isinstance(doubts, list) or not all(isinstance(doubt, str) for doubt in doubts):
            raise ValueError
        if reply["state"] not in ("waiting", "ready"):
            raise ValueError
    except UNREADABLE:
        raise LinkError(f"{settings.rendezvous} answers what cannot be read: {str(reply):.200}") from None
    return reply


def _dial_first(settings: LinkSettings, hello: dict) -> tuple[Connection, Reply]:
    """Some of the files that a pattern finds may be left over from runs that were killed."""
    *others, last = candidates(settings.rendezvous)
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
    """Asks until a reply is `ready`. That reply or None, and whether the rendezvous has answered the last question.

    tick: called between two questions. apart: seconds between two questions of one rank, in a job of so many ranks that
    they would otherwise overload the rendezvous.
    """
    answered, deadline = False, time.monotonic() + seconds
    longest = max(_LONGEST_PAUSE, apart)
    pause = max(_PAUSE, apart / 2)
    if apart > _LONGEST_PAUSE:
        # A generator of its own: the global one belongs to the training script and to its checkpoints.
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


def candidates(address: str) -> list[Address]:
    """The addresses to ask, in order. ConnectionError while no file has one."""
    if not address.startswith(FILE_SCHEME):
        return [host_and_port(address)]
    path = address.removeprefix(FILE_SCHEME)
    found = [place for file in _by_age(glob.glob(path)) if (place := _read_address(file))]
    if not found:
        raise ConnectionError(f"no student has written its address to {path} yet")
    return found


def publish(address: str, place: Address) -> None:
    """Writes the file completely or not at all; LinkError where that fails. Does nothing for "host:port"."""
    if not address.startswith(FILE_SCHEME):
        return
    path = Path(address.removeprefix(FILE_SCHEME))
    if glob.has_magic(str(path)):
        raise LinkError(
            f"address: expected one file in the student job (only the teacher job may have a pattern), got {address}"
        )
    host, port = place
    text = f"[{host}]:{port}\n" if ":" in host else f"{host}:{port}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The draft is hidden from the pattern of a teacher. A rename is atomic, on NFS too.
        number, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(number, "w") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        raise LinkError(f"the address cannot be written to {path}: {error.strerror}") from error


def withdraw(address: str, place: Address) -> None:
    """Removes the file if it still has this address. Never fails."""
    path = address.removeprefix(FILE_SCHEME)
    if address.startswith(FILE_SCHEME) and _read_address(path) == place:
        with suppress(OSError):
            os.unlink(path)


def outward_address() -> str:
    """The IP address of the interface with the default route; 127.0.0.1 where there is none."""
    for family, far in (
        (socket.AF_INET, "192.0.2.1"),
        (socket.AF_INET6, "2001:db8::1"),
    ):  # reserved for documentation
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # a datagram socket: this picks a route and sends nothing
            return probe.getsockname()[0]
    return "127.0.0.1"


def _by_age(paths: list[str]) -> list[str]:
    ages = {}
    for path in paths:
        with suppress(OSError):
            ages[path] = os.stat(path).st_mtime
    return sorted(ages, key=lambda path: (ages[path], path))


def _read_address(path: str) -> Address | None:
    """The address in a file; None for a file that is missing or has other content."""
    try:
        return host_and_port(Path(path).read_bytes()[:300].decode().strip())
    except (OSError, UnicodeDecodeError):
        return None


def _listening(settings: LinkSettings) -> socket.socket:
    if settings.rendezvous.startswith(FILE_SCHEME):
        own = outward_address() if settings.interface is None else _interface_address(settings.interface)
        return listen(own, 0)
    ((host, port),) = candidates(settings.rendezvous)
    return listen(host, port)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the host's interface; LinkError with the reason if that cannot be."""
    family, kind, _, _, address = _resolved(host, port)
    if address[0].startswith("127.0.1."):  # the entry of Debian for the name of the machine itself
        _log.warning("%s is %s here, which no other machine reaches: give an IP address", host, address[0])
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restarted run needs it
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

    LinkError where a file should have the address and does not have it within `connect_timeout`.
    """
    if settings.interface is not None:
        return _interface_address(settings.interface)
    deadline = time.monotonic() + settings.connect_timeout
    while True:
        try:
            host, port = candidates(settings.rendezvous)[0]
            break
        except ConnectionError as error:
            if time.monotonic() > deadline:
                raise LinkError(
                    f"{error}, within {settings.connect_timeout:g} seconds (connect_timeout)"
                ) from None
        time.sleep(0.1)
    family, _, _, _, address = _resolved(host, port)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a datagram socket: this picks a route and sends nothing
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
                f"interface: expected an IP address or one of {known} with an IPv4 address, got {interface!r}"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def _resolved(host: str, port: int) -> tuple:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise LinkError(f"the host {host!r} cannot be resolved: {error.strerror}") from error


def _refused(reason: str) -> Reply:
    return {"state": "refused", "reason": reason}
