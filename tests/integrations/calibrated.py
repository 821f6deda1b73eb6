"""The calibrated loss of the reference, in float64 over the whole vocabulary, for the adapters' tests."""

from __future__ import annotations

from torch import Tensor

from vcrd.loss import reference


def per_token(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    validity: str = "label",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    vocab_size: int | None = None,
    normalization: str = "none",
) -> Tensor:
    """Logits [..., vocabulary], labels and mask [...] -> [...], differentiable in the student's logits."""
    stats = reference.statistics(
        student,
        teacher,
        labels,
        name=divergence,
        temperature=temperature,
        mask=mask,
        vocab_size=vocab_size,
    )
    log_validities = reference.log_validities(stats, validity)
    weight, _ = reference.weights(*log_validities, mask=mask, normalization=normalization)
    return weight * stats["divergence"] + ce_weight * stats["cross_entropy"]
