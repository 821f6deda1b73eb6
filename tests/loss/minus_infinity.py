"""Rows with logits of -inf, their comparison with the reference, and what each rank of a group runs of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cases import assert_stats, coded, decoded, on_cpu
from forms import moved
from sharded_jobs import shard
from torch import Tensor

import vcrd
from vcrd.loss import reference
from vcrd.loss.config import DIVERGENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# JSD with beta 1/2 uses other kernels than JSD with any other beta.
SETTINGS = [*((name, {}) for name in DIVERGENCES), ("jsd", {"beta": 0.3}), ("skew_kl", {"alpha": 1e-3})]
ROWS = 8
# Makes of logits the states and weights of a layer whose products overflow where they are -inf: numbers that a model
# may hold, and exact.
LARGE = 2.0**64


def drawn(seed: int, columns: int, scale: float) -> tuple[Tensor, Tensor]:
    """Student and teacher logits [ROWS, columns], each row with its own pattern of -inf in each."""
    generator = torch.Generator().manual_seed(seed)

    def integer(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    def without(logits: Tensor) -> Tensor:
        kind = integer(6)
        if kind == 0:
            return torch.zeros(columns, dtype=torch.bool)
        if kind == 1:
            return torch.arange(columns) == integer(columns)
        if kind == 2:
            return logits == logits.max()
        if kind == 3:  # one stretch
            first, last = sorted((integer(columns), integer(columns)))
            return (torch.arange(columns) >= first) & (torch.arange(columns) <= last)
        if kind == 4:  # all but one
            return torch.arange(columns) != integer(columns)
        return torch.rand(columns, generator=generator) < (0.01, 0.5, 0.97)[integer(3)]

    student, teacher = (torch.randn(ROWS, columns, generator=generator) * scale for _ in range(2))
    for row in range(ROWS):
        mine, theirs = without(student[row]), without(teacher[row])
        if row % 4 == 3:
            theirs = mine
        for logits, none in ((student[row], mine), (teacher[row], theirs)):
            none[integer(columns)] = False  # a row of -inf alone is no distribution
            logits[none] = -torch.inf
    return student, teacher


def expected(student, statistics, divergence: str, log_p, log_q) -> tuple[dict[str, Tensor], Tensor]:
    """The reference's statistics and the gradient of each divergence. An infinite KL(q || p) has none, and gives 0.

    student: the leaf that `statistics` and log_q were made from.
    """
    (gradient,) = torch.autograd.grad(statistics["divergence"].sum(), student)
    if divergence in ("reverse_kl", "jeffreys"):
        infinite = reference.kl(log_q.detach(), log_p) == torch.inf
        gradient = torch.where(infinite[:, None], 0.0, gradient)
    assert not gradient.isnan().any(), "the reference itself"
    return {name: field.detach() for name, field in statistics.items()}, gradient


def assert_right(
    stats, gradient: Tensor, right: tuple[dict[str, Tensor], Tensor], temperature: float
) -> None:
    statistics, exact = right
    assert_stats(stats, statistics, 5e-6)
    assert not gradient.isnan().any()
    # What float32 leaves of differences of probabilities, and then the rounding to the logits' own type.
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=0.02 / min(1.0, temperature))
    rounding = 0 if gradient.dtype == torch.float32 else torch.finfo(gradient.dtype).eps
    rounded = exact.to(gradient.dtype).double()
    error = torch.where(rounded == gradient, 0.0, gradient.double() - rounded).abs()
    assert (error <= 2e-5 * scale + rounding * rounded.abs()).all()


def check(
    student: Tensor,
    teacher: Tensor,
    divergence: str,
    temperature: float,
    mixture: dict,
    device: torch.device,
    *,
    teacher_dtype: torch.dtype = torch.float32,
    hidden: bool = False,
    group: dist.ProcessGroup | None = None,
    widths: list[int] | None = None,
) -> None:
    """One call on this rank's columns, of the widths of all ranks, beside the reference on the whole vocabulary."""
    rank = 0 if group is None else dist.get_rank(group)
    widths = widths or [student.shape[-1]]
    teacher = coded(teacher) if teacher_dtype == torch.uint8 else teacher.to(teacher_dtype)
    whole = student.double().requires_grad_()
    decoded_teacher = decoded(teacher) if teacher_dtype == torch.uint8 else teacher.double()
    labels = torch.arange(len(student)) * 7 % student.shape[-1]
    options = {"name": divergence, "temperature": temperature, **mixture}
    right = expected(
        whole,
        reference.statistics(whole, decoded_teacher, labels, **options),
        divergence,
        *((logits / temperature).log_softmax(-1) for logits in (decoded_teacher, whole)),
    )
    mine, theirs = (shard(logits, rank, widths) for logits in (student, teacher))
    theirs = vcrd.HiddenStates(*layer(theirs, device)) if hidden else theirs.to(device)
    mine = mine.to(device).requires_grad_()
    stats = vcrd.vocab_parallel_divergence(
        *(mine, theirs, labels.to(device)),
        divergence=divergence,
        temperature=temperature,
        group=group,
        **mixture,
    )
    (gradient,) = torch.autograd.grad(stats.divergence.sum(), mine)
    assert_right(on_cpu(stats), gradient.cpu(), (right[0], shard(right[1], rank, widths)), temperature)


