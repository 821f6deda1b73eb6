"""Runs all checks in their order, in one process or in many processes together."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from vcrd.doctor import environment, extension, gpus, network, packages
from vcrd.doctor.checks import Job, Options, run_checks, with_timeout
from vcrd.doctor.findings import Finding, merged, ok, problem, unchecked
from vcrd.doctor.link import check_link
from vcrd.doctor.processes import Gathering, Unreachable, World

# Before any process opens a CUDA context: the memory of a context would look like that of a foreign process.
_FIRST = gpus.CHECKS
_THEN = (*packages.CHECKS, *extension.CHECKS, *environment.CHECKS, *network.CHECKS)
_MOST_CLOCK_SKEW = 2.0  # seconds
_LINK_TIMEOUT = 120.0  # seconds for the whole check of the link, in addition to the measured time


class Examined(NamedTuple):
    """findings: for the table; empty except on rank 0. nodes: names of the nodes that took part."""

    findings: list[Finding]
    nodes: list[str]


def examine(options: Options, world: World) -> Examined:
    """Collective over the processes of `world`. Never waits forever. Raises Unreachable if this rank cannot take part,
    and nothing for what it finds.
    """
    job = Job(world, dict(os.environ), environment.link_settings(os.environ), options)
    if world.size == 1:
        findings = run_checks(job, *_FIRST, *_THEN)
        return Examined([*findings, *_link(job, None, {0: world.node})], [world.node])
    try:
        gathering = Gathering(world, options.timeout)
    except Unreachable as error:
        if world.rank:
            raise
        return _rank_0_alone(job, str(error))
    return _together(job, gathering)


def _rank_0_alone(job: Job, why: str) -> Examined:
    fix = "Set MASTER_PORT to a free port, and MASTER_ADDR to the address of the first node."
    findings = run_checks(job, *_FIRST, *_THEN)
    text = f"the other {job.world.size - 1} were not checked: {why}"
    return Examined([problem("processes", text, fix), *findings], [job.world.node])


def _together(job: Job, gathering: Gathering) -> Examined:
    # The time that all checks of one process may take. After it, rank 0 goes on without that process.
    timeout = job.options.timeout
    longest = timeout * 1.5
    came = gathering.gather({"node": job.world.node, "token": secrets.token_hex(8)})
    nodes = {rank: given["node"] for rank, given in came.items()}
    clocks = gathering.gather(time.time())
    first = run_checks(job, *_FIRST)
    gathering.gather(None, longest)
    then = run_checks(job, *_THEN)
    shared = environment.SharedFolder(job, came[0]["token"])
    try:
        wrote = gathering.gather(with_timeout(timeout, shared.write, False), longest)
        writers = {rank: nodes[rank] for rank, could in wrote.items() if could}
        missing = with_timeout(timeout, lambda: shared.missing(list(writers)), list(writers))
        gathering.gather(None, longest)
    finally:
        with_timeout(timeout, shared.remove, None)
    mine = [*first, *then, _clock(job, clocks), shared.finding(missing, writers)]
    gathered = gathering.gather([asdict(finding) for finding in mine], longest)
    linked = _link(job, gathering.gather, nodes)
    gathering.leave()
    if job.world.rank:
        return Examined([], [])
    found = {rank: [Finding(**values) for values in lines] for rank, lines in gathered.items()}
    lines = merged(found, {rank: nodes[rank] for rank in found})
    return Examined([*_present(job, nodes, found), *lines, *linked], list(dict.fromkeys(nodes.values())))


def _link(job: Job, gather: Callable[..., dict[int, Any]] | None, nodes: dict[int, str]) -> list[Finding]:
    """gather: collective; None for a single process."""
    if job.options.scenario is not None:
        job = replace(job, secret=with_timeout(job.options.timeout / 2, lambda: _secret(job), None))
    limit = job.options.seconds + _LINK_TIMEOUT
    late = [unchecked("link", f"its measurement did not end within {limit:g} seconds")]
    return with_timeout(limit, lambda: check_link(job, gather, nodes), late)


def _secret(job: Job) -> str:
    try:
        return job.link.shared_secret()
    except ValueError:  # `environment.secret` reports it
        return ""


def _clock(job: Job, clocks: dict[int, float]) -> Finding:
    """All processes read their clocks when the same gathering ends, within a fraction of a second."""
    ahead = clocks[job.world.rank] - clocks[0] if 0 in clocks else 0.0
    if abs(ahead) > _MOST_CLOCK_SKEW:
        text = f"{abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} that of rank 0"
        return problem("clock", text, "Start chrony or another NTP service on that node.")
    return ok("clock", f"within {_MOST_CLOCK_SKEW:g} seconds of that of rank 0")


def _present(job: Job, nodes: dict[int, str], found: dict[int, list[Finding]]) -> list[Finding]:
    """nodes: of the ranks that came. found: by the ranks that stayed until the end."""
    lines = []
    absent = [rank for rank in range(job.world.size) if rank not in nodes]
    lost = [rank for rank in nodes if rank not in found]
    if absent:
        silent = [node for node in job.world.expected if node not in nodes.values()]
        whole = f", no rank of {', '.join(silent)} came" if silent else ""
        lines.append(
            problem(
                "processes",
                f"{_ranks(absent)} did not come{whole}",
                "Check that the node is up (`sinfo -N -l`, `ping`) and reaches the port of rank 0, or leave it out.",
            )
        )
    if lost:
        lines.append(
            problem(
                "processes",
                f"{', '.join(f'rank {rank} on {nodes[rank]}' for rank in lost)} came, then ended or took too long",
                "Look at the output of that node, and run the doctor on it alone.",
            )
        )
    if not lines:
        count = len(set(nodes.values()))
        text = f"all {job.world.size} came, from {count} node{'' if count == 1 else 's'}"
        lines.append(ok("processes", text))
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(a) if a == b else f"{a} to {b}" for a, b in runs]
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(parts)}"
