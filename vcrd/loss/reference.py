"""The mathematics once more, in float64 and plain torch over the whole vocabulary: the truth for every test.

Short before fast. Nothing here is shared with the code it judges. Formulas: this project's own formalisation of
validity-calibrated distillation (Saadi and Wang, arXiv 2605.04078), see the README.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension. Where p is 0 the term is 0, whatever q is; where q alone is, infinite."""
    none = log_p.exp() == 0
    # Both where: an unused branch that is not finite would still make the gradient NaN.
    log_p, log_q = torch.where(none, 0.0, log_p), torch.where(none, 0.0, log_q)
    return torch.where(none, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log of share p + (1 - share) q."""
    if share == 0:
        return log_q
    log_share = torch.tensor([share, 1 - share], dtype=log_p.dtype, device=log_p.device).log()
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)  # where logaddexp has no derivative
    log_p, log_q = torch.where(neither, 0.0, log_p), torch.where(neither, 0.0, log_q)
    return torch.where(neither, -torch.inf, torch.logaddexp(log_p + log_share[0], log_q + log_share[1]))


def divergence(log_p: Tensor, log_q: Tensor, name: str, alpha: float, beta: float) -> Tensor:
    """Divergence of the student's q from the teacher's p, over the last dimension."""
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jeffreys":
        return (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    if name == "jsd":
        log_m = mixture(log_p, log_q, beta)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    if name == "skew_kl":
        return kl(log_p, mixture(log_p, log_q, alpha))
    if name == "skew_reverse_kl":
        return kl(log_q, mixture(log_q, log_p, alpha))
    raise ValueError(name)


def statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    name: str = "forward_kl",
    temperature: float = 1.0,
    alpha: float = 0.1,
    beta: float = 0.5,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every statistic of `vcrd.vocab_parallel_divergence` by its name, float64, differentiable in the student's logits.

    Logits: [..., padded vocabulary], the whole of it. Labels, mask: [...]. Each result: [...].
    """
    vocab_size = vocab_size or min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = student_logits[..., :vocab_size].double(), teacher_logits[..., :vocab_size].double()
    keep = student.new_ones(student.shape[:-1], dtype=torch.bool) if mask is None else mask != 0
    # where, not multiplication: a masked row may hold NaN, and NaN times 0 would reach the gradient.
    student = torch.where(keep[..., None], student, 0.0)
    teacher = torch.where(keep[..., None], teacher.detach(), 0.0)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    tempered_q, tempered_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)

    def at(log: Tensor, index: Tensor) -> Tensor:
        return log.gather(-1, index[..., None]).squeeze(-1)

    def entropy(log: Tensor) -> Tensor:
        return -torch.where(log == -torch.inf, 0.0, log.exp() * log).sum(-1)

    labelled = torch.zeros_like(keep) if labels is None else labels >= 0
    label = (
        torch.zeros_like(keep, dtype=torch.long)
        if labels is None
        else labels.clamp(min=0, max=vocab_size - 1)
    )
    student_action, teacher_action = student.argmax(-1), teacher.argmax(-1)
    out = {
        "divergence": divergence(tempered_p, tempered_q, name, alpha, beta),
        "cross_entropy": torch.where(labelled, -at(log_q, label), 0.0),
        "student_label_logprob": torch.where(labelled, at(log_q, label), 0.0),
        "teacher_label_logprob": torch.where(labelled, at(log_p, label), 0.0),
        "student_logprob_of_student_action": at(log_q, student_action),
        "student_logprob_of_teacher_action": at(log_q, teacher_action),
        "teacher_logprob_of_student_action": at(log_p, student_action),
        "teacher_logprob_of_teacher_action": at(log_p, teacher_action),
        "student_entropy": entropy(log_q),
        "teacher_entropy": entropy(log_p),
        "student_action": student_action,
        "teacher_action": teacher_action,
    }
    return {k: torch.where(keep, v, torch.zeros_like(v)) for k, v in out.items()}


