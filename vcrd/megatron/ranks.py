"""What each rank of the student's world adds to an interval's figures: gathered once, from all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from vcrd.monitor.bottleneck import Wait
from vcrd.monitor.telemetry import FIELDS

_SHOWN = 64  # ranks that TensorBoard and W&B get a curve each of


class Row(NamedTuple):
    """What one rank measured in one interval. waited, arriving, while_lost: seconds, as `Waits` says. received: bytes.
    replica: the teacher replica that serves this rank, NaN where none does. What follows are
    `vcrd.monitor.telemetry.FIELDS`, NaN where not measured.
    """

    waited: float
    arriving: float
    while_lost: float
    answers: float
    late: float
    received: float
    replica: float
    replicas: float
    gpu_memory_bytes: float = math.nan
    gpu_utilization: float = math.nan
    gpu_power_watts: float = math.nan
    nvlink_sent_bytes_per_second: float = math.nan
    nvlink_received_bytes_per_second: float = math.nan
    host_memory_bytes: float = math.nan


def gathered(row: Row) -> list[Row]:
    """Every rank's, in rank order: one all-gather of 14 float64 over the world, and one wait for the device."""
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return [Row(*values) for values in torch.stack(rows).tolist()]


def by_replica(rows: Sequence[Row], seconds: float) -> list[Wait]:
    """Of each teacher replica the rank that waited longest for it, in an interval of that many seconds."""
    worst: dict[int, Row] = {}
    for row in rows:
        if not math.isnan(row.replica):
            other = worst.setdefault(int(row.replica), row)
            worst[int(row.replica)] = max(row, other, key=lambda each: each.waited)
    return [
        Wait(
            replica=replica,
            share=min(1.0, row.waited / seconds),
            arriving=row.arriving / row.waited if row.waited else 0.0,
            while_lost=row.while_lost / row.waited if row.waited else 0.0,
            late=row.late / row.answers if row.answers else 0.0,
            bytes_per_second=row.received / seconds,
        )
        for replica, row in sorted(worst.items())
    ]


def over_ranks(rows: Sequence[Row]) -> dict[str, float]:
    """Of each measured field its least, mean and largest over ranks; of few ranks also each one's."""
    found = {}
    for field in FIELDS:
        values = {n: getattr(row, field) for n, row in enumerate(rows) if not math.isnan(getattr(row, field))}
        if not values:
            continue
        found[f"{field}_min"] = min(values.values())
        found[f"{field}_mean"] = sum(values.values()) / len(values)
        found[f"{field}_max"] = max(values.values())
        if len(rows) <= _SHOWN:
            found.update({f"{field}/rank_{number}": value for number, value in values.items()})
    return found
