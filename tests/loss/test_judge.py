"""Privileged validity: the judge's probabilities of both actions, over payloads and shards, against the reference."""

from __future__ import annotations

import judge_jobs as jobs
import pytest
import torch
from cases import Case, on_cpu
from judge_jobs import KINDS, JudgeCase, check
from sharded_jobs import spawn

import vcrd


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_weights_losses_and_gradients_match_the_reference(kind, fused, device):
    for seed, divergence in enumerate(("forward_kl", "jsd")):
        check(JudgeCase(kind, seed, divergence, masked=seed == 0), device, fused=fused)


@pytest.mark.parametrize("kind", KINDS[::2])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_the_mean_and_the_gap_share_the_judges_verdicts(kind, fused, device):
    options = dict(normalization="mean", ce_weight=0.2)
    check(JudgeCase(kind, 3), device, fused=fused, with_steps=True, **options)
    check(JudgeCase(kind, 4), device, fused=fused, weighting="gap")
    check(JudgeCase(kind, 5), device, fused=fused, with_steps=True, weighting="gap", **options)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_match_the_reference(size, device, tmp_path):
    spawn(jobs.everything, size, tmp_path, device)


def test_one_all_gather_more_and_none_for_a_top_k(device, tmp_path):
    spawn(jobs.count_collectives, 2, tmp_path, device)


def test_what_one_rank_gets_wrong_is_one_sentence_on_every_rank(device, tmp_path):
    spawn(jobs.raises_everywhere, 2, tmp_path, device)


@pytest.mark.parametrize("kind", ["nan", "inf", "nothing", "codes"])
@pytest.mark.parametrize("fused", [False, True])
def test_rows_without_a_judge_are_skipped_or_nan(kind, fused, device):
    """The judge is no distribution in the second row."""
    student, teacher, labels, _ = Case((3,), 40).tensors(device)
    judge = torch.randn(3, 40, generator=torch.Generator().manual_seed(9)).to(device)
    if kind == "codes":
        judge = (judge - judge.amax(-1, keepdim=True)).div(-24).sqrt().mul(255).round().to(torch.uint8)
        judge[1] = 255
    else:
        judge[1] = {"nan": torch.nan, "inf": torch.inf, "nothing": -torch.inf}[kind]
    student.requires_grad_()
    hidden = (student, torch.eye(40, device=device)) if fused else (student,)
    loss = vcrd.fused_validity_calibrated_kl if fused else vcrd.validity_calibrated_kl
    given = dict(judge=judge, validity="privileged", ce_weight=0.5)
    out = loss(*hidden, teacher, labels.clamp(min=0), **given, skip_invalid_teacher=True)
    out.loss.sum().backward()
    assert out.stats.skipped.tolist() == [False, True, False]
    assert out.loss[1] == out.weight[1] == out.stats.divergence[1] == out.stats.cross_entropy[1] == 0
    assert (student.grad[1] == 0).all() and (student.grad[::2].abs().sum(-1) > 0).all()
    rest = vcrd.validity_calibrated_kl(
        student[::2], teacher[::2], labels[::2].clamp(min=0), **{**given, "judge": judge[::2]}
    )
    torch.testing.assert_close(out.loss[::2], rest.loss, rtol=1e-5, atol=1e-6)
    plain = vcrd.validity_calibrated_kl(student, teacher, labels.clamp(min=0), **given)
    assert plain.weight[1].isnan() and plain.weight[::2].isfinite().all()


def test_equal_actions_are_equally_valid_and_the_judge_may_prefer_either(device):
    student, teacher, labels, _ = Case((400,), 20, scale=2.0).tensors(device)
    judge = 2 * torch.randn(400, 20, generator=torch.Generator().manual_seed(1)).to(device)
    out = vcrd.validity_calibrated_kl(student, teacher, judge=judge, validity="privileged")
    same = out.stats.student_action == out.stats.teacher_action
    assert same.any() and (out.relative_validity[same] == 0.5).all()
    assert (out.relative_validity < 0.1).any() and (out.relative_validity > 0.9).any()
    by_callable = vcrd.validity_calibrated_kl(student, teacher, validity=_prefers(judge))
    torch.testing.assert_close(out.weight, by_callable.weight, rtol=1e-5, atol=1e-6)


def _prefers(judge):
    def estimator(stats):
        probability = judge.double().softmax(-1)
        pair = (stats.student_action, stats.teacher_action)
        return tuple(probability.gather(-1, action[:, None])[:, 0] for action in pair)

    return estimator


def test_two_tokens_outside_the_judges_top_k_are_equally_valid(device):
    """And a known one beats an unknown one, by the bound of TopKLogits."""
    form = vcrd.TopKLogits(
        torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[3, 4]]), torch.tensor([0.3]).log()
    )

    def rho(student_action, teacher_action):
        student, teacher = torch.zeros(2, 1, 10)
        student[0, student_action] = teacher[0, teacher_action] = 5.0
        judge = vcrd.TopKLogits(*(each.to(device) for each in (form.logprobs, form.ids, form.log_tail)))
        out = vcrd.validity_calibrated_kl(
            student.to(device), teacher.to(device), judge=judge, validity="privileged", sharpness=1.0
        )
        return float(out.relative_validity)

    assert rho(7, 8) == 0.5
    assert rho(7, 3) == pytest.approx(0.5 / (0.5 + 0.2)) and rho(4, 9) == pytest.approx(0.5)


def test_an_unknown_action_of_the_teacher_has_no_verdict(device):
    nothing = vcrd.TopKLogits(
        torch.full((2, 2), -torch.inf), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2)
    )
    teacher = vcrd.TopKLogits(
        *(each.to(device) for each in (nothing.logprobs, nothing.ids, nothing.log_tail))
    )
    judge = torch.randn(2, 9, generator=torch.Generator().manual_seed(1)).to(device)
    out = vcrd.validity_calibrated_kl(
        torch.randn(2, 9, generator=torch.Generator().manual_seed(2)).to(device),
        teacher,
        judge=judge,
        validity="privileged",
    )
    assert (out.relative_validity == 0.5).all()


def test_arguments_that_are_wrong_are_named():
    student, teacher, judge = torch.zeros(3, 4, 8)
    call = vcrd.validity_calibrated_kl
    with pytest.raises(ValueError, match="judge: needed by validity 'privileged', got None"):
        call(student, teacher, validity="privileged")
    with pytest.raises(
        ValueError, match="judge: expected none unless validity is 'privileged', got one with"
    ):
        call(student, teacher, torch.zeros(4, dtype=torch.long), judge=judge)
    with pytest.raises(
        ValueError, match="judge: expected another answer than the teacher's, .*, got the same"
    ):
        call(student, teacher, judge=teacher, validity="privileged")
    with pytest.raises(ValueError, match=r"judge: expected the student's leading shape \[4\], got \[3\]"):
        call(student, teacher, judge=judge[:3], validity="privileged")
    with pytest.raises(
        TypeError, match="judge: expected a tensor, DenseLogits, TopKLogits, HiddenStates or MixedLogits, got"
    ):
        call(student, teacher, judge="a solution", validity="privileged")
    stats = on_cpu(vcrd.vocab_parallel_divergence(student, teacher))
    with pytest.raises(ValueError, match="judged: expected log validities for 'privileged'"):
        vcrd.validity_weights(stats, validity="privileged")
    with pytest.raises(ValueError, match="judged: expected .* got them for 'margin'"):
        vcrd.validity_weights(stats, validity="margin", judged=(stats.divergence,) * 2)
