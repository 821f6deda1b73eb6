"""Inputs and the comparison with the float64 reference that the loss's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import kernels_under_test  # noqa: F401  before vcrd's operators
import torch
from torch import Tensor

import vcrd
from vcrd.loss import reference
from vcrd.loss.config import DIVERGENCES, WEIGHTINGS

FLOAT_FIELDS = vcrd.DivergenceStats._fields[:10]


@dataclass(frozen=True)
class Case:
    """One call of the loss on the whole vocabulary; a test may cut it into shards.

    A teacher of uint8 is the square-root code of the logits' distances below their maximum.
    """

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

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """student logits, teacher logits, labels, mask. Padding and masked rows hold NaN, and as codes the maximum."""
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def logits(padding: int, dtype: torch.dtype) -> Tensor:
            x = (
                torch.randn(*self.tokens, self.vocab + padding, generator=generator, device="cpu")
                * self.scale
            )
            if dtype == torch.uint8:
                x = coded(x[..., : self.vocab])
                return torch.nn.functional.pad(x, (0, padding))
            x[..., self.vocab :] = torch.nan
            return x.to(dtype)

        student, teacher = (
            logits(self.student_padding, self.student_dtype),
            logits(self.teacher_padding, self.teacher_dtype),
        )
        labels = torch.randint(-1, self.vocab, self.tokens, generator=generator, device="cpu")
        if not self.with_mask:
            return student.to(device), teacher.to(device), labels.to(device), None
        mask = torch.randint(0, 2, self.tokens, generator=generator, device="cpu")
        student[mask == 0] = torch.nan
        teacher[mask == 0] = 0 if self.teacher_dtype == torch.uint8 else torch.nan
        return student.to(device), teacher.to(device), labels.to(device), mask.to(device)

    def upstream(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Gradients of the divergence and of the cross-entropy, different for each token."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)
        divergence = torch.randn(self.tokens, generator=generator, device="cpu")
        return divergence.to(device), torch.rand(self.tokens, generator=generator, device="cpu").to(device)

    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics and the gradient of the student's logits, from the reference, float64."""
        student, teacher, labels, mask = self.tensors()
        student = student.double().requires_grad_()
        if self.teacher_dtype == torch.uint8:
            teacher = decoded(teacher)
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


def expected_weights(
    stats: dict[str, Tensor],
    validities: tuple[Tensor, Tensor],
    weighting: str = "sigmoid",
    proposals: Sequence[Tensor] | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """`reference.weights` with what the weighting is made with by default. proposals: the validities of both, where the
    gap is at these and not at the label."""
    gap = reference.gaps(stats, proposals) if weighting == "gap" else None
    options = {**WEIGHTINGS[weighting]._asdict(), "divergence": stats["divergence"], "gap": gap, **options}
    return reference.weights(*validities, **options)


def coded(logits: Tensor) -> Tensor:
    """The square-root code: 255 sqrt(d / 24) of the distances d below the row's maximum, of 24 where d is more."""
    distance = logits.amax(-1, keepdim=True) - logits if logits.shape[-1] else logits
    return (255 * (distance.clamp(max=24) / 24).sqrt()).round().to(torch.uint8)


def decoded(codes: Tensor) -> Tensor:
    return -24 * (codes.double() / 255) ** 2


def call(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_max: Tensor | None = None,
    **extra,
):
    """The loss on these tensors with the case's settings."""
    return vcrd.vocab_parallel_divergence(
        student,
        teacher if row_max is None else vcrd.DenseLogits(teacher, row_max),
        labels,
        divergence=case.divergence,
        temperature=case.temperature,
        vocab_size=case.vocab,
        mask=mask,
        **case.settings,
        **extra,
    )


def run(case: Case, device: torch.device, **extra) -> tuple[vcrd.DivergenceStats, Tensor]:
    """Statistics and gradient of the student's logits, computed on `device`, both on the CPU."""
    student, teacher, labels, mask = case.tensors(device)
    stats = call(case, student.requires_grad_(), teacher, labels, mask, **extra)
    return backward(case, stats, student)


def backward(case: Case, stats: vcrd.DivergenceStats, student: Tensor) -> tuple[vcrd.DivergenceStats, Tensor]:
    divergence, cross_entropy = case.upstream(student.device)
    (stats.divergence * divergence + stats.cross_entropy * cross_entropy).sum().backward()
    return on_cpu(stats), student.grad.cpu()


def on_cpu(stats: vcrd.DivergenceStats) -> vcrd.DivergenceStats:
    return vcrd.DivergenceStats(*(field.detach().cpu() for field in stats))


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


def assert_matches(
    case: Case, stats: vcrd.DivergenceStats, gradient: Tensor, tolerance: float = 2e-6
) -> None:
    """Statistics and gradient are the reference's, the gradient as exact as its type can hold, and padding has none."""
    expected, expected_gradient = case.expected()
    assert_stats(stats, expected, tolerance)
    assert (gradient[..., case.vocab :] == 0).all(), "padding must have zero gradient"
    if gradient.dtype == torch.float32:
        assert relative_error(gradient, expected_gradient) <= 1e-5, case
    else:
        # The best that the dtype can hold, and a float32 value on the other side of a rounding boundary.
        best = (expected_gradient.to(gradient.dtype).double() - expected_gradient).abs()
        assert ((gradient.double() - expected_gradient).abs() <= best + 1e-6).all(), case


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
