"""Local validity, relative validity and the weight map, in plain torch on per-token tensors.

At a prefix student and teacher each propose a next action. Each proposal has a local validity V in (0, 1], and

    relative validity rho = sigmoid(sharpness (log V_teacher - log V_student))
    weight                = floor + (ceiling - floor) rho                                  "sigmoid"
    weight                = 1 + sharpness d / RMS(d), in [floor, ceiling]                  "gap"

sets how strongly that prefix updates the student. Equal validity gives rho 1/2. The gap d compares how much probability
both models give to what is valid: d = p(y) - q(y) of a verified label y, or the sum over both proposals a of
V(a) (p(a) - q(a)). This is the project's own formalisation of validity-calibrated distillation (Saadi and
Wang, arXiv 2605.04078), of which only the abstract was available.

RMS(d) and what a normalization divides by are statistics over the tokens of all ranks of `weight_group`: the tokens of
the micro-batches that these ranks process at the same time. Nothing is kept from one call to the next.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.errors import expected, wrong_type
from vcrd.loss.checks import RankFacts, agree, require_equal
from vcrd.loss.config import Estimator, LossConfig, loss_config
from vcrd.loss.divergence import DivergenceStats

# Stands for log 0, so that two validities of zero compare as equal and not as NaN.
LOWEST_LOG = -1e30
# Log validities of a step are added in fixed point: 2^-28 fine and bounded, so that 2^18 tokens fit 64 bits.
FIXED_POINT, LOWEST_STEP_LOG = 2.0**28, -(2.0**17)
# RMS(d) of equal models is float32's rounding of probabilities, which should not become a weight.
LEAST_RMS = 1e-6


@torch.no_grad()
def validity_weights(
    stats: DivergenceStats,
    *,
    config: LossConfig | None = None,
    mask: Tensor | None = None,
    steps: Tensor | None = None,
    student_validity: Tensor | None = None,
    teacher_validity: Tensor | None = None,
    label_validity: Tensor | None = None,
    judged: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Weight and relative validity of each token, detached, each [...] float32; 0 where the mask is 0.

    Args:
        stats: from `vocab_parallel_divergence`, each field [...].
        config: see `LossConfig`, of which `validity`, `weighting`, `sharpness`, `floor`, `ceiling`, `steps_group`,
            `normalization` and `weight_group` are read here. Default: `LossConfig()`.
        mask: [...]; tokens where it is 0 take no part in steps or statistics.
        steps: [...] integers, the reasoning step of each token, -1 for none. log V and the gap are averaged over a
            step's tokens and each of them gets the step's weight. Equal ids mean the same step wherever they stand in
            the tensor, so number the steps of different samples differently.
        student_validity, teacher_validity: only for "scores"; [...] in [0, 1], or, with `steps`, one value per step,
            [number of steps], indexed by the step's id.
        label_validity: [...], log V of the teacher for "label", in the place of `stats.teacher_label_logprob`. The loss
            passes it for labels outside a teacher's top k: see `TopKLogits`.
        judged: only for "privileged", which needs it: log V of the student's and of the teacher's action by the judge,
            [...] each. The loss makes it from its argument `judge`.
        options: fields of `LossConfig`, which count before those of `config`.

    Collectives: none; with `weight_group`, one all-reduce of two float64 for "gap" and one for a normalization; with
    `steps_group`, one all-reduce of five int64 per token of its ranks, seven with "gap". The host waits for none of
    them. The first call with `weight_group` compares the settings of its ranks through its store.

    Raises TypeError or ValueError that names the argument; on every rank of `weight_group` where their settings differ.
    """
    config = loss_config(config, options)
    check_weighting(stats.divergence, config, mask, steps, student_validity, teacher_validity)
    if (judged is None) == (config.validity == "privileged"):
        needed = "log validities for 'privileged' and none for another validity"
        raise expected("judged", needed, f"{'none' if judged is None else 'them'} for {config.validity!r}")
    if config.validity == "label" and label_validity is not None:
        stats = stats._replace(teacher_label_logprob=label_validity)
    if judged is None:
        judged = _log_validities(stats, config.validity, steps, student_validity, teacher_validity)
    values = list(judged)
    if config.weighting == "gap":
        values.append(_gap(stats, config, judged, steps, teacher_validity))
    keep = None if mask is None else mask != 0
    index = None
    if steps is not None:
        values, index = _average_over_steps(values, steps, keep, config.steps_group)
    student, teacher, *gap = values
    difference = teacher.clamp(min=LOWEST_LOG) - student.clamp(min=LOWEST_LOG)
    rho = torch.sigmoid(config.weight_map.sharpness * difference)
    if index is not None:
        # Each token gets the value of its step only now: vectorised functions may round equal inputs differently.
        rho, *gap = (value[index] for value in (rho, *gap))
    weight = _mapped(rho, gap[0] if gap else None, keep, config)
    if keep is not None:
        # where, not a product: what a masked row's estimate holds may not be a number.
        rho, weight = torch.where(keep, rho, 0.0), torch.where(keep, weight, 0.0)
    if config.normalization != "none":
        weight = weight / weight_divisor(weight, stats.divergence, keep, config)
    return weight, rho


