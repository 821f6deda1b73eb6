"""The weighting "gap" and the normalizations against the reference: in one process, and over layouts of ranks."""

from __future__ import annotations

import pytest
import torch
import weighting_jobs as jobs
from cases import Case, expected_weights
from sharded_jobs import spawn
from weighting_jobs import WEIGHINGS, Weighing

import vcrd
from vcrd.loss import reference

GAP = {"weighting": "gap"}


def names(weighing: Weighing) -> str:
    return f"{weighing.weighting}-{weighing.normalization}-{weighing.divergence}"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weighing", WEIGHINGS, ids=names)
def test_weights_losses_and_gradients_match_the_reference(weighing, fused, device):
    jobs.check(weighing, device, fused)


def test_data_ranks_with_and_without_tokens_share_their_statistics(device, tmp_path):
    spawn(jobs.of_data_ranks, 3, tmp_path, device)


def test_context_and_tensor_ranks_have_the_weights_of_the_whole_rows(device, tmp_path):
    spawn(jobs.of_context_ranks, 4, tmp_path, device)


def test_one_all_reduce_for_each_statistic_and_one_sentence_on_every_rank(device, tmp_path):
    spawn(jobs.calls, 2, tmp_path, device)


@pytest.mark.slow
def test_ranks_with_a_compiled_loss_share_their_statistics(device, tmp_path):
    spawn(jobs.compiled, 2, tmp_path, device)


@pytest.mark.parametrize("weighing", WEIGHINGS[:2], ids=names)
def test_compiled_equals_eager_without_graph_breaks(weighing, device):
    given = {name: tensor.nan_to_num().to(device) for name, tensor in jobs.tensors().items()}
    scored = dict(zip(("student_validity", "teacher_validity"), given["scores"], strict=True))
    arguments = dict(config=weighing.config(), mask=given["mask"], **(scored if weighing.scored else {}))

    def loss(leaf):
        out = vcrd.validity_calibrated_kl(1.5 * leaf, given["teacher"], given["labels"], **arguments)
        return out.loss.sum()

    a, b = (given["student"].clone().requires_grad_() for _ in range(2))
    eager, compiled = loss(a), torch.compile(loss, fullgraph=True, backend="aot_eager")(b)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(b.grad, a.grad)


def test_the_gap_by_hand(device):
    """p(y) - q(y) is 0.6, -0.3 and, without a label, 0."""
    p = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.5, 0.5]], device=device)
    q = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.1, 0.9]], device=device)
    labels = torch.tensor([0, 0, -1], device=device)
    rms = (0.45 / 3) ** 0.5
    expected = torch.tensor([1 + 0.6 / rms, 1 - 0.3 / rms, 1.0], device=device)
    out = vcrd.validity_calibrated_kl(q.log(), p.log(), labels, **GAP)
    torch.testing.assert_close(out.weight, expected)
    half = vcrd.validity_calibrated_kl(q.log(), p.log(), labels, **GAP, sharpness=0.5)
    torch.testing.assert_close(half.weight - 1, (expected - 1) / 2)
    clipped = vcrd.validity_calibrated_kl(q.log(), p.log(), labels, **GAP, sharpness=9, floor=0.25, ceiling=2)
    assert clipped.weight.tolist() == [2, 0.25, 1]
    usual = vcrd.validity_calibrated_kl(q.log(), p.log(), labels, **GAP, sharpness=9)
    torch.testing.assert_close(usual.weight, torch.tensor([3, 0.05, 1], device=device))


def test_a_proposal_counts_as_far_as_it_is_accepted(device):
    """The teacher's proposals have the gaps 0.6, 0.3, 0.3 and 0.1, the student's -0.6, the same token, -0.3 and -0.1.
    Rejected: the student's of the first token, both of the second, the teacher's of the last. Half accepted: the
    student's of the third."""
    p = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.4, 0.35, 0.25], [0.45, 0.5, 0.05]], device=device)
    q = torch.tensor([[0.2, 0.8, 0.0], [0.4, 0.6, 0.0], [0.1, 0.65, 0.25], [0.55, 0.4, 0.05]], device=device)
    student = torch.tensor([0.0, 0.0, 0.5, 1.0], device=device)
    teacher = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    gaps = torch.tensor([0.6, 0.0, 0.3 - 0.15, -0.1], device=device)
    expected = 1 + gaps / gaps.square().mean().sqrt()
    for options in (
        {"validity": "scores", "student_validity": student, "teacher_validity": teacher},
        {"validity": lambda stats: (student, teacher)},
    ):
        out = vcrd.validity_calibrated_kl(q.log(), p.log(), **GAP, **options)
        torch.testing.assert_close(out.weight, expected)


