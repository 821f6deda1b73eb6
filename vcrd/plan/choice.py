"""Which payload is the best for a run. The rule:

1. It needs at most a tenth of the student GPU's memory, and keeps the network of no rank busy for more than half of
   the time. A condition that no payload meets is passed over.
2. Of these, the one with the shortest step, after a handicap for its error: 8 bits count 5 % longer than they are,
   top-k 25 %. Hidden states, float32 and float16 have none; float16 errs 200 times less than the bfloat16 in which
   most teachers compute their logits.
3. Of those within half a percent of it, the one that costs the student the least time, then the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vcrd.plan.costs import Cost

MEMORY_SHARE = 0.1
NETWORK_SHARE = 0.5
HANDICAPS = {"logits_8bit": 1.05, "topk": 1.25}
_EQUAL = 1.005


class Choice(NamedTuple):
    """payload: the best. reason: why, as the rest of a sentence. against: why not, by payload, for all others."""

    payload: str
    reason: str
    against: dict[str, str]


def choose(costs: Sequence[Cost], student_memory: float) -> Choice:
    """student_memory: bytes of a student GPU."""
    left, against = list(costs), {}

    def keep(meets: Callable[[Cost], bool], reason: Callable[[Cost], str]) -> None:
        nonlocal left
        if any(meets(cost) for cost in left):
            against.update({cost.payload: reason(cost) for cost in left if not meets(cost)})
            left = [cost for cost in left if meets(cost)]

    keep(
        lambda c: c.student_gpu_bytes <= MEMORY_SHARE * student_memory,
        lambda c: f"takes {percent(c.student_gpu_bytes / student_memory)} of a student GPU's memory",
    )
    keep(
        lambda c: c.network_share <= NETWORK_SHARE,
        lambda c: f"keeps the network busy {percent(c.network_share)} of the time",
    )
    least = min(map(handicapped, left))
    equal = [cost for cost in left if handicapped(cost) <= _EQUAL * least]
    best = min(equal, key=lambda cost: (cost.student_seconds, cost.received))
    against.update({cost.payload: _behind(cost, best) for cost in left if cost is not best})
    reason = (
        f"network busy {percent(best.network_share)} of the time, "
        f"{percent(best.loss_share)} more student compute, error {best.error}"
    )
    return Choice(best.payload, reason, against)


def handicapped(cost: Cost) -> float:
    """Seconds of a step, with what the error counts for."""
    return cost.step_seconds * HANDICAPS.get(cost.payload, 1.0)


def _behind(cost: Cost, best: Cost) -> str:
    longer = cost.step_seconds / best.step_seconds - 1
    if longer >= 0.0005:
        return f"makes a step {percent(longer)} longer"
    if cost.payload in HANDICAPS and longer <= -0.0005:
        return f"makes a step {percent(-longer)} shorter, too little for its error, {cost.error}"
    if cost.payload in HANDICAPS:
        return f"makes no step shorter for its error, {cost.error}"
    return f"costs the student more: {percent(cost.loss_share)} of its compute"


def percent(share: float) -> str:
    """Two digits below 10 %, so that small shares can be told apart."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"
