"""The methods. Each computes the weight of each token in the loss of vcrd; nothing else differs.

A method receives the observations at the tokens of its micro-batch, and returns weights of the divergence. A method
with a verifier has the verdicts on the proposals of both models, right or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vcrd
from vcrd.loss.divergence import DivergenceStats

TRACES, OWN = "traces", "own"  # prefixes from the teacher's solutions, and from the student's own samples


@dataclass
class Seen:
    """Observations at the tokens of a micro-batch, all [b, s]. counts: bool. labels: verified next tokens, -1 for none.
    student_valid, teacher_valid: verdicts on the proposals, float 0 or 1. unbroken: bool, whether all earlier tokens
    are correct. solved: bool, whether the whole solution is. steps: as for vcrd. position: of the token in its
    solution, int64 from 0, -1 outside. first: statistics of the student before training, if a method needs them.
    """

    stats: DivergenceStats
    teacher_logits: Tensor
    labels: Tensor
    counts: Tensor
    student_valid: Tensor
    teacher_valid: Tensor
    unbroken: Tensor
    solved: Tensor
    steps: Tensor
    position: Tensor
    generator: torch.Generator
    first: DivergenceStats | None = None


Weights = Callable[[Seen], Tensor]


@dataclass(frozen=True)
class Method:
    """loss = weights x divergence + ce x cross-entropy with the verified token, the mean over the tokens that count.

    group: "baseline", "vcrd", "control", "idea", or "variant" (other settings and combinations, compared only by name).
    asks: "labels", "verifier", if it needs them. source: of the verdicts and labels: the "verifier" of each token; the
    "outcome", one verdict per solution, whose written tokens are verified if it is correct; a "judge", a teacher that
    sees a solution; or "local", a verifier that judges a step after a wrong one by what is written. regimes: where it
    can be used.
    """

    name: str
    group: str
    weights: Weights
    divergence: str = "forward_kl"
    ce: float = 0.0
    asks: frozenset[str] = frozenset()
    source: str = "verifier"
    against_first: bool = False
    regimes: frozenset[str] = field(default=frozenset((TRACES, OWN)))


def plain(seen: Seen) -> Tensor:
    return torch.ones_like(seen.stats.divergence)


def none(seen: Seen) -> Tensor:
    return torch.zeros_like(seen.stats.divergence)


def calibrated(validity: str, by_step: bool = False, **more) -> Weights:
    """The weights of vcrd. by_step: one for each reasoning step."""

    def weights(seen: Seen) -> Tensor:
        stats = seen.first if more.get("first") else seen.stats
        arguments = {key: value for key, value in more.items() if key != "first"}
        if validity == "scores":
            arguments |= {"student_validity": seen.student_valid, "teacher_validity": seen.teacher_valid}
        if by_step:
            arguments["steps"] = seen.steps
        found, _ = vcrd.validity_weights(stats, validity=validity, mask=seen.counts, **arguments)
        # As in the loss, a token without a verified label has no verdict.
        return torch.where(seen.labels < 0, 1.0, found) if validity == "label" else found

    return weights


def shuffled(inner: Weights) -> Weights:
    """The same weights, shuffled over the tokens of the micro-batch."""

    def weights(seen: Seen) -> Tensor:
        found = inner(seen)
        those = found[seen.counts]
        moved = torch.zeros_like(found)
        order = torch.randperm(len(those), generator=seen.generator)  # the same on every device
        moved[seen.counts] = those[order.to(those.device)]
        return moved

    return weights


def entropy_gap(seen: Seen) -> Tensor:
    """Sigmoid of the student's entropy minus the teacher's (TSD-KD)."""
    return torch.sigmoid(seen.stats.student_entropy - seen.stats.teacher_entropy)


def accepted(k: int) -> Weights:
    """1 if the student's proposal is among the teacher's k most probable tokens, else 0 (SelecTKD)."""

    def weights(seen: Seen) -> Tensor:
        best = seen.teacher_logits.topk(k, -1).indices
        return (best == seen.stats.student_action[..., None]).any(-1).float()

    return weights


def not_visibly_wrong(seen: Seen) -> Tensor:
    """0 if the teacher gives its own proposal more than twice the probability of the verified token."""
    stats = seen.stats
    wrong = stats.teacher_logprob_of_teacher_action > stats.teacher_label_logprob + math.log(2.0)
    return (~(wrong & (seen.labels >= 0))).float()


def capped(inner: Weights) -> Weights:
    """Never more than plain distillation: min(1, 2 rho), for weights from 0 to 2."""
    return lambda seen: inner(seen).clamp(max=1.0)


def halved(inner: Weights) -> Weights:
    """Half of the weights, as "KL + CE" has half of both terms."""
    return lambda seen: 0.5 * inner(seen)


def teacher_absolute(seen: Seen) -> Tensor:
    """The weights of `label` times the teacher's absolute validity, p(y) / p_max."""
    own = (seen.stats.teacher_label_logprob - seen.stats.teacher_logprob_of_teacher_action).exp()
    return calibrated("label")(seen) * torch.where(seen.labels < 0, 1.0, own)


