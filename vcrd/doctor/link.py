"""Measures the link between the ranks that will use it, all of them at once, and compares it with what the run needs.

`vcrd.link.plan` computes from the two layouts which teacher rank sends how much to which student rank. Ranks are
numbered in the order of Megatron (tensor, context, data, pipeline), first those of the student, then those of the
teacher. The bytes travel over the TCP connections of the link.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from vcrd.doctor.checks import Job
from vcrd.doctor.findings import Finding, first_line, info, ok, problem, unchecked
from vcrd.doctor.network import nccl_version, own_address
from vcrd.link.connection import HEADER_BYTES, Connection, Header, Kind, Listener, dial
from vcrd.link.errors import LinkError
from vcrd.link.payload import PAYLOADS, payload_named
from vcrd.link.plan import replica_of
from vcrd.link.rendezvous import listen
from vcrd.plan.choice import choose
from vcrd.plan.costs import cost, student_seconds, traffic_of
from vcrd.plan.scenario import Scenario

_NETWORK_FIX = (
    "Open all TCP ports between these nodes, or set VCRD_INTERFACE to the interface that connects them."
)
_MOST_RANKS = 8  # that a line names
_CONNECT_TIMEOUT = 10.0  # seconds for one connection
_EXTRA_TIME = 15.0  # seconds for handshakes, and for messages that are still under way at the end
_LARGEST_MESSAGE = 16 << 20  # bytes
_WARM_UP = 0.2  # share of the measured time that is ignored because TCP still speeds up

Gather = Callable[..., dict[int, Any]]  # `Gathering.gather`


def check_link(job: Job, gather: Gather | None, nodes: dict[int, str]) -> list[Finding]:
    """Collective over all processes, or called with `gather` None in a single process. The findings of rank 0 count."""
    if job.options.scenario is None:
        text = "not measured; --student and --teacher with their layouts say which ranks communicate"
        return [unchecked("link", text)]
    run = with_replicas(job.options.scenario, job.world.size)
    job = replace(job, options=replace(job.options, scenario=run))
    if gather is None:
        return [_check_loopback(job)]
    needed = run.student_gpus + run.replicas * run.replica_gpus
    if job.world.size != needed:
        text = f"the layouts take {run.student_gpus} + {needed - run.student_gpus} processes, but there are "
        text += f"{job.world.size}"
        fix = f"Start {needed} processes, first those of the student, or correct --student and --teacher."
        return [problem("link processes", text, fix)]
    return _check_pairs(job, gather, nodes)


def with_replicas(run: Scenario, processes: int) -> Scenario:
    """The scenario with a number of teacher replicas: as many as fill the processes if it has none, at least one."""
    if run.replicas is not None:
        return run
    left = processes - run.student_gpus
    return replace(run, replicas=min(max(1, left // run.replica_gpus), run.student_data))


def _check_pairs(job: Job, gather: Gather, nodes: dict[int, str]) -> list[Finding]:
    rank, seconds = job.world.rank, job.options.seconds
    names = {r: f"rank {r} ({node})" for r, node in nodes.items()}
    came = gather([secrets.token_hex(8), job.secret is not None])
    able = {r for r, (_, has_secret) in came.items() if has_secret}
    planned = pairs_of(job.options.scenario, job.first.payload)
    # Other findings already report ranks that are absent or have no secret.
    pairs = [pair for pair in planned if {pair.sender, pair.receiver} <= able]
    measurement = Measurement(pairs, rank, job.secret or "", came[0][0])
    try:
        try:
            place = measurement.listen(own_address(job))
        except LinkError as error:
            place = first_line(error)
        places = gather(place, _EXTRA_TIME)
        silent = {r: why for r, why in places.items() if isinstance(why, str)}
        addresses = {r: where for r, where in places.items() if isinstance(where, list)}
        failed = gather(list(measurement.connect(addresses).items()), _EXTRA_TIME)
        measurement.send(seconds)
        mine = measurement.rates(seconds + _EXTRA_TIME)
        rates = gather(list(mine.items()), seconds + 2 * _EXTRA_TIME)
    finally:
        measurement.close()
    found = _left_out(job, len(pairs), len(planned), able)
    if not pairs:
        return found
    errors = {
        (sender, to): silent.get(to, why) for sender, failures in failed.items() for to, why in failures
    }
    if errors:
        return [*found, *unreachable(errors, names)]
    speeds = {(sender, to): rate for to, received in rates.items() for sender, rate in received}
    return [*found, judge(job, pairs, speeds, names)]


def _left_out(job: Job, measured: int, planned: int, able: set[int]) -> list[Finding]:
    ranks = sorted(set(range(job.world.size)) - able)
    if not ranks:
        return []
    who = f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:_MOST_RANKS]))}"
    who += f" and {len(ranks) - _MOST_RANKS} others" if len(ranks) > _MOST_RANKS else ""
    text = f"{measured} of {planned} pairs were measured, without {who}: absent, or unable to read the secret"
    return [unchecked("link", text)]


def _check_loopback(job: Job) -> Finding:
    """Sends the bytes of the largest pair from this process to itself."""
    if job.secret is None:
        return unchecked("link", "not measured, because the secret could not be read")
    largest = max(pair.bytes for pair in pairs_of(job.options.scenario, job.first.payload))
    measurement = Measurement([RankPair(0, 0, largest)], 0, job.secret, secrets.token_hex(8))
    try:
        place = measurement.listen("127.0.0.1")
        failed = measurement.connect({0: place})
        if failed:
            return unreachable({(0, 0): failed[0]}, {0: job.world.node})[0]
        measurement.send(job.options.seconds)
        rate = measurement.rates(_EXTRA_TIME)[0]
    finally:
        measurement.close()
    text = (
        f"{rate / 1e9:.3g} GB/s over the loopback of this node; a single process cannot measure the network"
    )
    return info("link", text)


def unreachable(errors: Mapping[tuple[int, int], str], names: Mapping[int, str]) -> list[Finding]:
    """errors: why a sender does not reach a receiver, by sender and receiver. One finding for each different error."""
    found = []
    for why in dict.fromkeys(errors.values()):
        pairs = [pair for pair, error in errors.items() if error == why]
        sender, receiver = pairs[0]
        more = f" (and {len(pairs) - 1} other pairs)" if len(pairs) > 1 else ""
        text = f"{names[sender]} does not reach {names[receiver]}{more}: {why}"
        found.append(problem("link", text, _NETWORK_FIX))
    return found


def judge(
    job: Job, pairs: Sequence[RankPair], rates: Mapping[tuple[int, int], float], names: Mapping[int, str]
) -> Finding:
    """rates: bytes per second from each sender to each receiver, measured at the same time."""
    slowest = min(pairs, key=lambda pair: rates.get((pair.sender, pair.receiver), 0.0))
    least = rates.get((slowest.sender, slowest.receiver), 0.0)
    who = f"from {names[slowest.sender]} to {names[slowest.receiver]}"
    if not least:
        return problem("link", f"nothing arrived in {job.options.seconds:g} seconds {who}", _NETWORK_FIX)
    text = f"{least / 1e9:.3g} GB/s {who}"
    if len(pairs) > 1:
        text += f", the slowest of {len(pairs)} pairs at once; {sum(rates.values()) / 1e9:.3g} GB/s together"
    if _uses_nccl(job):
        text += " (over TCP; the run will use NCCL, which was not measured)"
    if not job.options.models_known:
        return ok("link", f"{text}; give both models, as for `plan`, to compare this with what the run needs")
    run, payload = job.options.scenario, payload_named(job.first.payload)
    seconds = max(pair.bytes / rates[pair.sender, pair.receiver] for pair in pairs)
    compute = student_seconds(run)
    text += f"; a micro-batch as {payload.name} takes {seconds:.3g} s on it, the compute of the student {compute:.3g} s"
    if seconds <= compute or _uses_nccl(job):
        return ok("link", text)
    # The network speed per rank at which the plan would have predicted these seconds.
    unit = cost(replace(run, network=1.0), payload).network_seconds
    planned = [cost(replace(run, network=unit / seconds), each) for each in PAYLOADS]
    best = choose(planned, run.student_gpu.memory).payload
    fix = "Use a faster network: no other payload is faster here."
    if best != payload.name:
        fix = f"Set VCRD_PAYLOAD={best} in both jobs, or use a faster network."
    return problem("link", f"{text}, so the student waits", fix)


def _uses_nccl(job: Job) -> bool:
    """Whether the run will use NCCL, as far as this process can tell."""
    if job.link.transport == "auto":
        return bool(nccl_version()[0])
    return job.link.transport == "nccl"


@dataclass(frozen=True)
class RankPair:
    """A teacher rank that sends to a student rank. bytes: of one micro-batch."""

    sender: int
    receiver: int
    bytes: int


def pairs_of(run: Scenario, payload: str) -> list[RankPair]:
    """All pairs of the run. run.replicas must be a number."""
    traffic = traffic_of(run, payload_named(payload).sized(top_k=run.top_k, state_size=run.teacher.hidden))
    last_stage = run.student_tensor * run.student_context * run.student_data
    students = last_stage * (run.student_pipeline - 1)  # ranks before the last stage
    teachers = run.student_gpus + run.teacher_tensor * run.replicas * (run.teacher_pipeline - 1)
    pairs = []
    for data in range(run.student_data):
        replica = replica_of(data, run.student_data, run.replicas)
        for flow in traffic.response((run.sequence, run.batch), data):
            place = flow.receiver
            inner = (place.data * run.student_context + place.context) * run.student_tensor + place.tensor
            sender = teachers + replica * run.teacher_tensor + flow.sender
            pairs.append(RankPair(sender, students + inner, flow.bytes))
    return pairs


class Measurement:
    """The part of one rank in the measurement. All ranks call `listen`, `connect`, `send` and `rates` in this order. A
    call begins when all ranks have finished the one before.

    secret: of the link. token: identifies this measurement.
    """

    def __init__(self, pairs: Sequence[RankPair], rank: int, secret: str, token: str) -> None:
        self._incoming = {pair.sender: pair for pair in pairs if pair.receiver == rank}
        self._outgoing = [pair for pair in pairs if pair.sender == rank]
        self._secret, self._token = secret, token
        self._listener: Listener | None = None
        self._senders: list[tuple[RankPair, Connection]] = []
        self._readers: dict[int, _Reader] = {}
        self._lock = threading.Lock()

    def listen(self, host: str) -> list | None:
        """The address of this rank; None if no rank sends to it. LinkError if it cannot listen."""
        if not self._incoming:
            return None
        self._listener = Listener(listen(host, 0), self._secret, self._answer)
        return list(self._listener.address)

    def connect(self, addresses: dict[int, Sequence]) -> dict[int, str]:
        """Connects to every rank that this one sends to. Returns the error of each rank where that fails."""
        failed: dict[int, str] = {}

        def connect_to(pair: RankPair) -> None:
            if pair.receiver not in addresses:
                failed[pair.receiver] = "it does not listen"
                return
            host, port = addresses[pair.receiver]
            hello = {"doctor": self._token, "sender": pair.sender}
            try:
                connection, _ = dial((host, int(port)), self._secret, hello, _CONNECT_TIMEOUT)
            except (ConnectionError, LinkError) as error:
                failed[pair.receiver] = first_line(error)
                return
            with self._lock:
                self._senders.append((pair, connection))

        _all_at_once([lambda pair=pair: connect_to(pair) for pair in self._outgoing])
        return failed

    def send(self, seconds: float) -> None:
        """Sends to all receivers for so many seconds, at least two messages to each, then closes the connections."""
        deadline = time.monotonic() + seconds

        def send_to(pair: RankPair, connection: Connection) -> None:
            part = torch.zeros(max(1, min(pair.bytes - HEADER_BYTES, _LARGEST_MESSAGE)), dtype=torch.uint8)
            header = Header(Kind.RESPONSE, sequence=part.numel(), batch=1)
            sent = 0
            with suppress(ConnectionError, TimeoutError):
                # A receiver needs two messages to compute a rate, even if a busy machine sends none in that time.
                while sent < 2 or time.monotonic() < deadline:
                    connection.send(header, part, seconds=seconds + _CONNECT_TIMEOUT)
                    sent += 1
            connection.close()

        _all_at_once([lambda pair=pair, c=c: send_to(pair, c) for pair, c in self._senders])

    def rates(self, seconds: float) -> dict[int, float]:
        """Bytes per second from each sender. Waits at most so many seconds until the senders have closed."""
        deadline = time.monotonic() + seconds
        with self._lock:
            readers = dict(self._readers)
        return {
            sender: reader.rate(max(0.0, deadline - time.monotonic())) for sender, reader in readers.items()
        }

    def close(self) -> None:
        """Closes everything that is still open. Idempotent."""
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
    """Receives from one sender in a thread until the sender closes, like a reader of the student."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._marks: list[tuple[float, int]] = []  # time, and bytes received until then
        self._thread = threading.Thread(target=self._read, name="vcrd-doctor-reader", daemon=True)
        self._thread.start()

    def rate(self, seconds: float) -> float:
        """Bytes per second after the warm-up; 0 if fewer than two messages came."""
        self._thread.join(seconds)
        marks = list(self._marks)
        self.end()
        if len(marks) < 2:
            return 0.0
        start = marks[0][0] + _WARM_UP * (marks[-1][0] - marks[0][0])
        first = next(mark for mark in marks if mark[0] >= start)
        if first is marks[-1]:
            first = marks[0]
        return (marks[-1][1] - first[1]) / max(1e-9, marks[-1][0] - first[0])

    def end(self) -> None:
        self._connection.end()

    def _read(self) -> None:
        buffer = torch.empty(_LARGEST_MESSAGE, dtype=torch.uint8)
        with suppress(ConnectionError, LinkError):
            while True:
                header = self._connection.receive_header()
                self._connection.receive(buffer[: min(header.sequence, _LARGEST_MESSAGE)])
                self._marks.append((time.monotonic(), self._connection.received))
        self._connection.close()


def _all_at_once(tasks: Sequence) -> None:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
