"""What the statistics say of a teacher's top k: facts of the teacher and bounds, whatever the student says."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_stats, call
from forms import NEVER, TopKCase, moved
from torch import Tensor

import vcrd
from vcrd.loss import reference

OF_THE_TEACHER = (
    "teacher_action",
    "teacher_logprob_of_teacher_action",
    "teacher_entropy",
    "teacher_label_logprob",
)


def best_of(logits: Tensor, k: int) -> vcrd.TopKLogits:
    """The k most probable tokens, of equal ones the lowest, in descending order of their ids."""
    log_p = logits.double().log_softmax(-1)
    ids = log_p.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1, descending=True).values
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return vcrd.TopKLogits(log_p.gather(-1, ids).float(), ids, tail.float())


def measured(student: Tensor, teacher, labels=None, device="cpu", **options) -> vcrd.DivergenceStats:
    if isinstance(teacher, vcrd.TopKLogits):
        teacher = moved(teacher, device)
    else:
        teacher = teacher.to(device)
    labels = None if labels is None else labels.to(device)
    stats = vcrd.vocab_parallel_divergence(student.to(device), teacher, labels, **options)
    return vcrd.DivergenceStats(*(field.cpu() for field in stats))


def test_the_students_own_token_is_not_the_teachers(device):
    """p = [.4, .2, .2, .2] of which one token is known, and a student that is sure of another."""
    p = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
    student = torch.tensor([[0.0, 9.0, 0.0, 0.0]])
    stats = measured(student, best_of(p.log(), 1), torch.tensor([2]), device)
    assert stats.student_action.item() == 1 and stats.teacher_action.item() == 0
    bound = torch.tensor(0.4).log()  # no other token is more probable than the known one
    for name in ("student_action", "teacher_action"):
        torch.testing.assert_close(getattr(stats, f"teacher_logprob_of_{name}")[0], bound)
    torch.testing.assert_close(stats.teacher_label_logprob[0], bound)
    torch.testing.assert_close(stats.teacher_entropy[0], -bound)
    torch.testing.assert_close(stats.student_logprob_of_teacher_action, student.log_softmax(-1)[:, 0])


@pytest.mark.parametrize("zeroed", [False, True])
def test_agreement_is_that_of_the_whole_logits(device, zeroed):
    """Random logits over 4,000 tokens, and a teacher without any knowledge, of which 64 tokens are known."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 100, 4000, generator=generator)
    teacher = teacher * (not zeroed)
    stats = measured(student, best_of(teacher, 64), device=device)
    assert torch.equal(stats.teacher_action, teacher.argmax(-1))
    agreement = (stats.student_action == stats.teacher_action).float().mean()
    assert agreement == (student.argmax(-1) == teacher.argmax(-1)).float().mean() < 0.05


@pytest.mark.parametrize("k", [1, 5, 29, 30])
def test_the_student_changes_nothing_of_the_teachers_and_bounds_hold(device, k):
    generator = torch.Generator().manual_seed(k)
    teacher = 2 * torch.randn(40, 30, generator=generator)
    labels = torch.randint(30, (40,), generator=generator)
    form, before = best_of(teacher, k), None
    for scale in (0.0, 1.0, 30.0, 1e3):
        student = scale * torch.randn(40, 30, generator=generator)
        if scale == 1:
            student[:20] = -torch.inf  # no mass but at known tokens
            student[:20].scatter_(-1, form.ids[:20], torch.zeros(20, k))
        stats, whole = measured(student, form, labels, device), measured(student, teacher, labels, device)
        facts = [getattr(stats, name) for name in OF_THE_TEACHER]
        assert before is None or all(map(torch.equal, facts, before))
        before = facts
        assert torch.equal(stats.teacher_action, whole.teacher_action)
        for name in ("teacher_logprob_of_teacher_action", "student_logprob_of_teacher_action"):
            torch.testing.assert_close(getattr(stats, name), getattr(whole, name), rtol=2e-6, atol=4e-6)
        for name, token in (
            ("teacher_label_logprob", labels),
            ("teacher_logprob_of_student_action", whole.student_action),
        ):
            got, true = getattr(stats, name), getattr(whole, name)
            known = (form.ids == token[:, None]).any(-1)
            torch.testing.assert_close(got[known], true[known], rtol=2e-6, atol=4e-6)
            assert (got >= true - 4e-6).all(), "an upper bound"
            least = torch.minimum(form.logprobs.amin(-1), form.log_tail)
            assert (got[~known] <= least[~known] + 4e-6).all(), "and no worse than what is known"
        assert (stats.teacher_entropy <= whole.teacher_entropy + 4e-6).all(), "a lower bound"
        if k >= 29:
            torch.testing.assert_close(stats.teacher_entropy, whole.teacher_entropy, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_of_equal_tokens_the_lowest_is_the_action_in_any_order(device, k):
    generator = torch.Generator().manual_seed(k)
    teacher = torch.randint(3, (64, 16), generator=generator).float()
    student = torch.randint(2, (64, 16), generator=generator).float()
    form, whole = best_of(teacher, k), measured(student, teacher, device=device)
    for order in (torch.arange(k), torch.randperm(k, generator=generator)):
        form = vcrd.TopKLogits(form.logprobs[:, order], form.ids[:, order], form.log_tail)
        stats = measured(student, form, device=device)
        for name in ("student_action", "teacher_action"):
            assert torch.equal(getattr(stats, name), getattr(whole, name))


def test_more_entries_than_tokens_are_the_whole_teacher(device):
    """Each id twice, and empty entries at ids of the padding and at none at all."""
    case = Case((6,), 12, student_padding=4)
    student, teacher, labels, _ = case.tensors()
    form = best_of(teacher, 12)
    empty = torch.full((6, 3), -torch.inf)
    nowhere = torch.tensor([12, 15, NEVER]).expand(6, 3)
    form = vcrd.TopKLogits(
        torch.cat([form.logprobs - 1, empty, form.logprobs], -1),
        torch.cat([form.ids, nowhere, form.ids], -1),
        torch.full((6,), -1.0),  # nothing is left that could have it
    )
    stats = measured(student, form, labels, device, vocab_size=12)
    assert_stats(stats, reference.statistics(student, teacher, labels, vocab_size=12))


def test_a_known_token_in_the_padding_is_refused_or_no_distribution(device):
    student, labels = torch.zeros(2, 16), torch.zeros(2, dtype=torch.long)
    form = best_of(torch.randn(2, 16, generator=torch.Generator().manual_seed(1)), 4)
    form.ids[1, 2] = 13
    form.ids[0] = torch.arange(4)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="teacher_logits.ids: expected ids from 0 to 11, got 13"):
            measured(student, form, labels, device, vocab_size=12)
    with pytest.MonkeyPatch.context() as patch:  # where nobody looks before the kernels run
        patch.setattr("vcrd.loss.divergence._check_ids", lambda *_: None)
        stats = measured(student, form, labels, device, vocab_size=12)
        skipped = measured(student, form, labels, device, vocab_size=12, skip_invalid_teacher=True)
    for name in (*OF_THE_TEACHER[1:], "divergence", "student_logprob_of_teacher_action"):
        assert getattr(stats, name)[0].isfinite(), name
    for name in (*OF_THE_TEACHER[1:], "divergence"):
        assert getattr(stats, name)[1].isnan(), name
    assert stats.teacher_action.tolist() == [int(form.ids[0, form.logprobs[0].argmax()]), 0]
    assert (
        skipped.skipped.tolist() == [False, True] and skipped.divergence[1] == skipped.teacher_entropy[1] == 0
    )