def layer(logits: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """States and weight, both finite, whose product is these logits: -inf where it is too large for float32."""
    weight = torch.where(logits == -torch.inf, -(2.0**70), logits / LARGE)
    return LARGE * torch.eye(len(logits), device=device), weight.T.contiguous().to(device)


def check_head(student, teacher, divergence, temperature, mixture, device, group=None, widths=None) -> None:
    """As `check`, by the fused head."""
    rank = 0 if group is None else dist.get_rank(group)
    widths = widths or [student.shape[-1]]
    whole = student.double().requires_grad_()
    options = {"name": divergence, "temperature": temperature, **mixture}
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher.double(), whole))
    statistics = reference.statistics(whole, teacher, **options)
    statistics, exact = expected(whole, statistics, divergence, log_p, log_q)
    hidden, weight = layer(shard(student, rank, widths), device)
    hidden.requires_grad_()
    weight.requires_grad_()
    out = vcrd.fused_validity_calibrated_kl(
        *(hidden, weight, shard(teacher, rank, widths).to(device)),
        divergence=divergence,
        temperature=temperature,
        validity="uniform",  # a weight of 1
        group=group,
        chunk_bytes=4 * student.shape[-1] * 3,
        **mixture,
    )
    out.loss.sum().backward()
    assert not hidden.grad.isnan().any()
    gradient = (weight.grad / LARGE).T.cpu()
    assert torch.equal(out.loss, out.stats.divergence)
    assert_right(on_cpu(out.stats), gradient, (statistics, shard(exact, rank, widths)), temperature)


def check_topk(student, teacher, divergence, mixture, device, group=None, widths=None) -> None:
    """As `check`, of the divergence over the outcomes, and with entries of -inf among the k."""
    rank = 0 if group is None else dist.get_rank(group)
    widths = widths or [student.shape[-1]]
    log_p = teacher.double().log_softmax(-1)
    logprobs, ids = log_p.topk(min(8, log_p.shape[-1]), -1)
    log_tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    form = vcrd.TopKLogits(logprobs.float(), ids, log_tail.float())
    whole = student.double().requires_grad_()
    entries = (form.logprobs, form.ids, form.log_tail)
    exact = reference.topk_statistics(whole, *entries, name=divergence, **mixture)["divergence"]
    # An infinite reverse KL is all that reverse_kl and jeffreys do not share with forward_kl.
    reverse = reference.topk_statistics(whole.detach(), *entries, name="reverse_kl")["divergence"]
    (gradient,) = torch.autograd.grad(exact.sum(), whole)
    if divergence in ("reverse_kl", "jeffreys"):
        gradient = torch.where((reverse == torch.inf)[:, None], 0.0, gradient)
    assert not gradient.isnan().any(), "the reference itself"
    mine = shard(student, rank, widths).to(device).requires_grad_()
    stats = vcrd.vocab_parallel_divergence(
        mine, moved(form, device), divergence=divergence, group=group, **mixture
    )
    (found,) = torch.autograd.grad(stats.divergence.sum(), mine)
    found, divergence = found.cpu(), stats.divergence.detach().cpu().double()
    torch.testing.assert_close(divergence, exact.detach(), rtol=5e-6, atol=1e-5)
    wanted = shard(gradient, rank, widths)
    scale = gradient.abs().amax(-1, keepdim=True).clamp(min=0.02)
    # The gradient of a reverse KL is a difference of numbers as large as the divergence, in float32.
    terms = exact.detach().nan_to_num(posinf=0.0)[:, None] * torch.finfo(torch.float32).eps
    assert ((found - wanted).abs() <= 2e-5 * scale + terms).all()


def everything(rank: int, device: torch.device) -> None:
    size = dist.get_world_size()
    for seed in range(12):
        columns, temperature = (5, 40, 203, 1100)[seed % 4], (0.01, 0.028, 1.0)[seed % 3]
        student, teacher = drawn(seed, columns, (0.1, 3.0, 200.0)[seed // 4])
        first = columns // (size + 1)  # shards of different widths
        widths = [first] * (size - 1) + [columns - first * (size - 1)]
        world = {"group": dist.group.WORLD, "widths": widths}
        for divergence, mixture in SETTINGS:
            dtypes = DTYPES[seed % 3], [*DTYPES, torch.uint8][seed % 4]
            settled = (divergence, temperature, mixture, device)
            check(student.to(dtypes[0]), teacher, *settled, teacher_dtype=dtypes[1], **world)
            check(student, teacher, *settled, hidden=True, **world)
            check_head(student, teacher, *settled, **world)
            check_topk(student, teacher, divergence, mixture, device, **world)
