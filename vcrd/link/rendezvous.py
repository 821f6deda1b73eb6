"""How the two jobs meet: the store, the handshake, and the forming of one extra group per teacher replica.

The student job hosts a TCPStore. Each side writes its facts, reads the other's, and both judge them with the
same function, so both refuse with the same sentence. Then every rank that gets a seat in the group writes
whether it agrees, and none enters the forming of the group, which could not be interrupted, before
all agreed.

Keys, under the run's name:
    student                      the student's facts
    replicas                     how many teacher replicas there are, by the first to come
    teacher/R                    replica R's facts
    heard/...                    set by a rank once it has read the other side's facts
    seat/R/I, seat/R/I/heard     "ok" or a complaint of rank I in replica R's group; set once it read all
    group/R/                     replica R's process group
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from . import facts as stated
from .channel import Channel
from .errors import HandshakeRefused, LinkError, StudentLost, TeacherLost
from .facts import Facts
from .plan import Roster
from .settings import LinkSettings

_log = logging.getLogger("vcrd")
_AGREED = "ok"
_LINGER = 5.0  # seconds that a refused student stays up, and with it the store, for the teacher to read why


def host_store(settings: LinkSettings) -> dist.TCPStore:
    """Opens the run's store at `settings.address`, an address of this machine. Never blocks.

    Called on rank 0 of the student's world, which must keep the result for as long as the link is in use.
    LinkError when the address is taken or is not of this machine.
    """
    listener = _listen(settings)
    return dist.TCPStore(
        settings.host,
        settings.port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=settings.connect_timeout),
        master_listen_fd=listener.detach(),
    )


def join_store(settings: LinkSettings, tick: Callable[[], None]) -> dist.TCPStore:
    """A connection to the run's store, once it is up. LinkError after `connect_timeout`.

    tick: called again and again while waiting.
    """
    # TCPStore's own retries write to stderr and cannot tick: let it connect once something listens.
    if not _until(lambda: _answers(settings), settings.connect_timeout, tick):
        raise LinkError(
            f"no store answered at {settings.address} within {settings.connect_timeout:g} seconds "
            "(connect_timeout): rank 0 of the student's world hosts it"
        )
    with _reached(settings):
        return dist.TCPStore(
            settings.host,
            settings.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=settings.connect_timeout),
        )


class Meeting:
    """One rank's view of the handshake of the run `settings.name`."""

    def __init__(
        self, store: dist.Store, settings: LinkSettings, tick: Callable[[], None] = lambda: None
    ) -> None:
        self._store = dist.PrefixStore(settings.name, store)
        self._settings = settings
        self._tick = tick

    def student_states(self, facts: Facts) -> None:
        with _reached(self._settings):
            self._store.set("student", facts.text())

    def student_reads(self, data_rank: int, tensor_rank: int) -> tuple[Facts, Facts, Roster, int]:
        """The student's facts as its first rank stated them, the teacher's, the seats, and the replica that
        serves `data_rank`. TeacherLost if none comes; HandshakeRefused if the two do not fit."""
        absent = TeacherLost(f"no teacher came to {self._within()}")
        _log.info("waiting for a teacher at %s", self._settings.address)
        replicas = _count(self._read("replicas", absent))
        student = stated.read(self._read("student", absent), "student")
        replica = stated.served_by(student, replicas, data_rank)
        absent = TeacherLost(f"teacher replica {replica} did not come to {self._within()}")
        text = self._read(f"teacher/{replica}", absent)
        with _reached(self._settings):
            self._store.set(f"heard/student/{data_rank}/{tensor_rank}", _AGREED)
        try:
            teacher = stated.read(text, "teacher")
            if reason := stated.refusal(student, teacher, replicas):
                raise HandshakeRefused(reason)
        except HandshakeRefused:
            self._linger([f"heard/teacher/{replica}", *_students_heard(student)])
            raise
        return student, teacher, stated.roster(student, teacher, replica), replica

    def teacher_states_and_reads(self, facts: Facts, replica: int) -> Facts:
        """Called by the replica's rank 0 only: the student's facts, or StudentLost or HandshakeRefused."""
        with _reached(self._settings):
            if self._store.add(f"teacher/{replica}/claims", 1) > 1:
                raise HandshakeRefused(
                    f"the link is refused: run {self._settings.name!r} has had a teacher replica {replica}"
                )
            replicas = _count(self._store.compare_set("replicas", "", str(facts.copies)))
            self._store.set(f"teacher/{replica}", facts.text())
        student = self._read("student", StudentLost(f"no student stated its facts at {self._within()}"))
        with _reached(self._settings):
            self._store.set(f"heard/teacher/{replica}", _AGREED)
        student = stated.read(student, "student")
        if reason := stated.refusal(student, facts, replicas):
            raise HandshakeRefused(reason)
        return student

    def take_seat(self, roster: Roster, replica: int, rank: int, complaint: str | None) -> Channel:
        """Forms the replica's group; if any rank has a complaint, all raise HandshakeRefused with it."""
        with _reached(self._settings):
            if self._store.add(f"seat/{replica}/{rank}/claims", 1) > 1:
                complaint = f"two ranks connected as {roster.describe(rank)} of run {self._settings.name!r}"
            self._store.set(f"seat/{replica}/{rank}", complaint or _AGREED)
        seats = {f"seat/{replica}/{other}": other for other in range(roster.size)}
        self._wait_for_seats(roster, rank, seats)
        with _reached(self._settings):
            answers = [self._store.get(key).decode() for key in seats]
            self._store.set(f"seat/{replica}/{rank}/heard", _AGREED)
        refused = [answer for answer in answers if answer != _AGREED]
        if refused:
            if rank in roster.students:
                self._linger([f"{key}/heard" for key in seats])
            raise HandshakeRefused(f"the link is refused: {refused[0]}")
        return self._form(roster, replica, rank)

    def _wait_for_seats(self, roster: Roster, rank: int, seats: dict[str, int]) -> None:
        if self._wait(seats, self._settings.connect_timeout):
            return
        with _reached(self._settings):
            missing = [other for key, other in seats.items() if not self._store.check([key])]
        lost = TeacherLost if rank in roster.students else StudentLost
        raise lost(f"{roster.describe(missing[0]) if missing else 'a rank'} did not come to {self._within()}")

    def _form(self, roster: Roster, replica: int, rank: int) -> Channel:
        store = dist.PrefixStore(f"group/{replica}", self._store)
        host, seconds = local_host(self._settings), self._settings.connect_timeout
        try:
            return Channel(store, rank, roster.size, host, seconds)
        except RuntimeError as error:
            raise LinkError(f"the link's group could not be formed from {host}: {error}") from error

    def _read(self, key: str, absent: LinkError) -> bytes:
        if not self._wait([key], self._settings.connect_timeout):
            raise absent
        with _reached(self._settings):
            return self._store.get(key)

    def _wait(self, keys: Iterable[str], seconds: float) -> bool:
        """Whether all keys are there within that time. Polls: a wait inside the store could not tick."""
        keys = list(keys)
        with _reached(self._settings):
            return _until(lambda: self._store.check(keys), seconds, self._tick)

    def _linger(self, keys: Iterable[str]) -> None:
        """Gives the others time to read why they are refused, before this job ends and the store with it."""
        try:
            self._wait(keys, min(_LINGER, self._settings.connect_timeout))
        except LinkError:
            pass  # the store is gone already; the refusal is the better message

    def _within(self) -> str:
        return f"{self._settings.address} within {self._settings.connect_timeout:g} seconds (connect_timeout)"


