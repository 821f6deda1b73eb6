"""The line about the link: what `bandwidth` measured beside what the payload needs, and where no link stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vcrd.doctor.bandwidth import Pair
from vcrd.doctor.findings import Finding, fact, fault, ok
from vcrd.doctor.job import Job
from vcrd.doctor.network import nccl_version
from vcrd.link.payload import PAYLOADS, payload_named
from vcrd.plan.choice import choose
from vcrd.plan.costs import cost, student_seconds

_NETWORK = "Open all TCP ports between these nodes, or name in VCRD_INTERFACE the interface that leads there."


def unreached(pairs: Mapping[tuple[int, int], str], name_of: Mapping[int, str]) -> list[Finding]:
    """pairs: sender and receiver, and why the one does not reach the other."""
    found = []
    for reason in dict.fromkeys(pairs.values()):
        who = [pair for pair, why in pairs.items() if why == reason]
        sender, receiver = who[0]
        more = f" (nor do {len(who) - 1} other pairs)" if len(who) > 1 else ""
        text = f"{name_of[sender]} does not reach {name_of[receiver]}{more}: {reason}"
        found.append(fault("link", text, _NETWORK))
    return found


def _uses_nccl(job: Job) -> bool:
    """Whether the run will use NCCL, as far as can be seen from this process."""
    if job.link.transport == "auto":
        return bool(nccl_version()[0])
    return job.link.transport == "nccl"


def measured(
    job: Job, pairs: Sequence[Pair], rates: Mapping[tuple[int, int], float], name_of: Mapping[int, str]
) -> Finding:
    """rates: bytes per second of each pair, all at once."""
    slowest = min(pairs, key=lambda pair: rates.get((pair.sender, pair.receiver), 0.0))
    least = rates.get((slowest.sender, slowest.receiver), 0.0)
    who = f"from {name_of[slowest.sender]} to {name_of[slowest.receiver]}"
    if not least:
        return fault("link", f"nothing arrived in {job.seconds:g} seconds {who}", _NETWORK)
    total = sum(rates.values())
    if len(pairs) == 1:
        text = f"{least / 1e9:.3g} GB/s {who}"
    else:
        text = f"{least / 1e9:.3g} GB/s {who}, the slowest of {len(pairs)} pairs at once"
        text += f"; {total / 1e9:.3g} GB/s together"
    if _uses_nccl(job):
        text += " (over TCP; NCCL, which the run uses, was not measured)"
    if not job.models_known:
        return ok("link", f"{text}; give both models, as to `plan`, to know whether that is enough")
    return _judged(job, pairs, rates, text)


def _judged(job: Job, pairs: Sequence[Pair], rates: Mapping[tuple[int, int], float], text: str) -> Finding:
    run, payload = job.scenario, payload_named(job.link.payload)
    seconds = max(pair.bytes / rates[pair.sender, pair.receiver] for pair in pairs)
    compute = student_seconds(run)
    text += f"; a micro-batch as {payload.name} takes {seconds:.3g} s on it, the student's compute {compute:.3g} s"
    if seconds <= compute or _uses_nccl(job):
        return ok("link", text)
    # The speed of one rank's network at which the plan would have arrived at these seconds.
    alone = cost(replace(run, network=1.0), payload).network_seconds
    planned = [cost(replace(run, network=alone / seconds), each) for each in PAYLOADS]
    best = choose(planned, run.student_gpu.memory).payload
    if best != payload.name:
        return fault(
            "link",
            f"{text}, so the student waits",
            f"Set VCRD_PAYLOAD={best} in both jobs, or use a faster network.",
        )
    return fault(
        "link", f"{text}, so the student waits", "Use a faster network, since no payload is better here."
    )


def loopback(job: Job, pair: Pair, rate: float) -> Finding:
    text = f"{rate / 1e9:.3g} GB/s over this node's own TCP; the network was not measured, for the doctor runs alone"
    return fact("link", text)
