"""Which tokens count: finds the loss mask of a script that gives it to the model, and of one that does not."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected
from vcrd.megatron.external_validity import MASK_KEY, STEPS_KEY, ExternalValidity
from vcrd.megatron.layout import Layout
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")
_REMEDY = (
    f"give the model the loss_mask that loss_func uses, or put it into the micro-batches as {MASK_KEY!r} "
    "(ones where every token counts)"
)


class LossMask:
    """On ranks of the last stage: `of` finds the loss mask of each micro-batch. The first one decides where it is.

    Places, in this order: the model's argument `loss_mask`; `loss_mask` in the micro-batch that the data iterator
    yields; labels below 0 (-100), which mark tokens that do not count. If there is no mask at all, a warning says so
    and every token counts in the figures; reasoning steps, the weighting "gap" and the normalizations, whose gradient
    depends on the mask, are refused.

    The ranks agree with the same collectives on whether the micro-batches have reasoning steps.
    """

    def __init__(self, settings: DistillSettings, external: ExternalValidity) -> None:
        self._external = external
        name = settings.pooled
        self._needed_by = [] if name is None else [f"{name} {getattr(settings, name)!r}"]
        # Whether it is the model's argument; None before the first micro-batch.
        self._in_model: bool | None = None
        external.looks_for_mask = True

    def of(self, layout: Layout, labels: Tensor, given: Tensor | None) -> Tensor | None:
        """The mask [b, s] of labels [b, s], not 0 where a token counts; None if `ExternalValidity` will return it.

        given: the model's own argument. Collectives, with the first micro-batch only: one all-reduce of 5 int32 over
        the tensor-parallel ranks, and one of 7 over the data- and context-parallel ranks.

        ValueError for another shape, and if the model had a mask before and has none now. On every rank of the last
        stage alike, if some ranks have a mask and others have none, and if the settings need one and there is none.
        """
        if self._in_model is None:
            self._find(layout, labels, given)
        if given is not None:
            if given.shape != labels.shape:
                raise expected("loss_mask", f"the labels' shape {list(labels.shape)}", list(given.shape))
            return given
        if self._in_model:
            raise expected("loss_mask", "one with every micro-batch, as with the first", "None")
        return None if MASK_KEY in self._external.keys else labels >= 0

    def _find(self, layout: Layout, labels: Tensor, given: Tensor | None) -> None:
        # Only tensor rank 0 sees the micro-batch.
        lacking = (
            self._external.why_no_mask(labels.shape) if layout.tensor_rank == 0 else "it is on another rank"
        )
        steps_here = layout.tensor_rank == 0 and self._external.has_steps()
        found = [given is not None, given is None, not lacking, bool((labels < 0).any()), steps_here]
        found = _any(found, layout.tensor_group, layout.device)
        group = layout.groups.data_context
        in_batch_here, steps_here = found[2], found[4]
        # All data-parallel ranks must have masks, or none, and so with steps. Labels below 0 may be on some ranks only.
        found = _any([*found, not in_batch_here, not steps_here], group, layout.device)
        in_model, not_in_model, in_batch, by_labels, steps, not_in_batch, no_steps = found
        if in_model and not_in_model:
            raise expected("loss_mask", "one on every rank or on none", "one on some")
        if not in_model and in_batch and not_in_batch:
            raise expected(
                MASK_KEY, "one in the micro-batches of every data-parallel rank or of none", "one on some"
            )
        if steps and no_steps:
            raise expected(
                STEPS_KEY, "in the micro-batches of every data-parallel rank or of none", "them on some"
            )
        self._in_model = in_model
        if steps:
            self._needed_by.append("steps")
            self._external.take_steps()
        if in_batch and not in_model:
            self._external.take_mask()
        self._external.looks_for_mask = False
        if in_model or in_batch or by_labels:
            return
        if self._needed_by:
            raise expected(
                "loss_mask",
                f"one for {' and '.join(self._needed_by)}, by which a token's weight depends on which others count",
                f"none as the model's argument, none in the micro-batch and no label below 0; {_REMEDY}",
            )
        if layout.asks and layout.data_rank == 0:
            _log.warning(
                "loss_mask: the model is given none, the micro-batch has none (%s) and no label is below 0: every "
                "token counts in vcrd's figures, and reasoning steps, the weighting 'gap' and normalizations are "
                "refused; %s",
                lacking,
                _REMEDY,
            )


def _any(flags: list[bool], group: dist.ProcessGroup | None, device: torch.device) -> list[bool]:
    """For each flag: whether it is true on any rank of the group."""
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    if group is not None and group.size() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return [bool(value) for value in found.tolist()]