def local_host(settings: LinkSettings) -> str:
    """The local address from which the store is reached: where this rank's own sockets bind.

    On a machine with several networks it is the one the jobs share, and on 127.0.0.1 it is 127.0.0.1.
    """
    with _resolved(settings) as (family, _, _, _, address):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: picks a route, sends nothing
            return probe.getsockname()[0]


def _count(text: bytes) -> int:
    if not (text.isdigit() and 0 < len(text) < 10 and int(text)):
        raise HandshakeRefused("the link is refused: the number of teacher replicas cannot be read")
    return int(text)


def _students_heard(student: Facts) -> Iterator[str]:
    for data_rank in range(student.copies):
        for tensor_rank in range(student.tensor_size):
            yield f"heard/student/{data_rank}/{tensor_rank}"


def _listen(settings: LinkSettings) -> socket.socket:
    with _resolved(settings) as (family, kind, _, _, address):
        if address[0].startswith("127.0.1."):  # what Debian's /etc/hosts makes of the machine's own name
            _log.warning(
                "%s is %s here, which no other machine reaches: give an IP address", settings.host, address[0]
            )
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a restarted run needs
        try:
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            listener.close()
            raise LinkError(
                f"the store cannot listen at {settings.address}, which must be a free port on an address "
                f"of the machine of the student's rank 0: {error.strerror}"
            ) from error
        return listener


def _answers(settings: LinkSettings) -> bool:
    try:
        socket.create_connection((settings.host, settings.port), timeout=1.0).close()
        return True
    except OSError:
        return False


def _until(condition: Callable[[], bool], seconds: float, tick: Callable[[], None]) -> bool:
    """Whether it came true within that time; asked after 10 ms at first, later 4 times a second."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while not condition():
        if time.monotonic() > deadline:
            return False
        tick()
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return True


@contextmanager
def _resolved(settings: LinkSettings) -> Iterator[tuple]:
    try:
        yield socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise LinkError(
            f"the host in address {settings.address!r} cannot be resolved: {error.strerror}"
        ) from error


@contextmanager
def _reached(settings: LinkSettings) -> Iterator[None]:
    try:
        yield
    except LinkError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LinkError(f"the store at {settings.address} cannot be reached any longer: {reason}") from error