def test_a_proposal_of_both_models_counts_once(device):
    """The gaps are 0.2, of the one proposal; 0, since both proposals have all the probability; and 0.6."""
    p = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.9, 0.1]], device=device)
    q = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.3, 0.7]], device=device)
    scores = {"student_validity": torch.tensor([1.0, 1.0, 0.0], device=device)}
    scores["teacher_validity"] = torch.ones(3, device=device)
    out = vcrd.validity_calibrated_kl(q.log(), p.log(), **GAP, validity="scores", **scores)
    gaps = torch.tensor([0.2, 0.0, 0.6], device=device)
    torch.testing.assert_close(out.weight, 1 + gaps / gaps.square().mean().sqrt())


def test_a_proposal_that_is_not_known_is_not_verified(device):
    """-1, as of a teacher of which no token is known, whatever the score is."""
    student, teacher, _, _ = Case((4,), 40).tensors(device)
    stats = vcrd.vocab_parallel_divergence(student, teacher)
    unknown = torch.tensor([True, False, True, False], device=device)
    ones = torch.ones(4, device=device)
    weight, _ = vcrd.validity_weights(
        stats._replace(teacher_action=stats.teacher_action.masked_fill(unknown, -1)),
        **GAP,
        validity="scores",
        student_validity=ones,
        teacher_validity=ones,
    )
    assert (weight == 1).tolist() == unknown.tolist()


def test_scores_of_steps_say_nothing_of_tokens_without_a_step(device):
    student, teacher, _, _ = Case((2, 3), 40).tensors(device)
    stats = vcrd.vocab_parallel_divergence(student, teacher)
    steps = torch.tensor([[0, 0, 1], [2, 2, -1]], device=device)
    per_step = torch.tensor([0.9, 0.0, 0.4], device=device)
    weight, _ = vcrd.validity_weights(
        stats, **GAP, validity="scores", steps=steps, student_validity=per_step, teacher_validity=per_step
    )
    assert weight[1, 2] == weight[0, 2] == 1 and weight[0, 0] == weight[0, 1] != 1
    per_token = torch.where(steps >= 0, per_step[steps.clamp(min=0)], 0.0)
    expected, _ = expected_weights(
        {**stats._asdict(), "divergence": stats.divergence},
        (per_token.log(), per_token.log()),
        "gap",
        (per_token, per_token),
        steps=steps,
    )
    torch.testing.assert_close(weight.double(), expected)


