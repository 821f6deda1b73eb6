"""Weights from the gap between both proposals, their rivals, and their controls.

A signal is a number per token, positive where the teacher's proposal is the better one. `scaled` makes weights of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import vcrd
from methods import Seen, Weights

Signal = Callable[[Seen], Tensor]
FLOOR, CEILING = 0.05, 3.0
BINS = 8


def scaled(signal: Signal, strength: float = 1.0) -> Weights:
    """clip(1 + strength d / RMS(d), FLOOR, CEILING), with the RMS over the tokens of the micro-batch that count."""

    def weights(seen: Seen) -> Tensor:
        found = torch.where(seen.counts, signal(seen), 0.0)
        size = found[seen.counts].square().mean().sqrt()
        return (1 + strength * found / size.clamp(min=1e-6)).clamp(FLOOR, CEILING)

    return weights


def kept(inner: Weights) -> Weights:
    """The same weights times a number that keeps the sum of the divergence over the micro-batch."""

    def weights(seen: Seen) -> Tensor:
        found, divergence = inner(seen), seen.stats.divergence.detach()[seen.counts]
        weighted = (found[seen.counts] * divergence).sum()
        return found * torch.where(weighted > 0, divergence.sum() / weighted.clamp(min=1e-12), 1.0)

    return weights


def gap(seen: Seen) -> Tensor:
    """p(y) - q(y) of the verified token; 0 without one."""
    found = seen.stats.teacher_label_logprob.exp() - seen.stats.student_label_logprob.exp()
    return torch.where(seen.labels < 0, 0.0, found)


def proposal_gap(seen: Seen) -> Tensor:
    """p(a) - q(a) of the teacher's proposal a: the gap without a verifier."""
    stats = seen.stats
    return stats.teacher_logprob_of_teacher_action.exp() - stats.student_logprob_of_teacher_action.exp()


def verdict_difference(seen: Seen) -> Tensor:
    """1 if only the teacher's proposal is accepted, -1 if only the student's is, else 0."""
    return seen.teacher_valid - seen.student_valid


def _mass(seen: Seen, of_teacher: Tensor, of_student: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's sum of value times probability over both proposals, counted once if equal."""
    stats = seen.stats
    of_student = torch.where(stats.student_action == stats.teacher_action, 0.0, of_student)
    return (
        of_teacher * stats.teacher_logprob_of_teacher_action.exp()
        + of_student * stats.teacher_logprob_of_student_action.exp(),
        of_teacher * stats.student_logprob_of_teacher_action.exp()
        + of_student * stats.student_logprob_of_student_action.exp(),
    )


def accepted_mass(seen: Seen) -> Tensor:
    """The probability of the accepted ones of both proposals: the teacher's minus the student's."""
    teacher, student = _mass(seen, seen.teacher_valid, seen.student_valid)
    return teacher - student


def signed_mass(seen: Seen) -> Tensor:
    """As `accepted_mass`, minus the probability of the rejected proposals."""
    teacher, student = _mass(seen, 2 * seen.teacher_valid - 1, 2 * seen.student_valid - 1)
    return teacher - student


def soft_scores(seen: Seen) -> Tensor:
    """The weights of `scores`, where the validity of a model is its probability of the accepted proposals."""
    teacher, student = _mass(seen, seen.teacher_valid, seen.student_valid)
    found, _ = vcrd.validity_weights(
        seen.stats,
        validity="scores",
        teacher_validity=teacher.clamp(0, 1),
        student_validity=student.clamp(0, 1),
        mask=seen.counts,
    )
    return found


def spare_the_valid(seen: Seen) -> Tensor:
    """0.1 where the student's proposal is accepted and differs from the teacher's, else 1."""
    spared = (seen.student_valid > 0) & (seen.stats.student_action != seen.stats.teacher_action)
    return torch.where(spared, 0.1, 1.0)


def position(seen: Seen) -> Tensor:
    """Falls linearly from 1 at the first token of a solution to 0.1 at its last."""
    last = torch.where(seen.counts, seen.position, 0).amax(-1, keepdim=True).clamp(min=1)
    return 1 - 0.9 * seen.position.clamp(min=0) / last


def outcome_gate(seen: Seen) -> Tensor:
    """1 in solutions that are correct as a whole, else 0: one verdict for each solution."""
    return seen.solved.float()


def wrong_outcome_gate(seen: Seen) -> Tensor:
    """1 in solutions that are wrong as a whole, else 0: a teacher corrects, and what is right is left alone."""
    return 1 - seen.solved.float()


def by_position(seen: Seen) -> Tensor:
    """The bin of each token that counts, int64 [n], by its place in its solution: BINS bins of about the same size."""
    return _bins(seen.position[seen.counts].float())


def by_divergence(seen: Seen) -> Tensor:
    """As `by_position`, by the divergence."""
    return _bins(seen.stats.divergence.detach()[seen.counts])


def _bins(values: Tensor) -> Tensor:
    inner = torch.linspace(0, 1, BINS + 1, device=values.device)[1:-1]
    # right: equal values are in one bin, which may be empty for others.
    return torch.bucketize(values, values.quantile(inner), right=True)


def shuffled_within(inner: Weights, bins: Callable[[Seen], Tensor]) -> Weights:
    """The same weights, moved to a random token of its bin."""

    def weights(seen: Seen) -> Tensor:
        found = inner(seen)
        those, number = found[seen.counts], bins(seen)
        chance = torch.rand(len(those), generator=seen.generator).to(those.device)
        by_bin = torch.argsort(number, stable=True)
        drawn = torch.argsort(chance)
        drawn = drawn[torch.argsort(number[drawn], stable=True)]  # by bin, in random order within it
        moved = torch.zeros_like(found)
        there = torch.empty_like(those)
        there[by_bin] = those[drawn]
        moved[seen.counts] = there
        return moved

    return weights


def reversed_(signal: Signal) -> Signal:
    return lambda seen: -signal(seen)


def sign_only(signal: Signal) -> Signal:
    return lambda seen: signal(seen).sign()


def size_only(signal: Signal) -> Signal:
    return lambda seen: signal(seen).abs()