def _mapped(rho: Tensor, gap: Tensor | None, keep: Tensor | None, config: LossConfig) -> Tensor:
    """The weights [...] of the configuration's weighting, not normalised."""
    sharpness, floor, ceiling = config.weight_map
    if gap is None:
        return floor + (ceiling - floor) * rho
    return (1 + sharpness * gap / _root_mean_square(gap, keep, config)).clamp(floor, ceiling).float()


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
        raise wrong_type("validity", "the callable to return (student, teacher)", answer)
    for name, value in zip(("student", "teacher"), answer, strict=True):
        _check_validity(f"validity: the callable's {name} validity", value, stats.divergence, None)
    return tuple(answer)


def _gap(
    stats: DivergenceStats,
    config: LossConfig,
    judged: tuple[Tensor, Tensor],
    steps: Tensor | None,
    teacher_validity: Tensor | None,
) -> Tensor:
    """float64 [...]: p(y) - q(y) at the label y; or the sum of this over both proposals, each times how valid it is,
    and once if they are the same token. 0 where nothing is verified.
    """
    student, teacher = (each.double().exp() for each in judged)
    if config.validity == "label":
        return teacher - student  # 0 without a label, where both are 1
    unverified = stats.teacher_action < 0
    if teacher_validity is not None and teacher_validity.shape != unverified.shape:  # one value per step
        unverified = unverified | (steps < 0)
    p, q = stats.teacher_logprob_of_teacher_action, stats.student_logprob_of_teacher_action
    of_teacher = teacher * (p.double().exp() - q.double().exp())
    p, q = stats.teacher_logprob_of_student_action, stats.student_logprob_of_student_action
    of_student = student * (p.double().exp() - q.double().exp())
    of_student = torch.where(stats.student_action == stats.teacher_action, 0.0, of_student)
    return torch.where(unverified, 0.0, of_teacher + of_student)


def _average_over_steps(
    values: list[Tensor], steps: Tensor, keep: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], Tensor]:
    """Means over each step, [slots] for each value, and each token's slot, [...]; tokens of no step have their own."""
    member = steps >= 0 if keep is None else (steps >= 0) & keep
    flat = torch.where(member, steps, -1).reshape(-1)
    slots = flat.numel() if group is None else flat.numel() * group.size()
    slot = _slots(flat) if group is None else flat
    # Every other token is a step of its own, numbered past the members'.
    slot = torch.where(flat >= 0, slot, slots + torch.arange(flat.numel(), device=flat.device))
    rows = [torch.ones_like(slot)]
    for value in values:
        # A device adds in any order, and only sums of integers do not depend on it. NaNs are counted apart.
        flat_value, unknown = value.reshape(-1).double(), value.reshape(-1).isnan()
        bounded = flat_value.clamp(LOWEST_STEP_LOG, -LOWEST_STEP_LOG).nan_to_num(nan=0.0)
        rows += [(bounded * FIXED_POINT).round().long(), unknown.long()]
    sums = slot.new_zeros(len(rows), slots + flat.numel()).index_add_(1, slot, torch.stack(rows))
    if group is not None:
        shared = sums[:, :slots].contiguous()
        dist.all_reduce(shared, group=group)
        sums[:, :slots] = shared
    count = sums[0].clamp(min=1)
    means = [
        torch.where(unknown > 0, torch.nan, total.double() / (count * FIXED_POINT)).to(value.dtype)
        for value, total, unknown in zip(values, sums[1::2], sums[2::2], strict=True)
    ]
    return means, slot.view_as(steps)


def _slots(steps: Tensor) -> Tensor:
    """Numbers the steps that occur, from 0 on. Unlike torch.unique it does not ask a device how many there are."""
    ordered, order = steps.sort()
    begins = torch.zeros_like(ordered)
    begins[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, begins.cumsum(0))


