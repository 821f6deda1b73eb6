"""The fused head against the float64 reference: on one rank, over shards, and what it does with memory and masks."""

from __future__ import annotations

import head_jobs as jobs
import pytest
import torch
from head_jobs import HeadCase, check
from sharded_jobs import spawn

import vcrd
from vcrd.head_chunks import OutputLayer, common_multiple

pytestmark = pytest.mark.cpu_kernels


@pytest.mark.parametrize("case", jobs.cases(), ids=lambda c: f"{c.divergence}-{c.teacher}-{c.seed}")
def test_values_and_gradients_match_the_reference(case):
    check(case)


@pytest.mark.parametrize("size", [2, 4])
def test_shards_match_the_reference(size, tmp_path):
    spawn(jobs.everything, size, tmp_path, torch.device("cpu"))


def test_collectives_are_those_of_the_docstring(tmp_path):
    spawn(jobs.count_collectives, 2, tmp_path, torch.device("cpu"))


def test_what_one_rank_gets_wrong_is_one_sentence_on_every_rank(tmp_path):
    spawn(jobs.raises_everywhere, 2, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("upstream", "products"),
    [("mean", 1), ("each its own", 2), ("statistics too", 2)],
)
def test_logits_are_made_again_only_where_the_upstream_gradient_is_not_one_factor(
    upstream, products, monkeypatch
):
    made, plain = [], OutputLayer.logits
    monkeypatch.setattr(OutputLayer, "logits", lambda *a: made.append(len(a[1])) or plain(*a))
    case = HeadCase(
        masked=True, uneven=upstream == "each its own", and_stats=upstream == "statistics too", seed=3
    )
    check(case)
    assert sum(made) == products * int(case.tensors()["mask"].sum()), "masked tokens are not computed"


def test_a_second_backward_gives_the_same_gradients():
    tensors = HeadCase().tensors()
    weight = tensors["weight"].nan_to_num().requires_grad_()
    hidden = tensors["hidden"].requires_grad_()
    out = vcrd.fused_validity_calibrated_kl(hidden, weight, tensors["logits"], tensors["labels"])
    first = torch.autograd.grad(out.loss.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(out.loss.sum(), (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_and_no_grad_are_no_gradients():
    tensors = HeadCase().tensors()
    weight, hidden = tensors["weight"].nan_to_num(), tensors["hidden"].requires_grad_()
    given = (tensors["logits"], tensors["labels"])
    out = vcrd.fused_validity_calibrated_kl(hidden, weight, *given)
    out.loss.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None
    with torch.no_grad():
        quiet = vcrd.fused_validity_calibrated_kl(hidden, weight, *given)
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss)


def test_a_fractional_mask_is_what_the_upstream_gradient_is_expected_to_be():
    mask = torch.tensor([0.0, 0.25, 1.0, 0.5])
    assert common_multiple(3 * mask, mask, mask) == 3
    assert common_multiple(3 * mask.sqrt(), mask, mask) is None
    assert common_multiple(torch.tensor([torch.nan, 1.0]), None, None) is None
    assert common_multiple(torch.tensor([torch.inf, torch.inf]), None, None) is None
    assert common_multiple(torch.zeros(0), None, None) == 1


@pytest.mark.parametrize("in_forward", [True, False])
def test_rows_of_a_bad_teacher_are_skipped_as_with_stored_logits(in_forward):
    tensors = HeadCase().tensors()
    teacher = tensors["logits"].clone()
    teacher[1, 2, 5] = torch.nan
    results = []
    for fused in (False, True):
        hidden = tensors["hidden"].clone().requires_grad_()
        weight = tensors["weight"].nan_to_num().requires_grad_()
        options = {"skip_bad_teacher": True, "normalization": "mean"}
        if fused:
            out = vcrd.fused_validity_calibrated_kl(
                *(hidden, weight, teacher, tensors["labels"]), gradient_in_forward=in_forward, **options
            )
        else:
            out = vcrd.validity_calibrated_kl(hidden @ weight.T, teacher, tensors["labels"], **options)
        out.loss.sum().backward()
        results.append((out.loss.detach(), out.weight, hidden.grad, weight.grad))
    assert results[1][0][1, 2] == 0
    for stored, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, stored, rtol=1e-5, atol=1e-6)
