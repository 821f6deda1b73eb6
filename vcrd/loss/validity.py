"""Local validity, relative validity and the weight map, in plain torch on per-token tensors.

At a prefix student and teacher each propose a next action. Each proposal has a local validity V in (0, 1], and

    relative validity rho = sigmoid(sharpness (log V_teacher - log V_student))
    weight                = floor + (ceiling - floor) rho

sets how strongly that prefix updates the student. Equal validity gives rho 1/2. This is the project's own formalisation
of validity-calibrated distillation (Saadi and Wang, arXiv 2605.04078), of which only the abstract was at hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss.divergence import DivergenceStats

ESTIMATORS = ("label", "margin", "confidence", "scores", "uniform")
NORMALIZATIONS = ("none", "mean")

# Stands for log 0, so that two validities of zero compare as equal and not as NaN.
LOWEST_LOG = -1e30
# Log validities of a step are added in fixed point: 2^-28 fine and bounded, so that 2^18 tokens fit 64 bits.
FIXED_POINT, LOWEST_STEP_LOG = 2.0**28, -(2.0**17)

Estimator = Callable[[DivergenceStats], tuple[Tensor, Tensor]]


@torch.no_grad()
def validity_weights(
    stats: DivergenceStats,
    validity: str | Estimator = "label",
    sharpness: float = 4.0,
    floor: float = 0.1,
    ceiling: float = 1.9,
    steps: Tensor | None = None,
    student_validity: Tensor | None = None,
    teacher_validity: Tensor | None = None,
    mask: Tensor | None = None,
    normalization: str = "none",
    normalization_group: dist.ProcessGroup | None = None,
    steps_group: dist.ProcessGroup | None = None,
    label_validity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and relative validity of each token, detached, each [...] float32; 0 where the mask is 0.

    Args:
        stats: from `vocab_parallel_divergence`, each field [...].
        validity: how V of a model m is estimated.
            "label": pi_m(y), the chance that m's sampled proposal is the verified next token y. Tokens without a label
                (negative) have no verdict: both validities are 1. Labels must be verified tokens, not the teacher's own
                samples, which would raise the weight exactly where the teacher errs.
            "margin": geometric mean of both models' probabilities at m's most probable token.
            "confidence": exp(-entropy of m).
                Where only the teacher's top k are known, "confidence" of the teacher is an upper bound, and so is
                "margin" of the student whose token is not among them.
            "scores": `student_validity` and `teacher_validity`, from a verifier, a process reward model or rollouts.
            "uniform": 1, so the weight is (floor + ceiling) / 2 everywhere: the plain-distillation control.
            a callable: given `stats`, returns student's and teacher's validity, each [...] in (0, 1].
        sharpness: 1 makes rho = V_T / (V_T + V_S).
        floor, ceiling: weight at rho 0 and 1. floor > ceiling reverses the direction, for an ablation.
        steps: [...] integers, the reasoning step of each token, -1 for none. log V is averaged over a step's tokens and
            each of them gets the step's weight. Equal ids mean the same step wherever they stand in the tensor, so
            number the steps of different samples differently.
        student_validity, teacher_validity: only for "scores"; [...] in [0, 1], or, with `steps`, one value per step,
            [number of steps], indexed by the step's id.
        mask: [...]; tokens where it is 0 take no part in steps or normalisation.
        normalization: "none", or "mean": divide by the masked mean weight, over all ranks of `normalization_group`.
        steps_group: ranks that hold parts of the same steps, each as many tokens (context parallelism). Ids are then
            below the number of tokens of all of them.
        label_validity: [...], log V of the teacher for "label", in the place of `stats.teacher_label_logprob`. The loss
            passes it for labels outside a teacher's top k: see `TopKLogits`.

    Collectives: none; with "mean" and a group, one all-reduce of two numbers; with `steps_group`, one all-reduce of
    five int64 per token of its ranks.

    Raises TypeError or ValueError that names the argument.
    """
    check_weighting(
        stats.divergence,
        validity,
        sharpness,
        floor,
        ceiling,
        steps,
        student_validity,
        teacher_validity,
        mask,
        normalization,
        steps_group,
    )
    if validity == "label" and label_validity is not None:
        stats = stats._replace(teacher_label_logprob=label_validity)
    student, teacher = _log_validities(stats, validity, steps, student_validity, teacher_validity)
    keep = None if mask is None else mask != 0
    index = None
    if steps is not None:
        student, teacher, index = _average_over_steps(student, teacher, steps, keep, steps_group)
    rho = torch.sigmoid(sharpness * (teacher.clamp(min=LOWEST_LOG) - student.clamp(min=LOWEST_LOG)))
    weight = floor + (ceiling - floor) * rho
    if index is not None:
        # Handed out only now: vectorised functions may round equal inputs differently from place to place.
        rho, weight = rho[index], weight[index]
    if keep is not None:
        # where, not a product: what a masked row's estimate holds may not be a number.
        rho, weight = torch.where(keep, rho, 0.0), torch.where(keep, weight, 0.0)
    if normalization == "mean":
        weight = weight / mean_weight(weight, keep, normalization_group)
    return weight, rho


