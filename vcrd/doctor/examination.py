"""All checks in their order, on one process or on many together, none of them longer than it may take."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from vcrd.doctor import device, environment, files, kernels, network, packages, software
from vcrd.doctor.findings import Finding, fault, ok, unchecked
from vcrd.doctor.gathering import Gathering, Unreachable
from vcrd.doctor.job import Job
from vcrd.doctor.linked import try_link
from vcrd.doctor.merge import merged
from vcrd.doctor.options import Asked
from vcrd.doctor.world import World

# Before any process opens a CUDA context, which another one would take for a stranger's.
_FIRST = (device.check,)
_THEN = (
    *(*software.CHECKS, *packages.CHECKS, kernels.check, *environment.CHECKS, *network.CHECKS),
    *(files.check, files.telemetry),
)
_MOST_SKEW = 2.0  # seconds
_LEAST = 2.0  # seconds that a check has, whatever those before it have taken
_LINK = 120.0  # seconds for the whole measurement of the link, beside what is asked for


class Outcome(NamedTuple):
    """findings: for the table, on rank 0. nodes: that have answered. excuse: why this process could not take part."""

    findings: list[Finding]
    nodes: list[str]
    excuse: str = ""


def examine(asked: Asked, world: World) -> Outcome:
    """Collective over the processes of `world`. Never raises for what it finds, and never waits for ever."""
    job = Job(
        world=world,
        environment=dict(os.environ),
        link=environment.link_settings(os.environ),
        run_dir=asked.run_dir,
        ports=asked.ports,
        gpus=asked.gpus,
        scenario=asked.scenario,
        models_known=asked.models_known,
        seconds=asked.seconds,
        patience=asked.timeout,
        during_run=asked.during_run,
    )
    if world.size == 1:
        return Outcome([*looked(job, *_FIRST, *_THEN), *_linked(job, None, {0: world.node})], [world.node])
    try:
        gathering = Gathering(world, asked.timeout)
    except Unreachable as error:
        if world.rank:
            return Outcome([], [], str(error))
        return _without_others(job, asked, str(error))
    try:
        return _together(job, asked, gathering)
    except Unreachable as error:
        return Outcome([], [], str(error))


def looked(job: Job, *checks: Callable[[Job], list[Finding]]) -> list[Finding]:
    """What they find, none of them longer than `job.patience`, and all of them half as long again."""
    deadline = time.monotonic() + 1.5 * job.patience
    found: list[Finding] = []
    for check in checks:
        left = max(_LEAST, deadline - time.monotonic())
        found += limited(check, job, min(job.patience, left))
    return found


def limited(check: Callable[[Job], list[Finding]], job: Job, seconds: float) -> list[Finding]:
    """A check's findings; a line of its own where it takes longer, or fails itself."""
    name = check.__module__.rpartition(".")[2] if check.__name__ == "check" else check.__name__
    name = name.replace("_", " ")
    try:
        found = within(seconds, lambda: check(job), None)
    except Exception as error:  # the table must come out whatever a machine has in store
        fix = "Please report this with the output of `python -m vcrd doctor --json`."
        return [fault("check", f"{name}: the check itself failed: {error!r:.200}", fix)]
    if found is None:
        fix = "Look at that node: a hanging file system, driver or GPU is the usual cause; --timeout gives it longer."
        return [fault("check", f"{name}: no answer within {seconds:.3g} seconds", fix)]
    return found