def gate(seen: Seen) -> Tensor:
    """1 if the verifier accepts the teacher's proposal, else 0."""
    return seen.teacher_valid


def until_the_first_error(seen: Seen) -> Tensor:
    """Plain distillation up to the student's first error."""
    return seen.unbroken.float()


def relative_and_absolute(seen: Seen) -> Tensor:
    """The weights of `scores` if the verifier accepts the teacher's proposal, else 0."""
    return calibrated("scores")(seen) * seen.teacher_valid


def corrections(seen: Seen) -> Tensor:
    """1 if the verifier accepts the teacher's proposal and not the student's, else 0."""
    return seen.teacher_valid * (1 - seen.student_valid)


@dataclass
class Place:
    """The tokens of a micro-batch, all [b, s]. labels: None on the student's own prefixes, where the proposals of the
    teacher that the verifier accepts count as verified. written: the next tokens, -1 outside solutions. judges: by the
    source of the verdicts, (student's action, teacher's action) -> whether each is valid, float. unbroken: whether all
    earlier tokens are correct, by the verifier's verdicts. solved: whether the whole solution is. first_logits: of the
    student before training, if a method needs them.
    """

    counts: Tensor
    steps: Tensor
    labels: Tensor | None
    written: Tensor
    judges: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]
    unbroken: Tensor
    solved: Tensor
    position: Tensor
    generator: torch.Generator
    first_logits: Tensor | None = None


def loss_of(method: Method, logits: Tensor, teacher_logits: Tensor, place: Place) -> Tensor:
    """The scalar loss of a micro-batch. Both logits are [b, s, vocabulary]; the student's have a graph."""
    with torch.no_grad():
        labels, valid = _verified(method, logits, teacher_logits, place)

    def statistics(student: Tensor, teacher: Tensor, divergence: str = "forward_kl") -> DivergenceStats:
        return vcrd.vocab_parallel_divergence(
            student, teacher, labels, divergence=divergence, mask=place.counts
        )

    stats = statistics(logits, teacher_logits, method.divergence)
    with torch.no_grad():
        first = statistics(place.first_logits, teacher_logits) if method.against_first else None
        seen = Seen(
            stats,
            teacher_logits,
            labels,
            place.counts,
            *valid,
            place.unbroken,
            place.solved,
            place.steps,
            place.position,
            place.generator,
            first,
        )
        weights = method.weights(seen)
    loss = weights * stats.divergence
    if method.ce:
        loss = loss + method.ce * torch.where(labels >= 0, stats.cross_entropy, 0.0)
    return loss.sum() / place.counts.sum()


def _verified(
    method: Method, logits: Tensor, teacher_logits: Tensor, place: Place
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The labels, -1 for none, and the verdicts on both proposals, 1 where the method has none."""
    labels, valid = place.labels, (torch.ones(logits.shape[:2], device=logits.device),) * 2
    if method.source == "outcome":
        return torch.where(place.solved, place.written, -1), valid
    if "verifier" in method.asks or (labels is None and "labels" in method.asks):
        teacher_action = teacher_logits.argmax(-1)
        valid = place.judges[method.source](logits.argmax(-1), teacher_action)
        if labels is None:
            labels = torch.where(place.counts & (valid[1] > 0), teacher_action, -1)
    if labels is None:
        labels = torch.full(logits.shape[:2], -1, device=logits.device)
    return labels, valid
