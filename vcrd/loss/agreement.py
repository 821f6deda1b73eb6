"""Facts that may differ from rank to rank, agreed once, before the first collective that relies on them.

Were each rank to check only its own arguments, one would raise while the others wait for it in a collective. So the
ranks of a group exchange their facts, or the sentence of the one that refuses its arguments, through the group's
key-value store: no collective, no device synchronisation, and nothing at all on later calls with the same facts.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

Facts = dict[str, "int | float | str | bool | list[int] | None"]


Conclusion = TypeVar("Conclusion")


@dataclass
class _GroupLedger:
    """What one group has agreed on. `rounds` is equal on every rank, because all ranks make the same calls."""

    rounds: int = 0
    conclusions: dict[str, Any] = field(default_factory=dict)


# Keyed weakly: a destroyed group takes its agreements with it.
_LEDGERS: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupLedger] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def agree(
    group: dist.ProcessGroup, facts: Facts, conclude: Callable[[list[Facts]], Conclusion]
) -> Conclusion:
    """What `conclude` makes of the facts of every rank of `group`, in rank order.

    `conclude` sees the same list on every rank, so where it raises it raises on all of them. A conclusion is kept for
    later calls with the same facts; an error is not.

    Collectives: none. The first call with new facts waits for the other ranks through the group's store.

    Raises what `conclude` raises; ValueError where another rank refused its own arguments; RuntimeError where one does
    not arrive in time.
    """
    ledger = _LEDGERS.setdefault(group, _GroupLedger())
    signature = json.dumps(facts, sort_keys=True)
    if signature not in ledger.conclusions:
        ledger.conclusions[signature] = conclude(_exchange(group, ledger, {"facts": facts}))
    return ledger.conclusions[signature]


@torch.compiler.disable
def refuse(group: dist.ProcessGroup, error: Exception) -> None:
    """Tells the other ranks, should they be agreeing now, that this one is about to raise. Waits for nobody."""
    ledger = _LEDGERS.setdefault(group, _GroupLedger())
    _publish(group, ledger, {"refusal": f"{error}"})


def _publish(group: dist.ProcessGroup, ledger: _GroupLedger, message: dict) -> str:
    prefix = f"vcrd/agreement/{ledger.rounds}"
    ledger.rounds += 1
    _get_process_group_store(group).set(f"{prefix}/{dist.get_rank(group)}", json.dumps(message))
    return prefix


def _exchange(group: dist.ProcessGroup, ledger: _GroupLedger, message: dict) -> list[Facts]:
    prefix = _publish(group, ledger, message)
    store = _get_process_group_store(group)
    messages = []
    for rank in range(dist.get_world_size(group)):
        try:
            messages.append(json.loads(store.get(f"{prefix}/{rank}")))
        except dist.DistError as error:
            raise RuntimeError(
                f"group: rank {rank} did not call the loss with new shapes as this rank did, within "
                f"{store.timeout.total_seconds():.0f} s; every rank must make the same calls"
            ) from error
    for rank, other in enumerate(messages):
        if "refusal" in other:
            raise ValueError(f"rank {rank} of the group refused its arguments: {other['refusal']}")
    return [other["facts"] for other in messages]
