"""The loss: divergence times weight, plus cross-entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from vcrd.loss.checks import refuse
from vcrd.loss.config import LossConfig, loss_config
from vcrd.loss.divergence import DivergenceStats, measure
from vcrd.loss.judge import judged_actions, require_judge, settle_judge
from vcrd.loss.validity import require_labels, validity_weights, weighted
from vcrd.teacher_logits import TeacherLogits


class CalibratedLoss(NamedTuple):
    """Per-token results, each [...] float32, equal on every rank of the group; nothing is reduced over tokens.

    Attributes:
        loss: differentiable.
        weight: detached.
        relative_validity: rho in [0, 1], detached; above 1/2 the teacher is the more valid.
        stats: what it was computed from.
    """

    loss: Tensor
    weight: Tensor
    relative_validity: Tensor
    stats: DivergenceStats


def validity_calibrated_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherLogits,
    labels: Tensor | None = None,
    *,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    steps: Tensor | None = None,
    student_validity: Tensor | None = None,
    teacher_validity: Tensor | None = None,
    judge: Tensor | TeacherLogits | None = None,
    **options: Any,
) -> CalibratedLoss:
    """loss = weight * divergence + ce_weight * cross_entropy, per token.

    The weight comes from the validity of the two models' proposals, is detached, and sets the strength of the update at
    each prefix; its direction stays the teacher's. Formulas: `vcrd.loss.validity`. Where a weight depends on other
    tokens too (`LossConfig.pooled`), these are the tokens of all ranks of `weight_group`.

        config = vcrd.LossConfig(divergence="jsd", ce_weight=0.1)      # once: it is checked here
        out = vcrd.validity_calibrated_kl(student_logits, teacher_logits, labels, config=config, group=group)
        out = vcrd.validity_calibrated_kl(student_logits, teacher_logits, labels, temperature=2.0)

    Args:
        student_logits, teacher_logits, mask, group: see `vocab_parallel_divergence`.
        labels: [...], integers, negative for none; needed by validity "label" and by a `ce_weight`.
        config: the settings that do not change from call to call: see `LossConfig`. Default: `LossConfig()`.
        steps, student_validity, teacher_validity: see `validity_weights`.
        judge: only for validity "privileged", which needs it: the answer of a teacher that knows more, in any form
            that `teacher_logits` may have. It judges both actions, and receives no gradient. With
            `skip_invalid_teacher` rows in which it is no distribution are skipped too.
        options: fields of `LossConfig`, which count before those of `config`.

    Collectives: those of `vocab_parallel_divergence` and of `validity_weights`; with a `judge` that of
    `vcrd.loss.judge.judged_actions`.

    Raises TypeError or ValueError that names the argument.
    """
    try:
        config = loss_config(config, options)
        require_labels(labels, config)
        require_judge(judge, teacher_logits, config)
    except (TypeError, ValueError) as error:
        refuse(group, error)
        raise
    call = None if judge is None else settle_judge(student_logits, judge, mask, config, group)
    stats, label_validity = measure(student_logits, teacher_logits, labels, mask, config, group)
    judged = None if call is None else judged_actions(call, stats)
    if judged is not None and config.skip_invalid_teacher:
        stats = stats.skipping(judged.invalid)
    if config.skip_invalid_teacher:
        mask = ~stats.skipped if mask is None else ~stats.skipped & (mask != 0)
    weight, rho = validity_weights(
        stats,
        config=config,
        mask=mask,
        steps=steps,
        student_validity=student_validity,
        teacher_validity=teacher_validity,
        label_validity=label_validity,
        judged=judged,
    )
    loss = weighted(weight, stats.divergence)
    if config.ce_weight != 0:
        loss = loss + config.ce_weight * stats.cross_entropy
    return CalibratedLoss(loss, weight, rho, stats)