def top_five(teacher: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The five largest log-probabilities, their ids, and the log-probability of all others."""
    log_p = teacher.nan_to_num().double().log_softmax(-1)
    logprobs, ids = log_p.topk(5, -1)
    return logprobs.float(), ids, log_p.scatter(-1, ids, -torch.inf).logsumexp(-1).float()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_label_outside_the_top_k_has_the_gap_of_the_tails(divergence, device):
    student, teacher, labels, mask = Case((6, 4), 40, with_mask=True, scale=1.0).tensors("cpu")
    top = top_five(teacher)
    expected = reference.topk_statistics(student, *top, labels, name=divergence, mask=mask)
    weights, _ = expected_weights(expected, reference.log_validities(expected, "label"), "gap", mask=mask)
    out = vcrd.validity_calibrated_kl(
        student.to(device),
        vcrd.TopKLogits(*(each.to(device) for each in top)),
        labels.to(device),
        mask=mask.to(device),
        divergence=divergence,
        **GAP,
    )
    outside = (top[1] != labels[..., None]).all(-1) & (labels >= 0) & (mask != 0)
    assert outside.any() and (weights[outside] != 1).any()
    torch.testing.assert_close(out.weight.cpu().double(), weights, rtol=1e-5, atol=1e-5)


def test_a_proposal_of_the_student_outside_the_top_k_has_its_largest_probability(device):
    student, teacher, _, mask = Case((6, 4), 40, with_mask=True, scale=1.0).tensors("cpu")
    top = top_five(teacher)
    scores = torch.rand(2, *mask.shape, generator=torch.Generator().manual_seed(4))
    expected = reference.topk_statistics(student, *top, None, name="jsd", mask=mask)
    outside = (top[1] != expected["student_action"][..., None]).all(-1) & (mask != 0)
    assert outside.any()
    weights, _ = expected_weights(expected, tuple(scores.double().log()), "gap", scores, mask=mask)
    out = vcrd.validity_calibrated_kl(
        student.to(device),
        vcrd.TopKLogits(*(each.to(device) for each in top)),
        mask=mask.to(device),
        divergence="jsd",
        validity="scores",
        student_validity=scores[0].to(device),
        teacher_validity=scores[1].to(device),
        **GAP,
    )
    torch.testing.assert_close(out.weight.cpu().double(), weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_without_a_label_every_weight_is_one(fused, device):
    student, teacher, _, _ = Case((9,), 30).tensors(device)
    labels = torch.full((9,), -1, device=device)
    head = (torch.eye(30, device=device),) if fused else ()
    loss = vcrd.fused_validity_calibrated_kl if fused else vcrd.validity_calibrated_kl
    for normalization in ("none", "mean", "mass"):
        out = loss(student, *head, teacher, labels, **GAP, normalization=normalization)
        assert (out.weight == 1).all() and torch.equal(out.loss, out.stats.divergence)


def test_equal_models_have_weights_near_one_and_nothing_to_divide_by(device):
    student, _, labels, _ = Case((9,), 300).tensors(device)
    for normalization in ("none", "mass"):
        out = vcrd.validity_calibrated_kl(
            student, student.clone(), labels.clamp(min=0), **GAP, normalization=normalization
        )
        torch.testing.assert_close(out.weight, torch.ones_like(out.weight), rtol=0, atol=0.3)
        assert out.loss.abs().max() < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("normalization", ["none", "mean", "mass"])
def test_a_row_that_is_no_number_does_not_reach_the_weights_of_others(normalization, fused, device):
    student, teacher, labels, _ = Case((5,), 30).tensors(device)
    student[2] = torch.nan
    head = (torch.eye(30, device=device),) if fused else ()
    loss = vcrd.fused_validity_calibrated_kl if fused else vcrd.validity_calibrated_kl
    arguments = dict(weighting="gap", normalization=normalization)
    mask = torch.tensor([1, 1, 0, 1, 1], device=device)
    expected = loss(student.clone(), *head, teacher, labels.clamp(min=0), mask=mask, **arguments)
    out = loss(student.clone(), *head, teacher, labels.clamp(min=0), **arguments)
    assert out.loss.isnan().tolist() == [False, False, True, False, False], "its own loss says so"
    keep = mask != 0
    torch.testing.assert_close(out.weight[keep], expected.weight[keep])
    # A row whose teacher is no distribution is skipped as a masked one is.
    teacher[2], student[2] = torch.nan, 0.0
    out = loss(student, *head, teacher, labels.clamp(min=0), **arguments, skip_invalid_teacher=True)
    torch.testing.assert_close(out.weight, expected.weight)


def test_an_infinite_divergence_is_not_in_the_mass(device):
    student, teacher, labels, _ = Case((5,), 30).tensors(device)
    student[1, :4] = -torch.inf
    arguments = dict(weighting="gap", normalization="mass")
    out = vcrd.validity_calibrated_kl(student, teacher, labels.clamp(min=4), **arguments)
    assert out.loss.isinf().tolist() == [False, True, False, False, False]
    finite = out.stats.divergence.isfinite()
    torch.testing.assert_close(out.loss[finite].sum(), out.stats.divergence[finite].sum())


def test_the_mass_is_kept_and_the_mean_is_one(device):
    student, teacher, labels, mask = Case((50,), 40, with_mask=True).tensors(device)
    for weighting in ("sigmoid", "gap"):
        arguments = dict(mask=mask, weighting=weighting, divergence="jsd")
        out = vcrd.validity_calibrated_kl(student, teacher, labels, **arguments, normalization="mass")
        torch.testing.assert_close(out.loss.sum(), out.stats.divergence.sum())
        out = vcrd.validity_calibrated_kl(student, teacher, labels, **arguments, normalization="mean")
        torch.testing.assert_close(out.weight[mask != 0].mean(), torch.ones((), device=device))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        *(
            (
                {"validity": name},
                f"weighting: expected 'sigmoid' with validity '{name}', which names no verified token, got 'gap'",
            )
            for name in ("margin", "confidence", "uniform")
        ),
        ({"floor": 2.0, "ceiling": 1.0}, "floor: expected at most the ceiling 1 with weighting 'gap', got 2"),
        ({"ceiling": 0.01}, "floor: expected at most the ceiling 0.01 with weighting 'gap', got 0.05"),
    ],
)
def test_a_gap_without_a_meaning_is_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        vcrd.LossConfig(**GAP, **options)


def test_what_the_configuration_leaves_out_depends_on_the_weighting():
    assert vcrd.LossConfig(weighting="gap").weight_map == (1, 0.05, 3)
    config = vcrd.LossConfig(ceiling=2.5)
    assert config.weight_map == (4, 0.1, 2.5) and config.pooled is None
    gap = vcrd.LossConfig(ceiling=2.5, weighting="gap")
    assert gap.weight_map == (1, 0.05, 2.5) and gap.pooled == "weighting"
    assert vcrd.LossConfig(normalization="mass").pooled == "normalization"
