"""The methods, each a configuration of vcrd's own loss; nothing else differs between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vcrd
from lm.text import Rows
from methods import OWN, TRACES

_PLAIN = {"validity": "uniform"}


def _constant(weight: float) -> dict[str, Any]:
    return {**_PLAIN, "floor": weight, "ceiling": weight}


REGIMES = (OWN, TRACES)


@dataclass(frozen=True)
class Method:
    """options: of `vcrd.LossConfig`. labels, scores: whether it reads verified tokens, verdicts on both proposals.
    shuffled: whether the weights are moved to other tokens of the micro-batch. regimes: the prefixes that it is for.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    labels: bool = False
    scores: bool = False
    shuffled: bool = False
    regimes: tuple[str, ...] = REGIMES


_SCORES = {"divergence": "jsd", "validity": "scores"}
_MASS = {**_SCORES, "weighting": "gap", "normalization": "mass"}
# In the order in which they run.
METHODS = {
    method.name: method
    for method in (
        Method("JSD", {**_PLAIN, "divergence": "jsd"}),
        Method("JSD x accepted mass, kept", _MASS, scores=True),
        Method("JSD x scores", _SCORES, scores=True),
        Method("KL + CE", {**_constant(0.5), "ce_weight": 0.5}, labels=True),
        Method("SFT", {**_constant(0.0), "ce_weight": 1.0}, labels=True),
        Method("forward KL", _PLAIN),
        Method("JSD x accepted mass, kept, shuffled", _MASS, scores=True, shuffled=True),
        # On the student's own samples the labels are the teacher's proposals, so `scores` is the same question.
        Method("label", {"validity": "label"}, labels=True, regimes=(TRACES,)),
        Method("JSD x label", {"divergence": "jsd", "validity": "label"}, labels=True, regimes=(TRACES,)),
    )
}


def names_of(regime: str) -> list[str]:
    """The methods that are compared on these prefixes."""
    return [method.name for method in METHODS.values() if regime in method.regimes]


def verified(rows: Rows, regime: str, teacher_action: Tensor) -> Tensor:
    """Verified next tokens, int64 [n], -1 for none: on the student's own samples the teacher's proposal where the
    verifier accepts it, else the teacher's written token where it is correct.
    """
    tokens = teacher_action if regime == OWN else rows.written.to(teacher_action.device)
    return torch.where(rows.valid(tokens), tokens, -1)


def loss_of(
    method: Method, logits: Tensor, taught: Tensor, rows: Rows, regime: str, generator: torch.Generator
) -> Tensor:
    """The mean loss over the n places of `rows`. Both logits are [n, vocabulary]; the student's have a graph."""
    given: dict[str, Tensor] = {}
    labels = None
    if method.labels or method.scores:
        action = taught.argmax(-1)
        if method.labels:
            labels = verified(rows, regime, action)
        if method.scores:
            given["teacher_validity"] = rows.valid(action).float()
            given["student_validity"] = rows.valid(logits.detach().argmax(-1)).float()
    out = vcrd.validity_calibrated_kl(logits, taught, labels, **given, **method.options)
    loss = out.loss
    if method.shuffled:
        # The same on every device.
        order = torch.randperm(len(out.weight), generator=generator).to(out.weight.device)
        loss, mass = out.weight[order] * out.stats.divergence, out.loss.detach().sum()
        if method.options.get("normalization") == "mass":
            loss = loss * (mass / loss.detach().sum().clamp(min=1e-12))
    return loss.mean()
