"""The end of each training step, on every rank: after the gradients are final, before the optimizer runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class StepEnd:
    """Calls `run()` after Megatron's own `finalize_model_grads_func`, which its schedules call at the end of a step.

    first: called before it, where each rank still has the gradients of its own micro-batches.
    """

    def __init__(self, run: Callable[[], None], first: Callable[[], None] = lambda: None) -> None:
        self._run, self._first = run, first
        self._watched: list[tuple[Any, Any, Any]] = []  # configuration, its function before, and since

    def watch(self, config: Any) -> None:
        """Once per configuration; chunks of an interleaved pipeline may have one each, and Megatron reads the first."""
        if any(seen is config for seen, _, _ in self._watched):
            return
        before = config.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            self._first()
            if before is not None:
                before(*args, **kwargs)
            self._run()

        self._watched.append((config, before, finalize))
        config.finalize_model_grads_func = finalize

    def undo(self) -> None:
        """Leaves the configurations as they were found, where nobody else has changed them since."""
        for config, before, finalize in self._watched:
            if config.finalize_model_grads_func is finalize:
                config.finalize_model_grads_func = before
        self._watched.clear()


def raise_if_invalid(counts: list[Tensor], data_rank: int) -> None:
    """RuntimeError on every rank of the world if any rank's teacher had invalid rows in this step.

    counts: tokens with a bad teacher in each micro-batch of the step, scalars on the device; empty where they are
    counted by another rank. One all-gather of 3 int64 over the world, and one wait for the device.
    """
    found = [int(count) for count in torch.stack(counts).tolist()] if counts else []
    first = next((number for number, count in enumerate(found) if count), -1)
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    mine = torch.tensor([sum(found), first, data_rank], dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    rows = [row.tolist() for row in rows]
    bad = sorted((number, rank) for count, number, rank in rows if count)
    if bad:
        number, rank = bad[0]
        raise RuntimeError(
            f"invalid_rows: expected a teacher of finite logits, got {sum(row[0] for row in rows)} tokens in this step "
            f"with a NaN, a +inf or nothing above -inf, the first in micro-batch {number} on data rank {rank}; "
            "the step is not applied (invalid_rows='skip' skips and counts such tokens)"
        )
