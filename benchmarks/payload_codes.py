"""Codes for a teacher's logits, and the errors of each in KL and direction of the gradient, in float64.

A relative code stores the distance d = row maximum - logit, which is small for probable tokens. An 8-bit code is a
table of 256 distances, and each logit takes the nearest one. All functions work on [rows, vocabulary] logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vcrd
from vcrd.link.payload import encode, payload_named, row_max
from vcrd.loss import reference

BLOCK_ROWS = 16  # rows in float64 at a time

# (student's logits float32, student's log-probabilities float64) -> KL(p || q) [rows], its gradient [rows, vocabulary]
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Code:
    """prepare: encodes the teacher's float32 logits; its result computes KL and gradient for any student."""

    name: str
    bytes: int
    prepare: Callable[[Tensor], Evaluate]


@dataclass(frozen=True)
class Errors:
    """Over all rows: mean and largest |KL - exact KL| in nat, mean cosine of the gradient and the exact one."""

    mean: float
    largest: float
    cosine: float


def distance(logits: Tensor) -> Tensor:
    """The distance below the maximum of the row, in float32 as in the payloads."""
    return logits.amax(-1, keepdim=True) - logits


def decoded(name: str, size: int, read: Callable[[Tensor], Tensor]) -> Code:
    """read: float32 logits -> the decoded logits, each row up to a shift."""

    def prepare(logits: Tensor) -> Evaluate:
        log_p = read(logits).double().log_softmax(-1)
        return lambda student, log_q: (reference.kl(log_p, log_q), log_q.exp() - log_p.exp())

    return Code(name, size, prepare)