def within(seconds: float, call: Callable[[], Any], otherwise: Any) -> Any:
    """What the call gives or raises; `otherwise` where it takes longer, and it is left to itself then."""
    results: list[tuple[Any, Exception | None]] = []

    def run() -> None:
        try:
            results.append((call(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=run, name="vcrd-doctor-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        return otherwise
    value, error = results[0]
    if error is not None:
        raise error
    return value


def _linked(job: Job, gathering: Gathering | None, nodes: dict[int, str]) -> list[Finding]:
    if job.scenario is not None:
        job = replace(job, secret=within(job.patience / 2, lambda: _secret(job), None))
    late = [unchecked("link", f"its measurement did not end within {job.seconds + _LINK:g} seconds")]
    return within(job.seconds + _LINK, lambda: try_link(job, gathering, nodes), late)


def _secret(job: Job) -> str:
    try:
        return job.link.shared_secret()
    except ValueError:  # `environment` has a line for it
        return ""


def _without_others(job: Job, asked: Asked, why: str) -> Outcome:
    fix = "Choose a free port in MASTER_PORT, and in MASTER_ADDR the address of the first node."
    alone = looked(job, *_FIRST, *_THEN)
    line = fault("processes", f"the other {job.world.size - 1} could not be asked: {why}", fix)
    return Outcome([line, *alone], [job.world.node])


def _together(job: Job, asked: Asked, gathering: Gathering) -> Outcome:
    # The time that all checks of one process may take, after which rank 0 goes on without it.
    longest, patience = asked.timeout * 1.5, asked.timeout
    came = gathering.gather({"node": job.world.node, "token": secrets.token_hex(8)})
    nodes = {rank: given["node"] for rank, given in came.items()}
    clocks = gathering.gather(time.time())
    first = looked(job, *_FIRST)
    gathering.gather(None, longest)
    then = looked(job, *_THEN)
    shared = files.Shared(job, came[0]["token"])
    try:
        wrote = gathering.gather(within(patience, shared.write, False), longest)
        writers = {rank: nodes[rank] for rank, could in wrote.items() if could}
        missing = within(patience, lambda: shared.look(list(writers)), list(writers))
        gathering.gather(None, longest)
    finally:
        within(patience, shared.remove, None)
    mine = [*first, *then, _clock(job, clocks), shared.finding(job, missing, writers)]
    gathered = gathering.gather([asdict(finding) for finding in mine], longest)
    linked = _linked(job, gathering, nodes)
    gathering.leave()
    if job.world.rank:
        return Outcome([], [])
    found = {rank: [Finding(**values) for values in lines] for rank, lines in gathered.items()}
    lines = merged(found, {rank: nodes[rank] for rank in found})
    return Outcome([*_absent(job, nodes, found), *lines, *linked], list(dict.fromkeys(nodes.values())))


def _clock(job: Job, clocks: dict[int, float]) -> Finding:
    """All look at their clocks when the same gathering ends, to within a fraction of a second."""
    ahead = clocks[job.world.rank] - clocks[0] if 0 in clocks else 0.0
    if abs(ahead) > _MOST_SKEW:
        text = f"{abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} rank 0's"
        return fault("clock", text, "Start chrony or another NTP service on that node.")
    return ok("clock", f"within {_MOST_SKEW:g} seconds of rank 0's")


def _absent(job: Job, nodes: dict[int, str], found: dict[int, list[Finding]]) -> list[Finding]:
    lines = []
    never = [rank for rank in range(job.world.size) if rank not in nodes]
    lost = [rank for rank in nodes if rank not in found]
    if never:
        silent = [node for node in job.world.expected if node not in nodes.values()]
        who = f", {', '.join(silent)} with all of its own" if silent else ""
        lines.append(
            fault(
                "processes",
                f"{_ranks(never)} did not come{who}",
                "Look whether that node is up (`sinfo -N -l`, `ping`) and reaches rank 0's port, or leave it out.",
            )
        )
    if lost:
        lines.append(
            fault(
                "processes",
                f"{', '.join(f'rank {rank} on {nodes[rank]}' for rank in lost)} came and was lost, or took too long",
                "Look at that node's own output, and run the doctor there alone.",
            )
        )
    if not lines:
        count = len(set(nodes.values()))
        lines.append(
            ok("processes", f"all {job.world.size} came, from {count} node{'' if count == 1 else 's'}")
        )
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
