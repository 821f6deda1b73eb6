"""Measures the link by the processes of one doctor, and says what came of it."""

from __future__ import annotations

import secrets
from dataclasses import replace

from vcrd.doctor import link
from vcrd.doctor.bandwidth import Measurement, Pair, pairs_of
from vcrd.doctor.findings import Finding, fault, first_line, unchecked
from vcrd.doctor.gathering import Gathering
from vcrd.doctor.job import Job
from vcrd.doctor.network import own_address
from vcrd.link.errors import LinkError

_MOST = 8  # ranks that are named
_BEYOND = 15.0  # seconds for greetings and what is still under way


def try_link(job: Job, gathering: Gathering | None, nodes: dict[int, str]) -> list[Finding]:
    """Collective where there is a gathering; the line is rank 0's."""
    if job.scenario is None:
        return [
            unchecked(
                "link", "not measured; --student and --teacher with their layouts say who talks to whom"
            )
        ]
    job = _with_replicas(job)
    needed = _processes(job)
    if gathering is None:
        return [_alone(job)]
    if job.world.size != needed:
        run = job.scenario
        text = f"the layouts take {run.student_gpus} + {needed - run.student_gpus} processes"
        text += f", and here are {job.world.size}"
        fix = f"Start {needed} processes, the student's first, or correct --student and --teacher."
        return [fault("processes of the link", text, fix)]
    return _measured(job, gathering, nodes)


def _with_replicas(job: Job) -> Job:
    """As many as fill the processes, where nothing was said; one where that is none."""
    run = job.scenario
    if run.replicas is not None:
        return job
    left = job.world.size - run.student_gpus
    replicas = min(max(1, left // run.replica_gpus), run.student_data)
    return replace(job, scenario=replace(run, replicas=replicas))


def _processes(job: Job) -> int:
    return job.scenario.student_gpus + job.scenario.replicas * job.scenario.replica_gpus


def _pairs(job: Job) -> list[Pair]:
    return pairs_of(job.scenario, job.link.payload)


def _measured(job: Job, gathering: Gathering, nodes: dict[int, str]) -> list[Finding]:
    rank = job.world.rank
    names = {r: f"rank {r} ({node})" for r, node in nodes.items()}
    came = gathering.gather([secrets.token_hex(8), job.secret is not None])
    able = {r for r, (_, has_secret) in came.items() if has_secret}
    # Of a rank that is not there, or cannot join any link, there are lines already.
    pairs = [pair for pair in _pairs(job) if {pair.sender, pair.receiver} <= able]
    measurement = Measurement(pairs, rank, job.secret or "", came[0][0])
    try:
        try:
            place = measurement.listen(own_address(job))
        except LinkError as error:
            place = first_line(error)
        places = gathering.gather(place, _BEYOND)
        silent = {r: why for r, why in places.items() if isinstance(why, str)}
        addresses = {r: where for r, where in places.items() if isinstance(where, list)}
        failed = measurement.connect(addresses)
        refusals = gathering.gather(list(failed.items()), _BEYOND)
        measurement.send(job.seconds)
        rates = gathering.gather(
            list(measurement.rates(job.seconds + _BEYOND).items()), job.seconds + 2 * _BEYOND
        )
    finally:
        measurement.close()
    found = _left_out(job, len(pairs), able)
    if not pairs:
        return found
    reasons = {
        (sender, to): silent.get(to, why) for sender, failures in refusals.items() for to, why in failures
    }
    if reasons:
        return [*found, *link.unreached(reasons, names)]
    speeds = {(sender, to): rate for to, those in rates.items() for sender, rate in those}
    return [*found, link.measured(job, pairs, speeds, names)]


def _left_out(job: Job, measured: int, able: set[int]) -> list[Finding]:
    ranks = sorted(set(range(job.world.size)) - able)
    if not ranks:
        return []
    who = f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:_MOST]))}"
    who += f" and {len(ranks) - _MOST} others" if len(ranks) > _MOST else ""
    text = f"{measured} of {len(_pairs(job))} pairs were measured, without {who}: not there, or without the secret"
    return [unchecked("link", text)]


def _alone(job: Job) -> Finding:
    """The largest of the pairs, from this process to itself."""
    largest = max(_pairs(job), key=lambda pair: pair.bytes)
    pair = Pair(0, 0, largest.bytes)
    if job.secret is None:
        return unchecked("link", "not measured, because the secret could not be read")
    measurement = Measurement([pair], 0, job.secret, secrets.token_hex(8))
    try:
        place = measurement.listen("127.0.0.1")
        failed = measurement.connect({0: place})
        if failed:
            return link.unreached({(0, 0): failed[0]}, {0: job.world.node})[0]
        measurement.send(job.seconds)
        rate = measurement.rates(_BEYOND)[0]
    finally:
        measurement.close()
    return link.loopback(job, pair, rate)