def through_the_loss(payload_name: str) -> Code:
    """The encoder and decoder of the payload, then the kernels of the package in float32."""
    payload = payload_named(payload_name)

    def prepare(logits: Tensor) -> Evaluate:
        wire = encode(payload, logits[:, None], row_max(logits[:, None]))[:, 0]

        def evaluate(student: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
            student = student.clone().requires_grad_()
            divergence = vcrd.vocab_parallel_divergence(student, wire).divergence
            (gradient,) = torch.autograd.grad(divergence.sum(), student)
            return divergence.detach().double(), gradient.double()

        return evaluate

    return Code(f"{payload_name}, vcrd's loss", payload.dtype.itemsize, prepare)


def shipped(payload_name: str) -> Code:
    """The encoder of the payload, decoded by its documented formula in float64."""
    payload = payload_named(payload_name)

    def read(logits: Tensor) -> Tensor:
        wire = encode(payload, logits[:, None], row_max(logits[:, None]))[:, 0].double()
        return -24 * (wire / 255) ** 2 if payload.dtype == torch.uint8 else wire

    return decoded(payload_name, payload.dtype.itemsize, read)


def by_table(name: str, levels: Tensor) -> Code:
    """levels: [256] distances, ascending, float64."""
    between = ((levels[1:] + levels[:-1]) / 2).float()
    return decoded(name, 1, lambda logits: -levels[torch.bucketize(distance(logits), between)])


UNIT = torch.arange(256, dtype=torch.float64) / 255


def power(exponent: float, top: float) -> Tensor:
    """The square root code has exponent 2."""
    return top * UNIT**exponent


def mu_law(scale: float, top: float) -> Tensor:
    """Steps grow as scale + d: uniform in log(1 + d / scale)."""
    return scale * torch.expm1(UNIT * math.log1p(top / scale))


def root_of_probability(root: float, top: float) -> Tensor:
    """Uniform in exp(-d / root)."""
    return -root * torch.log1p(UNIT * math.expm1(-top / root))


def rational(scale: float, top: float) -> Tensor:
    """Steps grow as (scale' + d)^2 with scale' = scale / (1 - scale / top): uniform in d / (scale' + d). `scale` is
    255 times the step at d = 0."""
    return scale * UNIT / (1 - (1 - scale / top) * UNIT)


def polynomial(scale: float, degree: int, top: float) -> Tensor:
    return scale * UNIT + (top - scale) * UNIT**degree


def companded(logits: Tensor, top: float = 30.0, bins: int = 3000) -> Tensor:
    """The table with the least sum of p (error of d)^2 in theory: the density of the codes is the cube root of the
    probability per unit of distance, measured on `logits`."""
    mass = torch.zeros(bins, dtype=torch.float64)
    for rows in logits.split(BLOCK_ROWS):
        d = distance(rows)
        p = (-d.double()).softmax(-1) * (d > 0)  # every code stores the maximum exactly
        mass.scatter_add_(0, (d * (bins / top)).long().clamp_(max=bins - 1).flatten(), p.flatten())
    # Smoothed over a third of a nat on both sides, because single tokens are no density.
    width = bins // 90
    padded = torch.cat([mass[:width].flip(0), mass, mass[-width:].flip(0)])
    density = padded.unfold(0, 2 * width + 1, 1).mean(-1) ** (1 / 3)
    cumulative = torch.cat([density.new_zeros(1), density.cumsum(0)])
    wanted = UNIT * cumulative[-1]
    right = torch.searchsorted(cumulative, wanted).clamp(1, bins)
    rise = cumulative[right] - cumulative[right - 1]
    return (right - 1 + (wanted - cumulative[right - 1]) / rise.clamp_min(1e-300)) * (top / bins)


def all_codes(sample: Tensor) -> list[Code]:
    """sample: teacher logits for the companding table."""
    e4m3 = torch.float8_e4m3fn
    return [
        decoded("raw bf16", 2, lambda logits: logits.bfloat16()),
        decoded("bf16 of d", 2, lambda logits: -distance(logits).bfloat16().float()),
        shipped("float16"),
        decoded("raw e4m3", 1, lambda logits: logits.clamp(-448, 448).to(e4m3)),
        decoded("e4m3 of d", 1, lambda logits: -distance(logits).clamp(max=448).to(e4m3).float()),
        shipped("logits_8bit"),
        by_table("d = 20 u^2", power(2, 20)),
        by_table("d = 32 u^2", power(2, 32)),
        by_table("d = 24 u^1.5", power(1.5, 24)),
        by_table("d = 24 u^2.5", power(2.5, 24)),
        by_table("d = 24 u^3", power(3, 24)),
        by_table("mu-law, scale 1, to 24", mu_law(1, 24)),
        by_table("mu-law, scale 0.5, to 24", mu_law(0.5, 24)),
        by_table("p^(1/5), to 24", root_of_probability(5, 24)),
        by_table("p^(1/5), to 30", root_of_probability(5, 30)),
        by_table("d = 3 u / (1 - 0.875 u)", rational(3, 24)),
        by_table("d = 3 u / (1 - 0.9 u)", rational(3, 30)),
        by_table("d = 5 u + 25 u^6", polynomial(5, 6, 30)),
        by_table("companded by p^(1/3)", companded(sample)),
        through_the_loss("float32"),
        through_the_loss("float16"),
        through_the_loss("logits_8bit"),
    ]


def measure(
    teacher: Tensor, students: Mapping[str, Tensor], codes: Sequence[Code]
) -> tuple[dict[str, float], dict[str, dict[str, Errors]]]:
    """(mean exact KL by student, errors by code and student). All logits float32 [rows, vocabulary]."""
    divergences: dict[str, list[Tensor]] = {name: [] for name in students}
    found: dict = {code.name: {name: ([], []) for name in students} for code in codes}
    for start in range(0, len(teacher), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        truth = decoded("exact", 4, lambda logits: logits).prepare(teacher[rows])
        log_q = {name: logits[rows].double().log_softmax(-1) for name, logits in students.items()}
        exact = {name: truth(students[name][rows], log_q[name]) for name in students}
        for name, (divergence, _) in exact.items():
            divergences[name].append(divergence)
        for code in codes:
            evaluate = code.prepare(teacher[rows])
            for name, (divergence, gradient) in exact.items():
                got, got_gradient = evaluate(students[name][rows], log_q[name])
                errors, cosines = found[code.name][name]
                errors.append((got - divergence).abs())
                cosines.append(cosine_similarity(got_gradient, gradient, dim=-1))

    def joined(errors: list[Tensor], cosines: list[Tensor]) -> Errors:
        all_errors = torch.cat(errors)
        return Errors(all_errors.mean().item(), all_errors.max().item(), torch.cat(cosines).mean().item())

    return (
        {name: torch.cat(parts).mean().item() for name, parts in divergences.items()},
        {code: {name: joined(*parts) for name, parts in of.items()} for code, of in found.items()},
    )
