"""Measures the link by the processes of one doctor, and says what came of it."""

from __future__ import annotations

import secrets
from dataclasses import replace

from vcrd.doctor import link
from vcrd.doctor.bandwidth import Measurement, Pair, pairs_of
from vcrd.doctor.findings import Finding, fault, first_line, unchecked
from vcrd.doctor.job import Job
from vcrd.doctor.meeting import Meeting
from vcrd.doctor.network import own_address
from vcrd.link.errors import LinkError

_BEYOND = 15.0  # seconds for greetings and what is still under way


def try_link(job: Job, meeting: Meeting | None, nodes: dict[int, str]) -> list[Finding]:
    """Collective where there is a meeting; the line is rank 0's."""
    if job.scenario is None:
        return [
            unchecked(
                "link", "not measured; --student and --teacher with their layouts say who talks to whom"
            )
        ]
    job = _with_replicas(job)
    needed = _processes(job)
    if meeting is None:
        return [_alone(job)]
    if job.world.size != needed:
        run = job.scenario
        text = f"the layouts take {run.student_gpus} + {needed - run.student_gpus} processes"
        text += f", and here are {job.world.size}"
        mend = f"Start {needed} processes, the student's first, or correct --student and --teacher."
        return [fault("processes of the link", text, mend)]
    return _measured(job, meeting, nodes)


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


def _secret(job: Job) -> str:
    try:
        return job.link.shared_secret()
    except ValueError:  # `environment` has a line for it
        return ""


def _measured(job: Job, meeting: Meeting, nodes: dict[int, str]) -> list[Finding]:
    pairs, rank = _pairs(job), job.world.rank
    names = {r: f"rank {r} ({nodes.get(r, '?')})" for r in range(job.world.size)}
    token = meeting.gather(secrets.token_hex(8))[0]
    measurement = Measurement(pairs, rank, _secret(job), token)
    try:
        try:
            place = measurement.listen(own_address(job))
        except LinkError as error:
            place = first_line(error)
        places = meeting.gather(place, _BEYOND)
        silent = {r: why for r, why in places.items() if isinstance(why, str)}
        addresses = {r: where for r, where in places.items() if isinstance(where, list)}
        failed = measurement.connect(addresses)
        refusals = meeting.gather(list(failed.items()), _BEYOND)
        measurement.send(job.seconds)
        rates = meeting.gather(
            list(measurement.rates(job.seconds + _BEYOND).items()), job.seconds + 2 * _BEYOND
        )
    finally:
        measurement.close()
    reasons = {
        (sender, to): silent.get(to, why) for sender, failures in refusals.items() for to, why in failures
    }
    if reasons:
        return link.unreached(reasons, names)
    speeds = {(sender, to): rate for to, those in rates.items() for sender, rate in those}
    return [link.measured(job, pairs, speeds, names)]


def _alone(job: Job) -> Finding:
    """The largest of the pairs, from this process to itself."""
    largest = max(_pairs(job), key=lambda pair: pair.bytes)
    pair = Pair(0, 0, largest.bytes)
    measurement = Measurement([pair], 0, _secret(job), secrets.token_hex(8))
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
