"""Which tokens count: the loss mask of a script that gives it to the model, and of one that keeps it to itself."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from vcrd.megatron.external_validity import MASK_KEY, STEPS_KEY, Outside
from vcrd.megatron.layout import Layout
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")
_REMEDY = (
    f"give the model the loss_mask that loss_func uses, or put it into the micro-batches as {MASK_KEY!r} "
    "(ones where every token counts)"
)


class LossMask:
    """On ranks of the last stage: `of` finds the loss mask of each micro-batch. The first micro-batch says where it is.

    In this order: what the model is given as `loss_mask`; `loss_mask` in the micro-batch, as the data iterator yields
    it; labels below 0 (-100), which mark tokens that do not count. Where none of them is found, a warning says so and
    every token counts in the figures; reasoning steps and the normalization "mean", whose gradient depends on the mask,
    are refused.

    Whether the micro-batches carry reasoning steps is agreed on with the same collectives.
    """

    def __init__(self, settings: DistillSettings, outside: Outside) -> None:
        self._outside = outside
        self._needed_by = ["normalization 'mean'"] if settings.normalization == "mean" else []
        self._in_model: bool | None = None  # whether the model is given it; None before the first micro-batch
        outside.looks_for_mask = True

    def of(self, layout: Layout, labels: Tensor, given: Tensor | None) -> Tensor | None:
        """The mask [b, s] of labels [b, s], not 0 where a token counts; None where `Outside` brings it.

        given: the model's own argument. Collectives, with the first micro-batch alone: one all-reduce of 5 int32 over
        the tensor-parallel ranks, and one over the data- and context-parallel ranks.

        ValueError for another shape, and where the model got one before and gets none now. On every rank of the last
        stage alike, where some ranks have a mask and others have none, and where the settings need one and none is
        found.
        """
        if self._in_model is None:
            self._find(layout, labels, given)
        if given is not None:
            if given.shape != labels.shape:
                raise ValueError(
                    f"loss_mask: expected the labels' shape {list(labels.shape)}, got {list(given.shape)}"
                )
            return given
        if self._in_model:
            raise ValueError("loss_mask: expected one with every micro-batch, as with the first, got None")
        return None if MASK_KEY in self._outside.keys else labels >= 0

    def _find(self, layout: Layout, labels: Tensor, given: Tensor | None) -> None:
        # Only tensor rank 0 sees the micro-batch.
        lacking = (
            self._outside.why_no_mask(labels.shape) if layout.tensor_rank == 0 else "it is on another rank"
        )
        steps_here = layout.tensor_rank == 0 and self._outside.has_steps()
        found = [given is not None, given is None, not lacking, bool((labels < 0).any()), steps_here]
        found = _any(found, layout.tensor_group, layout.device)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        in_batch_here, steps_here = found[2], found[4]
        # Everywhere alike is what must hold of the micro-batches; of the labels it need not.
        found = _any([*found, not in_batch_here, not steps_here], group, layout.device)
        in_model, not_in_model, in_batch, by_labels, steps, not_in_batch, no_steps = found
        if in_model and not_in_model:
            raise ValueError("loss_mask: expected one on every rank or on none, got one on some")
        if not in_model and in_batch and not_in_batch:
            raise ValueError(
                f"{MASK_KEY}: expected one in the micro-batches of every data-parallel rank or of none, got one on some"
            )
        if steps and no_steps:
            raise ValueError(
                f"{STEPS_KEY}: expected in the micro-batches of every data-parallel rank or of none, got them on some"
            )
        self._in_model = in_model
        if steps:
            self._needed_by.append("steps")
            self._outside.take_steps()
        if in_batch and not in_model:
            self._outside.take_mask()
        self._outside.looks_for_mask = False
        if in_model or in_batch or by_labels:
            return
        if self._needed_by:
            raise ValueError(
                f"loss_mask: expected one for {' and '.join(self._needed_by)}, by which a token's weight depends on "
                f"which others count, got none as the model's argument, none in the micro-batch and no label below 0; "
                f"{_REMEDY}"
            )
        if layout.asks and layout.data_rank == 0:
            _log.warning(
                "loss_mask: the model is given none, the micro-batch has none (%s) and no label is below 0: every "
                "token counts in vcrd's figures, and reasoning steps and the normalization 'mean' are refused; %s",
                lacking,
                _REMEDY,
            )


def _any(flags: list[bool], group: dist.ProcessGroup | None, device: torch.device) -> list[bool]:
    """Of each flag whether a rank of the group has it."""
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    if group is not None and group.size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return [bool(value) for value in found.tolist()]
