"""Validity estimators, relative validity, steps and the weight map against the reference and their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vcrd
from vcrd.loss import reference

pytestmark = pytest.mark.usefixtures("on_device")
ESTIMATORS = ("label", "margin", "confidence", "uniform")


def tensors(case: Case) -> tuple[torch.Tensor | None, ...]:
    return case.tensors(torch.get_default_device())


def stats_of(case: Case) -> tuple[vcrd.DivergenceStats, dict[str, torch.Tensor], torch.Tensor | None]:
    student, teacher, labels, mask = tensors(case)
    stats = vcrd.vocab_parallel_divergence(student, teacher, labels, mask=mask)
    return stats, reference.statistics(student, teacher, labels, mask=mask), mask


@pytest.mark.parametrize("validity", ESTIMATORS)
@pytest.mark.parametrize("with_steps", [False, True])
@pytest.mark.parametrize("normalization", ["none", "mean", "mass"])
def test_weights_match_the_reference(validity, with_steps, normalization):
    stats, expected, mask = stats_of(Case((4, 11), 97, scale=2.0, with_mask=True))
    steps = torch.randint(-1, 9, (4, 11)) if with_steps else None
    options = dict(sharpness=2.5, floor=0.2, ceiling=1.5, steps=steps, mask=mask, normalization=normalization)
    weight, rho = vcrd.validity_weights(stats, validity=validity, **options)
    expected_weight, expected_rho = reference.weights(
        *reference.log_validities(expected, validity), **options, divergence=expected["divergence"]
    )
    torch.testing.assert_close(weight.double(), expected_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rho.double(), expected_rho, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("validity", ["label", "margin", "confidence"])
def test_every_estimator_can_prefer_either_model(validity):
    """The hierarchy is not static: on some tokens the student is the more valid, on others the teacher."""
    stats, _, _ = stats_of(Case((500,), 40, scale=2.0))
    _, rho = vcrd.validity_weights(stats, validity=validity)
    assert (rho < 0.45).any() and (rho > 0.55).any()


def test_callable_and_scores_can_prefer_either_model():
    stats, _, _ = stats_of(Case((4,), 40))
    student, teacher = torch.tensor([0.1, 0.9, 0.5, 0.0]), torch.tensor([0.9, 0.1, 0.5, 0.0])
    for options in (
        dict(validity="scores", student_validity=student, teacher_validity=teacher),
        dict(validity=lambda s: (student, teacher)),
    ):
        _, rho = vcrd.validity_weights(stats, sharpness=1.0, **options)
        # Sharpness 1 is V_T / (V_T + V_S); equal validities are 1/2, also where both are 0.
        torch.testing.assert_close(rho, torch.tensor([0.9, 0.1, 0.5, 0.5]))


def test_a_callable_sees_both_actions():
    student = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 5.0]])

    def one_is_right(stats):
        return (stats.student_action == 1).float(), (stats.teacher_action == 1).float()

    out = vcrd.validity_calibrated_kl(student, teacher, validity=one_is_right)
    assert out.relative_validity.tolist() == [1.0, 0.5]


def test_defaults_are_those_of_the_method():
    stats, _, _ = stats_of(Case((50,), 40))
    weight, rho = vcrd.validity_weights(stats)
    by_hand = torch.sigmoid(4.0 * (stats.teacher_label_logprob - stats.student_label_logprob))
    torch.testing.assert_close(rho, by_hand)
    torch.testing.assert_close(weight, 0.1 + 1.8 * by_hand)


def test_equal_validity_is_plain_distillation_exactly():
    student, teacher, labels, _ = tensors(Case((9,), 300))
    for options in (dict(validity="uniform"), dict(validity="label", labels=torch.full((9,), -1))):
        out = vcrd.validity_calibrated_kl(student, teacher, options.pop("labels", labels), **options)
        assert (out.weight == 1).all() and (out.relative_validity == 0.5).all()
        assert torch.equal(out.loss, out.stats.divergence)
    plain = torch.nn.functional.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert relative_error(out.loss, plain) < 1e-6


def test_floor_above_ceiling_reverses_the_direction():
    stats, _, _ = stats_of(Case((50,), 40))
    forward, rho = vcrd.validity_weights(stats)
    backward, _ = vcrd.validity_weights(stats, floor=1.9, ceiling=0.1)
    torch.testing.assert_close(forward + backward, torch.full((50,), 2.0))
    assert (backward[rho > 0.6] < 1).all()


def test_loss_is_weight_times_divergence_plus_cross_entropy_and_the_weight_is_constant():
    case = Case((6,), 120, with_mask=True)
    student, teacher, labels, mask = tensors(case)
    student.requires_grad_()
    out = vcrd.validity_calibrated_kl(student, teacher, labels, mask=mask, ce_weight=0.3, divergence="jsd")
    torch.testing.assert_close(out.loss, out.weight * out.stats.divergence + 0.3 * out.stats.cross_entropy)
    gradient = torch.autograd.grad(out.loss.sum(), student)[0]
    copy = tensors(case)[0].double().requires_grad_()
    expected = reference.statistics(copy, teacher, labels, mask=mask, name="jsd")
    (out.weight.double() * expected["divergence"] + 0.3 * expected["cross_entropy"]).sum().backward()
    assert relative_error(gradient, copy.grad) < 1e-5


def test_a_step_does_not_depend_on_the_order_in_which_its_tokens_are_added_up():
    """A GPU adds in any order; here the tokens themselves change places."""
    stats, _, _ = stats_of(Case((300,), 40))
    steps = torch.arange(300) % 7
    order = torch.randperm(300, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(
        steps.device
    )
    _, rho = vcrd.validity_weights(stats, steps=steps)
    shuffled = vcrd.DivergenceStats(*(field[order] for field in stats))
    _, again = vcrd.validity_weights(shuffled, steps=steps[order])
    assert torch.equal(again, rho[order])


def test_an_unknown_validity_makes_its_step_unknown_and_no_other():
    stats, _, _ = stats_of(Case((6,), 40))
    known = torch.arange(6) != 1
    stats = stats._replace(student_label_logprob=stats.student_label_logprob.where(known, torch.nan))
    _, rho = vcrd.validity_weights(stats, steps=torch.tensor([0, 0, 1, 1, -1, -1]))
    assert rho.isnan().tolist() == [True, True, False, False, False, False]


def test_steps_share_the_mean_log_validity_and_none_keeps_its_own():
    stats, _, _ = stats_of(Case((6,), 40))
    student = torch.tensor([0.5, 0.25, 0.5, 0.5, 0.1, 0.9])
    teacher = torch.tensor([1.0, 1.0, 0.25, 0.5, 0.1, 0.3])
    steps = torch.tensor([7, 7, -1, 3, 3, -1])
    options = dict(validity="scores", student_validity=student, teacher_validity=teacher, sharpness=1.0)
    _, rho = vcrd.validity_weights(stats, steps=steps, **options)
    _, own = vcrd.validity_weights(stats, **options)
    step_7 = 1 / (1 + math.sqrt(0.5 * 0.25))
    torch.testing.assert_close(rho[:2], torch.full((2,), step_7))
    torch.testing.assert_close(rho[3:5], torch.full((2,), 0.5))
    torch.testing.assert_close(rho[[2, 5]], own[[2, 5]])
    # A masked token takes no part in its step.
    _, rho = vcrd.validity_weights(stats, steps=steps, mask=torch.tensor([0, 1, 1, 1, 1, 1]), **options)
    torch.testing.assert_close(rho[:2], torch.tensor([0.0, 0.8]))


def test_scores_per_step_are_indexed_by_the_step():
    stats, _, _ = stats_of(Case((2, 3), 40))
    steps = torch.tensor([[0, 0, 1], [2, 2, -1]])
    student, teacher = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.9, 0.5, 0.1])
    _, rho = vcrd.validity_weights(
        stats,
        validity="scores",
        sharpness=1.0,
        steps=steps,
        student_validity=student,
        teacher_validity=teacher,
    )
    torch.testing.assert_close(rho, torch.tensor([[0.9, 0.9, 0.5], [0.1, 0.1, 0.5]]))


# The device stays the same from example to example.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    steps=st.integers(1, 10),
    sharpness=st.floats(0, 50),
    floor=st.floats(0, 5),
    ceiling=st.floats(0, 5),
)
def test_weights_stay_between_floor_and_ceiling_and_are_constant_within_a_step(
    seed, tokens, steps, sharpness, floor, ceiling
):
    generator = torch.Generator().manual_seed(seed)
    stats, _, _ = stats_of(Case((tokens,), 30, seed=seed))
    step = torch.randint(0, steps, (tokens,), generator=generator, device="cpu").to(stats.divergence.device)
    weight, rho = vcrd.validity_weights(
        stats, validity="margin", sharpness=sharpness, floor=floor, ceiling=ceiling, steps=step
    )
    low, high = min(floor, ceiling), max(floor, ceiling)
    assert ((weight >= low - 1e-5) & (weight <= high + 1e-5)).all() and ((rho >= 0) & (rho <= 1)).all()
    for s in step.unique():
        assert weight[step == s].unique().numel() == 1


def test_swapping_the_models_mirrors_rho():
    student, teacher, labels, _ = tensors(Case((30,), 60))
    for validity in ("label", "margin", "confidence"):
        _, rho = vcrd.validity_weights(
            vcrd.vocab_parallel_divergence(student, teacher, labels), validity=validity
        )
        _, mirrored = vcrd.validity_weights(
            vcrd.vocab_parallel_divergence(teacher, student, labels), validity=validity
        )
        torch.testing.assert_close(rho + mirrored, torch.ones(30))


def test_mean_normalisation_of_nothing_is_finite():
    stats, _, _ = stats_of(Case((3,), 30))
    weight, rho = vcrd.validity_weights(stats, mask=torch.zeros(3), normalization="mean")
    assert (weight == 0).all() and (rho == 0).all()
