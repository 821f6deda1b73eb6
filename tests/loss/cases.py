"""Inputs and the comparison with the float64 reference that the loss's tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import vcrd
from vcrd import reference
from vcrd.layout import DIVERGENCES

FLOAT_FIELDS = vcrd.DivergenceStats._fields[:10]


@dataclass(frozen=True)
class Case:
    """One call of the loss on the whole vocabulary; a test may cut it into shards."""

    tokens: tuple[int, ...] = (5,)
    vocab: int = 257
    student_padding: int = 0
    teacher_padding: int = 0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    scale: float = 3.0
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    with_mask: bool = False
    seed: int = 0
    settings: dict = field(default_factory=dict)  # alpha, beta

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """student logits, teacher logits, labels, mask. Padding and masked rows hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def logits(padding: int, dtype: torch.dtype) -> Tensor:
            x = torch.randn(*self.tokens, self.vocab + padding, generator=generator) * self.scale
            x[..., self.vocab :] = torch.nan
            return x.to(dtype)

        student, teacher = (
            logits(self.student_padding, self.student_dtype),
            logits(self.teacher_padding, self.teacher_dtype),
        )
        labels = torch.randint(-1, self.vocab, self.tokens, generator=generator)
        if not self.with_mask:
            return student, teacher, labels, None
        mask = torch.randint(0, 2, self.tokens, generator=generator)
        student[mask == 0] = torch.nan
        teacher[mask == 0] = torch.nan
        return student, teacher, labels, mask

    def upstream(self) -> tuple[Tensor, Tensor]:
        """Gradients of the divergence and of the cross-entropy, different for each token."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.tokens, generator=generator), torch.rand(self.tokens, generator=generator)

    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics and the gradient of the student's logits, from the reference, float64."""
        student, teacher, labels, mask = self.tensors()
        student = student.double().requires_grad_()
        stats = reference.statistics(
            student,
            teacher,
            labels,
            name=self.divergence,
            temperature=self.temperature,
            vocab_size=self.vocab,
            mask=mask,
            **self.settings,
        )
        divergence, cross_entropy = self.upstream()
        (stats["divergence"] * divergence + stats["cross_entropy"] * cross_entropy).sum().backward()
        return stats, student.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over largest expected value; 0 for nothing at all.

    Where the whole gradient is below 0.02 it is the small difference of probabilities near 1, which float32 resolves to
    6e-8: there 1e-5 stands for an absolute error of 2e-7.
    """
    if expected.numel() == 0:
        return 0.0 if actual.numel() == 0 else float("inf")
    error = (actual.double() - expected.double()).abs().max()
    return float(error / expected.double().abs().max().clamp(min=0.02))


def assert_stats(stats: vcrd.DivergenceStats, expected: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for name in FLOAT_FIELDS:
        actual = getattr(stats, name)
        assert actual.dtype == torch.float32
        # Relative for large numbers, absolute for those that are differences of logarithms near 0.
        torch.testing.assert_close(
            actual.double(),
            expected[name].double(),
            rtol=tolerance,
            atol=2 * tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name in ("student_action", "teacher_action"):
        assert getattr(stats, name).dtype == torch.int64
        assert torch.equal(getattr(stats, name), expected[name]), name


def product_of_cases() -> list[Case]:
    """Every divergence at every temperature, over sizes that divide nothing and all scales, in turn."""
    shapes = [((1,), 1), ((3,), 2), ((2, 3), 511), ((5,), 512), ((1,), 1037), ((7,), 1531), ((2, 1, 2), 63)]
    scales = [0.01, 3.0, 30.0, 1e4]
    cases = []
    for divergence in DIVERGENCES:
        for temperature in (0.5, 1.0, 3.0):
            for scale in scales:
                tokens, vocab = shapes[len(cases) % len(shapes)]
                cases.append(
                    Case(
                        tokens,
                        vocab,
                        student_padding=len(cases) % 3,
                        teacher_padding=(len(cases) * 5) % 7,
                        divergence=divergence,
                        temperature=temperature,
                        scale=scale,
                        with_mask=len(cases) % 2 == 1,
                        seed=len(cases),
                    )
                )
    return cases
