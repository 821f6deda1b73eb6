"""Logits of -inf on one side or on both, and what is as good as -inf: against the float64 reference, never a NaN."""

from __future__ import annotations

import math

import minus_infinity as rows
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernels_under_test import EMULATED
from minus_infinity import DTYPES, SETTINGS, check, check_head, check_topk, drawn
from sharded_jobs import spawn

import vcrd
from vcrd.loss.config import DIVERGENCES

EXAMPLES = {"max_examples": 8} if EMULATED else {}
COLUMNS = (2, 3, 40, 203, 1100, 5000)
TEMPERATURES = (0.01, 0.028, 0.3, 1.0, 4.0)
seeds = st.integers(0, 2**31)
# One device serves every example.
property_of = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], **EXAMPLES)


@given(
    seed=seeds,
    columns=st.sampled_from(COLUMNS),
    temperature=st.sampled_from(TEMPERATURES),
    scale=st.sampled_from([0.1, 3.0, 200.0]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from([*DTYPES, torch.uint8])),
)
@property_of
def test_every_pattern_of_minus_infinity(device, seed, columns, temperature, scale, dtypes):
    student, teacher = drawn(seed, columns, scale)
    for divergence, mixture in SETTINGS:
        settled = (divergence, temperature, mixture, device)
        check(student.to(dtypes[0]), teacher, *settled, teacher_dtype=dtypes[1])


@given(seed=seeds, columns=st.sampled_from(COLUMNS), scale=st.sampled_from([0.1, 3.0, 200.0]))
@example(seed=2910721, columns=40, scale=200.0)  # a divergence of 276 whose gradient is 1e-14
@property_of
def test_a_teacher_of_which_the_top_k_are_known(device, seed, columns, scale):
    for divergence, mixture in SETTINGS:
        check_topk(*drawn(seed, columns, scale), divergence, mixture, device)


@given(seed=seeds, temperature=st.sampled_from(TEMPERATURES))
@property_of
def test_a_teachers_hidden_states_and_the_fused_head(device, seed, temperature):
    student, teacher = drawn(seed, 203, 3.0)
    for divergence, mixture in SETTINGS:
        check(student, teacher, divergence, temperature, mixture, device, hidden=True)
        check_head(student, teacher, divergence, temperature, mixture, device)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_over_the_shards_of_a_group(device, size, tmp_path):
    spawn(rows.everything, size, tmp_path, device)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_rows_that_several_blocks_of_a_gpu_read(device, temperature):
    for divergence, mixture in SETTINGS:
        check(*drawn(4, 20_000, 3.0), divergence, temperature, mixture, device)


