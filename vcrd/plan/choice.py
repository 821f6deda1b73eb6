"""Chooses the best payload for a run, by this rule:

1. The payload needs at most a tenth of the memory of the student GPU, and keeps the network of every rank busy for at
   most half of the time. A condition that no payload meets is ignored.
2. Of these payloads, the one with the shortest step wins. The step counts 5 % longer for 8 bits and 25 % longer for
   top-k because of their error. Hidden states, float32 and float16 have no penalty: the error of float16 is 200 times
   smaller than that of bfloat16, in which most teachers compute their logits.
3. Of the payloads within half a percent of it, the one that costs the student the least time wins, then the one with
   the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vcrd.plan.costs import Cost

MEMORY_SHARE = 0.1
NETWORK_SHARE = 0.5
ERROR_PENALTIES = {"logits_8bit": 1.05, "topk": 1.25}
_EQUAL = 1.005  # ratio of steps that count as equal


class Choice(NamedTuple):
    """payload: the best one. reason: why it is. against: why each other payload is not."""

    payload: str
    reason: str
    against: dict[str, str]


def choose(costs: Sequence[Cost], student_memory: float) -> Choice:
    """student_memory: bytes of a student GPU."""
    left, against = list(costs), {}

    def keep(is_met: Callable[[Cost], bool], reason: Callable[[Cost], str]) -> None:
        nonlocal left
        if any(is_met(cost) for cost in left):
            against.update({cost.payload: reason(cost) for cost in left if not is_met(cost)})
            left = [cost for cost in left if is_met(cost)]

    keep(
        lambda c: c.student_gpu_bytes <= MEMORY_SHARE * student_memory,
        lambda c: f"takes {percent(c.student_gpu_bytes / student_memory)} of the memory of a student GPU",
    )
    keep(
        lambda c: c.network_share <= NETWORK_SHARE,
        lambda c: f"keeps the network busy {percent(c.network_share)} of the time",
    )
    least = min(map(penalised, left))
    equal = [cost for cost in left if penalised(cost) <= _EQUAL * least]
    best = min(equal, key=lambda cost: (cost.student_seconds, cost.received))
    against.update({cost.payload: _behind(cost, best) for cost in left if cost is not best})
    reason = (
        f"network busy {percent(best.network_share)} of the time, "
        f"{percent(best.loss_share)} more student compute, error {best.error}"
    )
    return Choice(best.payload, reason, against)


def penalised(cost: Cost) -> float:
    """Seconds of a step, with the penalty for the error."""
    return cost.step_seconds * ERROR_PENALTIES.get(cost.payload, 1.0)


def _behind(cost: Cost, best: Cost) -> str:
    longer = cost.step_seconds / best.step_seconds - 1
    if longer >= 0.0005:
        return f"makes a step {percent(longer)} longer"
    if cost.payload in ERROR_PENALTIES and longer <= -0.0005:
        return f"makes a step {percent(-longer)} shorter, too little for its error ({cost.error})"
    if cost.payload in ERROR_PENALTIES:
        return f"has an error ({cost.error}) and makes the step no shorter"
    return f"costs the student more: {percent(cost.loss_share)} of its compute"


def percent(share: float) -> str:
    """Two digits below 10 %, so that small shares remain distinguishable."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"
