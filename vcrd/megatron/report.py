"""What distillation did, as sums over tokens: sums can be added over micro-batches and ranks, averages cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss import CalibratedLoss

BINS = 40
_SUMS = ("tokens", "loss", "divergence", "cross_entropy", "weight", "student_more_valid", "agreement")


@dataclass(frozen=True)
class Figures:
    """Means over the tokens that counted, for a stretch of training; 0 everywhere when there were none.

    loss, divergence, cross_entropy: nats per token. weight: mean weight. student_more_valid: share of tokens
    with relative validity below 1/2. agreement: share of tokens where both models' most probable token is the
    same. validity_histogram: tokens by relative validity, BINS equal bins over [0, 1]. teacher_wait: seconds
    this rank stood still for answers. link_bytes: payload bytes that reached this rank. verifier_time: seconds that
    tensor rank 0 spent in the verifier, the same on each of its tensor ranks.
    """

    tokens: int
    loss: float
    divergence: float
    cross_entropy: float
    weight: float
    student_more_valid: float
    agreement: float
    validity_histogram: tuple[int, ...]
    teacher_wait: float
    link_bytes: int
    verifier_time: float = 0.0


class Report:
    """Running sums on the device of the losses: adding a micro-batch never waits for the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._wait = 0.0
        self._bytes = 0
        self._verifier_time = 0.0

    @torch.no_grad()
    def add(self, out: CalibratedLoss, mask: Tensor | None) -> None:
        """Adds one micro-batch; `mask` [s, b] or None, as given to the loss."""
        stats, rho = out.stats, out.relative_validity
        keep = torch.ones_like(rho, dtype=torch.bool) if mask is None else mask != 0
        rows = (
            torch.ones_like(rho),
            out.loss,
            stats.divergence,
            stats.cross_entropy,
            out.weight,
            rho < 0.5,
            stats.student_action == stats.teacher_action,
        )
        counted = torch.where(keep, torch.stack([row.float() for row in rows]), 0.0)
        bins = torch.zeros(BINS, dtype=torch.float64, device=rho.device)
        slots = (rho * BINS).long().clamp(0, BINS - 1)
        bins.index_add_(0, slots.flatten(), keep.flatten().double())
        sums = torch.cat([counted.flatten(1).sum(1, dtype=torch.float64), bins])
        self._sums = sums if self._sums is None else self._sums + sums

    def add_link(self, wait: float, received: int) -> None:
        """Adds seconds of waiting for the teacher and payload bytes received."""
        self._wait += wait
        self._bytes += received

    def add_verifier(self, seconds: float) -> None:
        """Adds seconds in the verifier."""
        self._verifier_time += seconds

    def take(self, group: dist.ProcessGroup | None = None) -> Figures:
        """Figures since the last call, and starts anew. Waits for the device.

        group: ranks whose tokens are added, for example the data-parallel group: one all-reduce, on every one
        of its ranks. Without it, the tokens of this rank. Only ranks of the last pipeline stage have any.
        """
        size = len(_SUMS) + BINS
        sums = torch.zeros(size, dtype=torch.float64) if self._sums is None else self._sums
        if group is not None:
            if "nccl" in dist.get_backend(group):
                sums = sums.to(torch.device("cuda", torch.cuda.current_device()))
            dist.all_reduce(sums, group=group)
        values = sums.tolist()
        wait, received, verifier_time = self._wait, self._bytes, self._verifier_time
        self._sums, self._wait, self._bytes, self._verifier_time = None, 0.0, 0, 0.0
        tokens = values[0]
        means = {name: value / max(tokens, 1.0) for name, value in zip(_SUMS, values, strict=False)}
        return Figures(
            **{**means, "tokens": int(tokens)},
            validity_histogram=tuple(int(value) for value in values[len(_SUMS) :]),
            teacher_wait=wait,
            link_bytes=received,
            verifier_time=verifier_time,
        )