def topk_statistics(
    student_logits: Tensor,
    logprobs: Tensor,
    ids: Tensor,
    log_tail: Tensor,
    labels: Tensor | None = None,
    *,
    name: str = "forward_kl",
    alpha: float = 0.1,
    beta: float = 0.5,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """As `statistics`, from a teacher of which k tokens are known, its most probable ones, and the mass of all others.

    The divergence is over the outcomes: the distinct ids, the largest log-probability of each, and the tail, unless the
    student gives it nothing.

    The teacher's statistics are facts of the teacher, whatever the student says. Its masses add up to 1, those of the
    ids and, where there are tokens beside them, the tail's. Its action is the most probable id, of equal ones the
    lowest; -1 where no id is given. A token that is no id has the log-probability `bound` at most: that of the least
    probable id, and that of the tail. The statistics take the bound in its place, so `teacher_entropy` is a lower bound
    of the entropy. Where the action is unknown its probabilities are bounds too: the student's is that of its own.

    One key more, `teacher_label_log_validity`: what validity "label" sets against the student's log-probability of the
    label. For an id it is the teacher's. For any other label the ratio of the two validities is that of the tails.
    """
    vocab_size = vocab_size or student_logits.shape[-1]
    student = student_logits[..., :vocab_size].double().reshape(-1, vocab_size)
    keep = torch.ones(len(student), dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    shape = student_logits.shape[:-1]
    out = statistics(student_logits, student_logits, labels, vocab_size=vocab_size, mask=mask)
    out = {key: value.reshape(-1).clone() for key, value in out.items()}
    out["teacher_label_log_validity"] = out["teacher_label_logprob"].clone()
    log_q = torch.where(keep[:, None], student, 0.0).log_softmax(-1)
    k = ids.shape[-1]
    entries = list(zip(ids.reshape(-1, k).tolist(), logprobs.reshape(-1, k).double().tolist(), strict=True))
    for row in keep.nonzero().flatten().tolist():
        found: dict[int, float] = {}
        for token, logprob in zip(*entries[row], strict=True):
            if logprob != -torch.inf:
                found[token] = max(logprob, found.get(token, -torch.inf))
        tokens = torch.tensor(sorted(found), dtype=torch.long)
        log_p = torch.tensor([found[token] for token in sorted(found)], dtype=torch.float64)
        rest = torch.tensor([j for j in range(vocab_size) if j not in found], dtype=torch.long)
        log_q_tail, log_p_tail = log_q[row, rest].logsumexp(-1), log_tail.reshape(-1)[row : row + 1].double()

        def divergence_of(log_p_outcomes: Tensor, log_q_outcomes: Tensor) -> Tensor:
            return divergence(log_p_outcomes.log_softmax(-1), log_q_outcomes, name, alpha, beta)

        if log_q_tail > -torch.inf:
            outcomes = torch.cat([log_q[row, tokens], log_q_tail[None]])
            out["divergence"][row] = divergence_of(torch.cat([log_p, log_p_tail]), outcomes)
        else:
            out["divergence"][row] = divergence_of(log_p, log_q[row, tokens])

        log_p_tail = log_p_tail if len(rest) else torch.full((1,), -torch.inf, dtype=torch.float64)
        *log_p, log_p_tail = torch.cat([log_p, log_p_tail]).log_softmax(-1)
        known = dict(zip(tokens.tolist(), log_p, strict=True))
        bound = min([log_p_tail, *log_p])
        action = max(known, key=known.get, default=-1)  # of equal ones the first
        tail_term = torch.where(log_p_tail == -torch.inf, 0.0, log_p_tail.exp() * bound)
        own_action = int(out["student_action"][row])
        out["teacher_action"][row] = action
        out["teacher_entropy"][row] = -sum((one.exp() * one for one in log_p), tail_term)
        out["teacher_logprob_of_teacher_action"][row] = known.get(action, bound)
        out["teacher_logprob_of_student_action"][row] = known.get(own_action, bound)
        out["student_logprob_of_teacher_action"][row] = log_q[row, action if known else own_action]
        label = -1 if labels is None else int(labels.reshape(-1)[row])
        if label >= 0:
            out["teacher_label_logprob"][row] = known.get(label, bound)
            relative = log_q[row, label] + log_p_tail - log_q_tail
            relative = torch.where(log_q_tail == -torch.inf, -torch.inf, relative)
            out["teacher_label_log_validity"][row] = known.get(label, relative)
    return {key: value.reshape(shape) for key, value in out.items()}


def mixed_logits(teachers: list[Tensor], weights: list[float]) -> Tensor:
    """Logits of the mixture sum w_t p_t, float64 [..., vocabulary], w scaled to a sum of 1, of such logits of each."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    logprobs = [logits.double().log_softmax(-1) for logits in teachers]
    return torch.stack([one + share.log() for one, share in zip(logprobs, shares, strict=True)]).logsumexp(0)


def log_validities(stats: dict[str, Tensor], validity: str) -> tuple[Tensor, Tensor]:
    """log V of the student and of the teacher, [...], for the estimators that read nothing but the statistics."""
    if validity == "label":
        teacher = stats.get("teacher_label_log_validity", stats["teacher_label_logprob"])
        return stats["student_label_logprob"], teacher
    if validity == "margin":
        return (
            (stats["student_logprob_of_student_action"] + stats["teacher_logprob_of_student_action"]) / 2,
            (stats["student_logprob_of_teacher_action"] + stats["teacher_logprob_of_teacher_action"]) / 2,
        )
    if validity == "confidence":
        return -stats["student_entropy"], -stats["teacher_entropy"]
    if validity == "uniform":
        return torch.zeros_like(stats["divergence"]), torch.zeros_like(stats["divergence"])
    raise ValueError(validity)


def privileged_log_validities(
    by_label: Callable[[Tensor], dict[str, Tensor]], student_action: Tensor, teacher_action: Tensor
) -> tuple[Tensor, Tensor]:
    """log V of both actions, [...], by a judge: `statistics` or `topk_statistics` of it, in the teacher's place, for
    given labels. An unknown action of the teacher (-1) leaves both equally valid.
    """
    unknown = teacher_action < 0
    found = (by_label(action.clamp(min=0)) for action in (student_action, teacher_action))
    return tuple(torch.where(unknown, 0.0, each["teacher_label_logprob"]) for each in found)


def gaps(stats: dict[str, Tensor], validities: Sequence[Tensor] | None = None) -> Tensor:
    """p(y) - q(y), [...], at the label y, 0 without one; or, given the validities of the student's and the teacher's
    proposal, the sum of validity times p - q over the proposals, once if they are the same token; 0 where the teacher's
    is unknown (-1).
    """
    if validities is None:
        teacher = stats.get("teacher_label_log_validity", stats["teacher_label_logprob"])
        return teacher.exp() - stats["student_label_logprob"].exp()
    found = torch.zeros_like(validities[0], dtype=torch.float64)
    for model, validity in zip(("student", "teacher"), validities, strict=True):
        p, q = (
            stats[f"{whose}_logprob_of_{model}_action"].double().exp() for whose in ("teacher", "student")
        )
        counted = (stats["student_action"] != stats["teacher_action"]) | (model == "teacher")
        found = found + torch.where(counted, validity.double() * (p - q), 0.0)
    return torch.where(stats["teacher_action"] < 0, 0.0, found)


def weights(
    student_log_validity: Tensor,
    teacher_log_validity: Tensor,
    *,
    sharpness: float = 4.0,
    floor: float = 0.1,
    ceiling: float = 1.9,
    steps: Tensor | None = None,
    mask: Tensor | None = None,
    normalization: str = "none",
    divergence: Tensor | None = None,
    gap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and relative validity, [...], from log validities; 0 where the mask is 0. All tokens are given at once.

    gap: [...] of `gaps`, for the weighting "gap" in the place of "sigmoid". divergence: [...], for "mass". A value that
    is not finite takes no part in a statistic.
    """
    keep = torch.ones_like(student_log_validity, dtype=torch.bool) if mask is None else mask != 0
    values = [student_log_validity, teacher_log_validity, *([] if gap is None else [gap])]
    values = [value.detach().double().clone() for value in values]
    if steps is not None:
        for step in steps[keep & (steps >= 0)].unique():
            members = keep & (steps == step)
            for value in values:
                value[members] = value[members].mean()
    student, teacher = values[:2]
    rho = torch.sigmoid(sharpness * (teacher - student))
    weight = floor + (ceiling - floor) * rho
    if gap is not None:
        d = values[2]
        counted = d[keep & d.isfinite()]
        rms = counted.square().mean().sqrt().clamp(min=1e-6) if len(counted) else 1.0
        weight = (1 + sharpness * d / rms).clamp(floor, ceiling)
    if normalization != "none":
        of_token = torch.ones_like(weight) if normalization == "mean" else divergence.detach()
        counted = keep & of_token.isfinite() & weight.isfinite()
        before, after = of_token[counted].sum(), (weight * of_token)[counted].sum()
        weight = weight * before / after if before > 0 and after > 0 else weight
    return torch.where(keep, weight, 0.0), torch.where(keep, rho, 0.0)