def _log_validities(stats, validity, steps, student_validity, teacher_validity) -> tuple[Tensor, Tensor]:
    if validity == "label":
        return stats.student_label_logprob, stats.teacher_label_logprob
    if validity == "margin":
        student = stats.student_logprob_of_student_action + stats.teacher_logprob_of_student_action
        teacher = stats.student_logprob_of_teacher_action + stats.teacher_logprob_of_teacher_action
        return student / 2, teacher / 2
    if validity == "confidence":
        return -stats.student_entropy, -stats.teacher_entropy
    if validity == "uniform":
        zero = torch.zeros_like(stats.divergence)
        return zero, zero
    if validity == "scores":
        student, teacher = student_validity, teacher_validity
    else:
        student, teacher = _ask(validity, stats)
    shape = stats.divergence.shape
    student, teacher = (
        v if v.shape == shape else torch.where(steps >= 0, v[steps.clamp(min=0).long()], 1.0)
        for v in (student, teacher)
    )
    return student.float().log(), teacher.float().log()


def _ask(estimator: Estimator, stats: DivergenceStats) -> tuple[Tensor, Tensor]:
    answer = estimator(stats)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise TypeError(
            f"validity: expected the callable to return (student, teacher), got {type(answer).__name__}"
        )
    for name, value in zip(("student", "teacher"), answer, strict=True):
        _check_validity(f"validity: the callable's {name} validity", value, stats.divergence, None)
    return tuple(answer)


def _average_over_steps(
    student: Tensor, teacher: Tensor, steps: Tensor, keep: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean log validities of each step, [slots], and each token's slot, [...]; tokens of no step have their own."""
    member = steps >= 0 if keep is None else (steps >= 0) & keep
    flat = torch.where(member, steps, -1).reshape(-1)
    slots = flat.numel() if group is None else flat.numel() * group.size()
    slot = _slots(flat) if group is None else flat
    # Every other token is a step of its own, numbered past the members'.
    slot = torch.where(flat >= 0, slot, slots + torch.arange(flat.numel(), device=flat.device))
    rows = [torch.ones_like(slot)]
    for log_validity in (student, teacher):
        # A device adds up in any order, and only integers do not mind. They have no NaN, which is counted apart.
        values, unknown = log_validity.reshape(-1).double(), log_validity.reshape(-1).isnan()
        bounded = values.clamp(LOWEST_STEP_LOG, -LOWEST_STEP_LOG).nan_to_num(nan=0.0)
        rows += [(bounded * FIXED_POINT).round().long(), unknown.long()]
    sums = slot.new_zeros(len(rows), slots + flat.numel()).index_add_(1, slot, torch.stack(rows))
    if group is not None:
        shared = sums[:, :slots].contiguous()
        dist.all_reduce(shared, group=group)
        sums[:, :slots] = shared
    count = sums[0].clamp(min=1)
    student, teacher = (
        torch.where(unknown > 0, torch.nan, total.double() / (count * FIXED_POINT)).float()
        for total, unknown in (sums[1:3], sums[3:5])
    )
    return student, teacher, slot.view_as(steps)


def _slots(steps: Tensor) -> Tensor:
    """Numbers the steps that occur, from 0 on. Unlike torch.unique it does not ask a device how many there are."""
    ordered, order = steps.sort()
    begins = torch.zeros_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, begins.cumsum(0))


