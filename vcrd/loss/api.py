"""The loss: divergence times weight, plus cross-entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from vcrd.loss.divergence import DivergenceStats, measure
from vcrd.loss.invalid_rows import invalid_rows
from vcrd.loss.validity import Estimator, validity_weights, weighted
from vcrd.teacher_logits import HiddenStates, TopKLogits


class CalibratedLoss(NamedTuple):
    """Per-token results, each [...] float32, equal on every rank of the group; nothing is reduced over tokens."""

    loss: Tensor  # differentiable
    weight: Tensor  # detached
    relative_validity: Tensor  # rho in [0, 1], detached; above 1/2 the teacher is the more valid
    stats: DivergenceStats


def validity_calibrated_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | TopKLogits | HiddenStates,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.1,
    beta: float = 0.5,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    inplace_gradient: bool | str = False,
    teacher_max: Tensor | None = None,
    skip_invalid_teacher: bool = False,
    validity: str | Estimator = "label",
    sharpness: float = 4.0,
    floor: float = 0.1,
    ceiling: float = 1.9,
    steps: Tensor | None = None,
    steps_group: dist.ProcessGroup | None = None,
    student_validity: Tensor | None = None,
    teacher_validity: Tensor | None = None,
    normalization: str = "none",
    normalization_group: dist.ProcessGroup | None = None,
    ce_weight: float = 0.0,
) -> CalibratedLoss:
    """loss = weight * divergence + ce_weight * cross_entropy, per token.

    The weight comes from the relative validity of the two models' proposals, is detached, and sets the strength of the
    update at each prefix; its direction stays the teacher's. Formula: `vcrd.loss.validity`. Arguments, shapes,
    collectives and errors: `vocab_parallel_divergence` (up to `skip_invalid_teacher`) and `validity_weights` (from
    `validity` on).

    Args:
        labels: needed by validity "label" and by a `ce_weight`.
        ce_weight: weight of the hard-label cross-entropy, which shares the one backward pass; not calibrated.

    Raises TypeError or ValueError that names the argument.
    """
    require_labels(labels, validity, ce_weight)
    stats, label_validity = measure(
        *(student_logits, teacher_logits, labels, divergence, temperature, alpha, beta, vocab_size),
        *(mask, group, inplace_gradient, teacher_max, skip_invalid_teacher),
    )
    if skip_invalid_teacher:
        kept = ~invalid_rows(stats)
        mask = kept if mask is None else kept & (mask != 0)
    weight, rho = validity_weights(
        stats,
        validity,
        sharpness,
        floor,
        ceiling,
        steps,
        student_validity,
        teacher_validity,
        mask,
        normalization,
        normalization_group,
        steps_group,
        label_validity,
    )
    loss = weighted(weight, stats.divergence)
    if ce_weight != 0:
        loss = loss + ce_weight * stats.cross_entropy
    return CalibratedLoss(loss, weight, rho, stats)


def require_labels(labels: Tensor | None, validity: str | Estimator, ce_weight: float) -> None:
    """Raises ValueError where there are none and something reads them."""
    if labels is None and (validity == "label" or ce_weight != 0):
        reason = "validity 'label'" if validity == "label" else f"ce_weight {ce_weight}"
        raise ValueError(f"labels: needed by {reason}, got None")