@given(seed=seeds, columns=st.sampled_from([2, 40, 1100]), temperature=st.sampled_from([0.01, 1.0]))
@property_of
def test_the_largest_and_the_smallest_numbers_give_no_nan(device, seed, columns, temperature):
    """Every finite logit has a place: where no float32 holds a divergence it is infinite."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.finfo(torch.float32).max
    numbers = [0.0, 1.0, 88.0, -104.0, 1e4, -1e10, 1e29, -1e31, -largest, largest, -math.inf]
    student, teacher = (
        torch.tensor(numbers)[torch.randint(len(numbers), (6, columns), generator=generator)]
        for _ in range(2)
    )
    student[:, 0], teacher[:, -1] = -1.0, -2.0  # some probability
    for divergence in DIVERGENCES:
        logits = student.to(device).requires_grad_()
        stats = vcrd.vocab_parallel_divergence(
            logits, teacher.to(device), divergence=divergence, temperature=temperature
        )
        stats.divergence.sum().backward()
        assert not any(field.isnan().any() for field in stats[:10]), divergence
        assert (stats.divergence >= 0).all() and not logits.grad.isnan().any(), divergence


def value(student, teacher, divergence, temperature=1.0, device="cpu"):
    """Divergence and gradient of one row."""
    logits = torch.as_tensor(student, dtype=torch.float32, device=device)[None].requires_grad_()
    teacher = torch.as_tensor(teacher, dtype=torch.float32, device=device)[None]
    stats = vcrd.vocab_parallel_divergence(logits, teacher, divergence=divergence, temperature=temperature)
    stats.divergence.sum().backward()
    return stats.divergence.item(), logits.grad[0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
@pytest.mark.parametrize(("columns", "without"), [(20, 1), (40, 1), (32768, 1000)])
def test_a_sum_of_many_terms_is_as_infinite_as_one(device, divergence, columns, without):
    teacher = torch.zeros(columns)
    teacher[:without] = -torch.inf
    found, gradient = value(torch.zeros(columns), teacher, divergence, device=device)
    assert found == math.inf and (gradient == 0).all()


@pytest.mark.parametrize("least", [-86.0, -100.0, -700.0])
def test_any_probability_where_the_student_has_none_is_infinite(device, least):
    found, gradient = value([0.0, -math.inf], [0.0, least], "forward_kl", device=device)
    assert found == math.inf and gradient.isfinite().all()
    assert value([0.0, least], [0.0, -math.inf], "reverse_kl", device=device)[0] == math.inf


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_no_float64_holds_is_no_probability(device, divergence):
    for student, teacher in (([0.0, -math.inf], [0.0, -800.0]), ([0.0, -800.0], [0.0, -math.inf])):
        assert value(student, teacher, divergence, device=device)[0] == 0
        student, teacher = ([x / 100 for x in logits] for logits in (student, teacher))
        assert value(student, teacher, divergence, 0.01, device)[0] == 0


@pytest.mark.parametrize(
    ("divergence", "right"), [("jsd", 0.21576155), ("skew_kl", 0.59783700), ("skew_reverse_kl", 0.83036554)]
)
@pytest.mark.parametrize("temperature", [0.01, 0.0293, 0.0295, 1.0])
def test_mixtures_are_finite_at_every_temperature(device, divergence, right, temperature):
    found, gradient = value([0.0, 0.0], [0.0, -math.inf], divergence, temperature, device)
    assert found == pytest.approx(right, rel=1e-6) and gradient.isfinite().all()


@pytest.mark.parametrize("columns", [40, 3000, 20000])
def test_references_follow_their_maxima_at_a_low_temperature(device, columns):
    """Logits rise slowly along the row, by much when they are divided by the temperature."""
    ramp = torch.linspace(0, 30, columns)[None]
    for divergence, mixture in SETTINGS:
        check(ramp, ramp.flip(1) / 7, divergence, 0.01, mixture, device)


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_of_0_leaves_nothing_of_an_infinite_divergence(fused):
    """Nor of what is beside it: the cross-entropy keeps its gradient."""
    student = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, -math.inf]])
    validities = {"student_validity": torch.ones(2), "teacher_validity": torch.tensor([0.0, 1.0])}
    chosen = dict(divergence="jeffreys", validity="scores", floor=0.0, ce_weight=1.0, **validities)
    labels = torch.tensor([0, 2])
    if fused:
        out = vcrd.fused_validity_calibrated_kl(torch.eye(2), student.T, teacher, labels, **chosen)
    else:
        out = vcrd.validity_calibrated_kl(student, teacher, labels, **chosen)
    assert out.weight[0] == 0 and out.stats.divergence.tolist() == [math.inf, math.inf]
    assert out.loss[0] == out.stats.cross_entropy[0] and out.loss[1] == math.inf
    out.loss.sum().backward()
    of_cross_entropy = student.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(student.grad, of_cross_entropy, rtol=1e-5, atol=1e-6)


def test_a_nan_stays_one_beside_minus_infinity(device):
    for divergence in DIVERGENCES:
        for student, teacher in (
            ([0.0, math.nan, -math.inf], [0.0] * 3),
            ([0.0] * 3, [-math.inf, math.nan, 0]),
        ):
            assert math.isnan(value(student, teacher, divergence, device=device)[0]), divergence