def weighted(weight: Tensor, divergence: Tensor) -> Tensor:
    """Their product, [...]. A weight of 0 leaves nothing of an infinite divergence; a NaN stays."""
    return torch.where((weight == 0) & (divergence == torch.inf), 0.0, weight * divergence)


def mean_weight(weight: Tensor, keep: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """Mean weight over the unmasked tokens of all ranks; 1 where there are none, which changes nothing."""
    count = torch.full((), weight.numel(), device=weight.device) if keep is None else keep.sum()
    totals = torch.stack([weight.double().sum(), count.double()])
    if group is not None:
        dist.all_reduce(totals, group=group)
    return torch.where(totals[1] > 0, totals[0] / totals[1].clamp(min=1), 1.0).float()


def check_weighting(
    tokens,
    validity,
    sharpness,
    floor,
    ceiling,
    steps,
    student_validity,
    teacher_validity,
    mask,
    normalization,
    steps_group,
):
    """Raises TypeError or ValueError naming the argument of `validity_weights` that is wrong for tokens [...]."""
    if not callable(validity) and validity not in ESTIMATORS:
        raise ValueError(f"validity: expected one of {', '.join(ESTIMATORS)} or a callable, got {validity!r}")
    for name, value in (("sharpness", sharpness), ("floor", floor), ("ceiling", ceiling)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    for name, tensor in (("steps", steps), ("mask", mask)):
        if tensor is not None and tensor.shape != tokens.shape:
            raise ValueError(
                f"{name}: expected the tokens' shape {list(tokens.shape)}, got {list(tensor.shape)}"
            )
    if steps is not None and (steps.is_floating_point() or steps.dtype == torch.bool):
        raise TypeError(f"steps: expected integers, got {steps.dtype}")
    if steps is not None and steps_group is not None and steps.numel() and steps.device.type == "cpu":
        bound = steps.numel() * steps_group.size()
        if not torch.compiler.is_compiling() and int(steps.max()) >= bound:
            raise ValueError(f"steps: expected ids below {bound} with steps_group, got {int(steps.max())}")
    for name, value in (("student_validity", student_validity), ("teacher_validity", teacher_validity)):
        if validity == "scores":
            _check_validity(name, value, tokens, steps)
        elif value is not None:
            raise ValueError(f"{name}: expected none unless validity is 'scores', got one with {validity!r}")


def _check_validity(name: str, value: Tensor | None, tokens: Tensor, steps: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    per_step = steps is not None and value.dim() == 1
    if value.shape != tokens.shape and not per_step:
        raise ValueError(
            f"{name}: expected the tokens' shape {list(tokens.shape)}"
            f"{' or one value per step' if steps is not None else ''}, got {list(value.shape)}"
        )
    # Reading values would stall other devices' queues and break a graph under compilation.
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if value.shape != tokens.shape and steps.numel() and int(steps.max()) >= len(value):
        raise ValueError(f"{name}: expected a value for each step up to {int(steps.max())}, got {len(value)}")
    if value.numel() and not (0 <= value.min() and value.max() <= 1):
        raise ValueError(
            f"{name}: expected values in [0, 1], got {float(value.min()):g} to {float(value.max()):g}"
        )