def weighted(weight: Tensor, divergence: Tensor) -> Tensor:
    """Their product, [...]. A weight of 0 leaves nothing of an infinite divergence; a NaN stays."""
    return torch.where((weight == 0) & (divergence == torch.inf), 0.0, weight * divergence)


def weight_divisor(weight: Tensor, divergence: Tensor, keep: Tensor | None, config: LossConfig) -> Tensor:
    """float32 scalar by which the normalization divides all weights; 1 where there is nothing to divide by."""
    mass = torch.ones_like(weight) if config.normalization == "mean" else divergence
    found, usual = _sums(weight.double() * mass, mass, keep, config)
    return torch.where((found > 0) & (usual > 0), found / usual.clamp(min=1e-300), 1.0).float()


def _root_mean_square(gap: Tensor, keep: Tensor | None, config: LossConfig) -> Tensor:
    """float32 scalar: rounded from float64, so that the order in which the sums are taken is hardly ever seen."""
    squares, count = _sums(gap.square(), torch.ones_like(gap), keep, config)
    return (squares / count.clamp(min=1)).sqrt().clamp(min=LEAST_RMS).float()


def _sums(a: Tensor, b: Tensor, keep: Tensor | None, config: LossConfig) -> Tensor:
    """float64 [2]: the sums of a and b, [...], over the tokens that count and where both are finite.

    Over all ranks of `weight_group`: one all-reduce, in which a rank without such tokens takes part too.
    """
    counts = a.isfinite() & b.isfinite()
    if keep is not None:
        counts = counts & keep
    sums = torch.stack([torch.where(counts, value.double(), 0.0).sum() for value in (a, b)])
    if config.weight_group is not None:
        agree(config.weight_group, _weight_facts(config), require_equal)
        dist.all_reduce(sums, group=config.weight_group)
    return sums


def _weight_facts(config: LossConfig) -> RankFacts:
    return {
        "weighting": config.weighting,
        **{name: float(value) for name, value in config.weight_map._asdict().items()},
        "normalization": config.normalization,
        "validity": config.validity if isinstance(config.validity, str) else "a callable",
    }


def require_labels(labels: Tensor | None, config: LossConfig) -> None:
    """Raises ValueError where there are none and something reads them."""
    if labels is None and (config.validity == "label" or config.ce_weight != 0):
        by = "validity 'label'" if config.validity == "label" else f"ce_weight {config.ce_weight}"
        raise ValueError(f"labels: needed by {by}, got None")


def check_weighting(
    tokens: Tensor,
    config: LossConfig,
    mask: Tensor | None,
    steps: Tensor | None,
    student_validity: Tensor | None,
    teacher_validity: Tensor | None,
) -> None:
    """Raises TypeError or ValueError naming the argument of `validity_weights` that is wrong for tokens [...]."""
    for name, tensor in (("steps", steps), ("mask", mask)):
        if tensor is not None and tensor.shape != tokens.shape:
            raise expected(name, f"the tokens' shape {list(tokens.shape)}", list(tensor.shape))
    if steps is not None and (steps.is_floating_point() or steps.dtype == torch.bool):
        raise expected("steps", "integers", steps.dtype, TypeError)
    group = config.steps_group
    if steps is not None and group is not None and steps.numel() and steps.device.type == "cpu":
        bound = steps.numel() * group.size()
        if not torch.compiler.is_compiling() and int(steps.max()) >= bound:
            raise expected("steps", f"ids below {bound} with steps_group", int(steps.max()))
    for name, value in (("student_validity", student_validity), ("teacher_validity", teacher_validity)):
        if config.validity == "scores":
            _check_validity(name, value, tokens, steps)
        elif value is not None:
            raise expected(name, "none unless validity is 'scores'", f"one with {config.validity!r}")


def _check_validity(name: str, value: Tensor | None, tokens: Tensor, steps: Tensor | None) -> None:
    if not isinstance(value, Tensor):
        raise wrong_type(name, "a tensor", value)
    per_step = steps is not None and value.dim() == 1
    if value.shape != tokens.shape and not per_step:
        or_per_step = " or one value per step" if steps is not None else ""
        raise expected(name, f"the tokens' shape {list(tokens.shape)}{or_per_step}", list(value.shape))
    # Reading values would stall other devices' queues and break a graph under compilation.
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if value.shape != tokens.shape and steps.numel() and int(steps.max()) >= len(value):
        raise expected(name, f"a value for each step up to {int(steps.max())}", len(value))
    if value.numel() and not (0 <= value.min() and value.max() <= 1):
        raise expected(name, "values in [0, 1]", f"{float(value.min()):g} to {float(value.max()):g}")
