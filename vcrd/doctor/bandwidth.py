"""How fast the link is between the very ranks that will talk: over its own connections, all of them at once.

Which teacher rank sends to which student rank, and how much, is what `vcrd.link.plan` says of the two layouts. Ranks
are counted as Megatron counts them (tensor, context, data, pipeline), the student's first, then the teacher's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from vcrd.doctor.findings import first_line
from vcrd.link.connection import Connection
from vcrd.link.errors import LinkError
from vcrd.link.header import BYTES, Header, Kind
from vcrd.link.payload import payload_named
from vcrd.link.plan import replica_of
from vcrd.link.rendezvous import listen
from vcrd.link.wire import Listener, dial
from vcrd.plan.costs import traffic_of
from vcrd.plan.scenario import Scenario

_AT_ONCE = 16 << 20  # bytes of one message at most
_STARTING = 0.2  # of the time, in which TCP finds its pace
_GREETING = 10.0  # seconds for a connection


@dataclass(frozen=True)
class Pair:
    """sender, receiver: ranks of the common world. bytes: of one micro-batch."""

    sender: int
    receiver: int
    bytes: int


def pairs_of(run: Scenario, payload: str) -> list[Pair]:
    """Every teacher rank that sends to a student rank. run.replicas: a number."""
    traffic = traffic_of(run, payload_named(payload).sized(top_k=run.top_k, state_size=run.teacher.hidden))
    stage = run.student_tensor * run.student_context * run.student_data
    students = stage * (run.student_pipeline - 1)  # the ranks before the last stage
    teachers = run.student_gpus + run.teacher_tensor * run.replicas * (run.teacher_pipeline - 1)
    pairs = []
    for data in range(run.student_data):
        replica = replica_of(data, run.student_data, run.replicas)
        for flow in traffic.response((run.sequence, run.batch), data):
            place = flow.receiver
            inner = (place.data * run.student_context + place.context) * run.student_tensor + place.tensor
            pairs.append(
                Pair(teachers + replica * run.teacher_tensor + flow.sender, students + inner, flow.bytes)
            )
    return pairs


class Measurement:
    """One rank's part: `listen`, `connect` and `send` are taken by all ranks together, one after the other.

    secret: of the link. token: tells this measurement from any other.
    """

    def __init__(self, pairs: Sequence[Pair], rank: int, secret: str, token: str) -> None:
        self._incoming = {pair.sender: pair for pair in pairs if pair.receiver == rank}
        self._outgoing = [pair for pair in pairs if pair.sender == rank]
        self._secret, self._token = secret, token
        self._listener: Listener | None = None
        self._senders: list[tuple[Pair, Connection]] = []
        self._readers: dict[int, _Reader] = {}
        self._lock = threading.Lock()

    def listen(self, host: str) -> list | None:
        """Where this rank is reached, None if nobody sends to it. LinkError where it cannot listen."""
        if not self._incoming:
            return None
        self._listener = Listener(listen(host, 0), self._secret, self._answer)
        return list(self._listener.address)

    def connect(self, addresses: dict[int, Sequence]) -> dict[int, str]:
        """Dials every rank that this one sends to; why not, by rank, where that fails."""
        failed: dict[int, str] = {}

        def one(pair: Pair) -> None:
            if pair.receiver not in addresses:
                failed[pair.receiver] = "it does not listen"
                return
            host, port = addresses[pair.receiver]
            hello = {"doctor": self._token, "sender": pair.sender}
            try:
                connection, _ = dial((host, int(port)), self._secret, hello, _GREETING)
            except (ConnectionError, LinkError) as error:
                failed[pair.receiver] = first_line(error)
                return
            with self._lock:
                self._senders.append((pair, connection))

        _all_at_once([lambda pair=pair: one(pair) for pair in self._outgoing])
        return failed

    def send(self, seconds: float) -> None:
        """Sends to everybody for that long, at least two messages, and ends every connection."""
        deadline = time.monotonic() + seconds

        def one(pair: Pair, connection: Connection) -> None:
            part = torch.zeros(max(1, min(pair.bytes - BYTES, _AT_ONCE)), dtype=torch.uint8)
            header = Header(Kind.RESPONSE, sequence=part.numel(), batch=1)
            sent = 0
            with suppress(ConnectionError, TimeoutError):
                # A receiver needs two for a rate, also where a busy machine sends none in that time.
                while sent < 2 or time.monotonic() < deadline:
                    connection.send(header, part, seconds=seconds + _GREETING)
                    sent += 1
            connection.close()

        _all_at_once([lambda pair=pair, c=c: one(pair, c) for pair, c in self._senders])

    def rates(self, seconds: float) -> dict[int, float]:
        """Bytes per second from each sender; waits at most that long for the ends. Empty at a rank that only sends."""
        deadline = time.monotonic() + seconds
        with self._lock:
            readers = dict(self._readers)
        return {
            sender: reader.rate(max(0.0, deadline - time.monotonic())) for sender, reader in readers.items()
        }

    def close(self) -> None:
        """Ends what is left. Idempotent."""
        if self._listener is not None:
            self._listener.close()
        for _, connection in self._senders:
            connection.close()
        with self._lock:
            for reader in self._readers.values():
                reader.end()

    def _answer(self, hello: dict):
        sender = hello.get("sender")
        if hello.get("doctor") != self._token or sender not in self._incoming:
            return {"state": "refused"}, None
        return {"state": "ready"}, lambda connection: self._keep(sender, connection)

    def _keep(self, sender: int, connection: Connection) -> None:
        with self._lock:
            self._readers[sender] = _Reader(connection)


class _Reader:
    """Takes what one sender sends until it ends, as a student's reader does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._marks: list[tuple[float, int]] = []  # when, and bytes so far
        self._thread = threading.Thread(target=self._read, name="vcrd-doctor-reader", daemon=True)
        self._thread.start()

    def rate(self, seconds: float) -> float:
        """Bytes per second without the beginning; 0 if too little came for that."""
        self._thread.join(seconds)
        marks = list(self._marks)
        self.end()
        if len(marks) < 2:
            return 0.0
        begun = marks[0][0] + _STARTING * (marks[-1][0] - marks[0][0])
        first = next(mark for mark in marks if mark[0] >= begun)
        if first is marks[-1]:
            first = marks[0]
        return (marks[-1][1] - first[1]) / max(1e-9, marks[-1][0] - first[0])

    def end(self) -> None:
        self._connection.end()

    def _read(self) -> None:
        memory = torch.empty(_AT_ONCE, dtype=torch.uint8)
        with suppress(ConnectionError, LinkError):
            while True:
                header = self._connection.receive_header()
                self._connection.receive(memory[: min(header.sequence, _AT_ONCE)])
                self._marks.append((time.monotonic(), self._connection.received))
        self._connection.close()


def _all_at_once(tasks: Sequence) -> None:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