def test_without_a_known_token_everything_is_a_bound_and_neither_model_is_preferred(device):
    student = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    nothing = torch.full((3, 2), -torch.inf)
    form = vcrd.TopKLogits(nothing, torch.zeros(3, 2, dtype=torch.long), torch.zeros(3))
    stats = measured(student, form, torch.tensor([0, 4, -1]), device)
    expected = reference.topk_statistics(student, nothing, form.ids, form.log_tail, torch.tensor([0, 4, -1]))
    assert_stats(stats, expected)
    assert (stats.teacher_action == -1).all() and (stats.teacher_entropy == 0).all()
    out = vcrd.validity_calibrated_kl(student.to(device), moved(form, device), validity="margin")
    assert (out.relative_validity == 0.5).all()


@pytest.mark.parametrize("validity", ["label", "margin", "confidence", "uniform"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_estimator_reads_facts_of_the_teacher(device, validity, fused):
    generator = torch.Generator().manual_seed(3)
    for k in (1, 4, 23, 24):
        hidden = torch.randn(2, 9, 6, generator=generator)
        weight = torch.randn(24 + 3, 6, generator=generator)
        student = hidden @ weight.T
        form = best_of(2 * torch.randn(2, 9, 24, generator=generator), k)
        labels = torch.randint(-1, 24, (2, 9), generator=generator)
        steps = torch.randint(-1, 4, (2, 9), generator=generator)
        mask = torch.randint(2, (2, 9), generator=generator)
        form.logprobs[mask == 0], form.ids[mask == 0] = torch.nan, NEVER
        expected = reference.topk_statistics(
            *(student, form.logprobs, form.ids, form.log_tail, labels), vocab_size=24, mask=mask
        )
        given = (hidden.to(device), weight.to(device)) if fused else (student.to(device),)
        loss = vcrd.fused_validity_calibrated_kl if fused else vcrd.validity_calibrated_kl
        for grouped in (None, steps):
            out = loss(
                *(*given, moved(form, device), labels.to(device)),
                vocab_size=24,
                mask=mask.to(device),
                steps=None if grouped is None else grouped.to(device),
                validity=validity,
                normalization="mean",
            )
            right, rho = reference.weights(
                *reference.log_validities(expected, validity), steps=grouped, mask=mask, normalization="mean"
            )
            torch.testing.assert_close(out.relative_validity.cpu().double(), rho, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(out.weight.cpu().double(), right, rtol=2e-5, atol=2e-6)
            assert_stats(vcrd.DivergenceStats(*(field.detach().cpu() for field in out.stats)), expected, 2e-5)


def test_a_shift_of_the_masses_is_no_other_teacher(device):
    """The masses are normalised: their logarithms may all be off by the same."""
    case = TopKCase((6,), 50)
    student, form, labels, _ = case.tensors()
    shifted = vcrd.TopKLogits(form.logprobs - 3, form.ids, form.log_tail - 3)
    for a, b in zip(measured(student, form, labels), measured(student, shifted, labels), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)
    expected = case.statistics(student.double(), shifted, labels, None)
    assert_stats(measured(student, shifted, labels, device), expected)


def test_the_reference_is_the_reference_of_whole_logits_where_every_token_is_known():
    case = Case((7,), 20, with_mask=True)
    student, teacher, labels, mask = case.tensors()
    form = best_of(teacher.nan_to_num(), 20)
    whole = reference.statistics(student, teacher, labels, mask=mask)
    got = reference.topk_statistics(student, form.logprobs, form.ids, form.log_tail, labels, mask=mask)
    for name, expected in whole.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(got["teacher_label_log_validity"], got["teacher_label_logprob"])
    assert_stats(call(case, student, moved(form, "cpu"), labels, mask), whole)
