"""A teacher of which the top k and the mass of the tail are known, against the k + 1 outcomes in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, assert_stats, backward, call, relative_error, run
from forms import NEVER, TopKCase, moved

import vcrd
from vcrd.loss import reference
from vcrd.loss.config import DIVERGENCES

TINY = 3 * 4 * 300  # bytes: few rows of most vocabularies here, one of the others


def compare(case: TopKCase, device: torch.device, tolerance: float = 2e-6, **extra) -> None:
    stats, gradient = run(case, device, **extra)
    expected, expected_gradient = case.expected()
    assert_stats(stats, expected, tolerance)
    assert relative_error(gradient, expected_gradient) <= 1e-5, case
    assert (gradient[..., case.vocab :] == 0).all(), "padding must have zero gradient"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_match_the_reference(device, divergence):
    shapes = [((5,), 257), ((2, 3), 64), ((7,), 9), ((2, 1, 2), 530), ((1,), 2)]
    for number, (tokens, vocab) in enumerate(shapes):
        for scale in (0.01, 3.0, 30.0, 1e3):
            for k in {1, min(8, vocab), vocab - 1, vocab}:
                case = TopKCase(
                    *(tokens, vocab, number % 3, 0, divergence, 1.0, scale),
                    with_mask=number % 2 == 0,
                    seed=number,
                    k=k,
                )
                compare(case, device, inplace_gradient=k % 2 == 0, _block_bytes=TINY)
    compare(TopKCase((0,), 33, divergence=divergence), device)


@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_narrow_students_are_read_exactly_and_rounded_once(device, student_dtype, divergence):
    case = TopKCase((6,), 1037, 3, 0, divergence, student_dtype=student_dtype, with_mask=True)
    for inplace in (False, True):
        stats, gradient = run(case, device, inplace_gradient=inplace, _block_bytes=2 * 4 * 1037)
        expected, expected_gradient = case.expected()
        assert_stats(stats, expected)
        assert gradient.dtype == student_dtype
        best = (expected_gradient.to(student_dtype).double() - expected_gradient).abs().max()
        assert (gradient.double() - expected_gradient).abs().max() <= best + 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mass", [1e-12, 1e-3, 0.999])
def test_tails_of_every_mass(device, divergence, mass):
    log_tail = float(torch.tensor(mass, dtype=torch.float64).log())
    compare(TopKCase((6,), 300, divergence=divergence, log_tail=log_tail), device)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_without_a_tail(device, divergence):
    case = TopKCase((6,), 300, divergence=divergence, log_tail=-torch.inf)
    stats, gradient = run(case, device)
    if divergence in ("reverse_kl", "jeffreys"):
        assert (stats.divergence == torch.inf).all(), "the student has mass where the teacher has none"
    else:
        expected, expected_gradient = case.expected()
        assert torch.isfinite(expected_gradient).all()
        assert relative_error(gradient, expected_gradient) <= 1e-5
        labelled_in_tail = expected["teacher_label_logprob"] == -torch.inf
        assert torch.equal(stats.teacher_label_logprob == -torch.inf, labelled_in_tail)
        torch.testing.assert_close(
            stats.divergence.double(), expected["divergence"].detach(), rtol=2e-6, atol=4e-6
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("lead", [25.0, 60.0, 1000.0])
def test_a_student_that_gives_the_tail_next_to_nothing(device, divergence, lead):
    """q_T of 1e-11, 1e-26 and less: 1 - sum q_i would be noise, or 0."""
    case = TopKCase((6,), 300, divergence=divergence, scale=1.0)
    student, teacher, labels, _ = case.tensors()
    raised = student.scatter_add(-1, teacher.ids, torch.full_like(teacher.logprobs, lead))
    exact = raised.double().requires_grad_()
    expected = case.statistics(exact, teacher, labels, None)
    upstream, of_cross_entropy = case.upstream()
    (expected["divergence"] * upstream + expected["cross_entropy"] * of_cross_entropy).sum().backward()
    student, teacher, labels, _ = case.tensors(device)
    student = raised.to(device).requires_grad_()
    stats, gradient = backward(case, call(case, student, teacher, labels, None), student)
    assert_stats(stats, expected)
    assert relative_error(gradient, exact.grad) <= 1e-5
    # The label of every other row lies in the tail.
    in_tail = labels.cpu()[1::2] >= 0
    assert (stats.student_label_logprob[1::2][in_tail] < -lead / 2).all() and in_tail.any()


def test_where_no_tail_is_left_its_mass_is_left_out(device):
    """The ids are the whole vocabulary, or all that the student can say: the ids' masses alone, normalised."""
    for divergence in DIVERGENCES:
        for log_tail in (-torch.inf, -1.0):
            compare(TopKCase((4,), 12, divergence=divergence, k=12, log_tail=log_tail), device)
        case = TopKCase((4,), 30, divergence=divergence)
        student, teacher, labels, _ = case.tensors(device)
        silent = torch.full_like(student, -torch.inf).scatter(
            -1, teacher.ids, student.gather(-1, teacher.ids)
        )
        silent.requires_grad_()
        stats = call(case, silent, teacher, None, None)
        stats.divergence.sum().backward()
        whole = teacher.logprobs.log_softmax(-1), student.gather(-1, teacher.ids).requires_grad_()
        dense = call(replace(case, vocab=case.k), whole[1], whole[0], None, None)
        dense.divergence.sum().backward()
        torch.testing.assert_close(stats.divergence, dense.divergence, rtol=2e-6, atol=4e-6)
        torch.testing.assert_close(silent.grad.gather(-1, teacher.ids), whole[1].grad, rtol=1e-5, atol=1e-6)
        assert silent.grad.isfinite().all() and (silent.grad != 0).sum() <= 4 * case.k


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tail_of_the_students_shape_is_the_tail_as_one_outcome(divergence):
    """The identity that the loss rests on, in float64 by automatic differentiation of both sides."""
    case = TopKCase((6,), 100, divergence=divergence)
    student, teacher, _, _ = case.tensors()
    outcomes = student.double().requires_grad_()
    one = case.statistics(outcomes, teacher, None, None)["divergence"]
    one.sum().backward()
    whole = student.double().requires_grad_()
    log_q = whole.log_softmax(-1)
    log_q_tail = log_q.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = (log_q - log_q_tail + teacher.log_tail[..., None].double()).detach()
    log_p = log_p.scatter(-1, teacher.ids, teacher.logprobs.double()).log_softmax(-1)
    many = reference.divergence(log_p, log_q, divergence, 0.1, 0.5)
    many.sum().backward()
    torch.testing.assert_close(many, one, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(whole.grad, outcomes.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_never_above_the_divergence_over_the_vocabulary_and_equal_at_its_size(device, divergence):
    dense = Case((20,), 120, divergence=divergence)
    student, teacher, labels, _ = dense.tensors(device)
    student.requires_grad_()
    full = call(dense, student, teacher, labels, None)
    (full_gradient,) = torch.autograd.grad(full.divergence.sum(), student)
    below = None
    for k in (1, 5, 40, 119, 120):
        case = TopKCase((20,), 120, divergence=divergence, k=k)
        _, topk, _, _ = case.tensors(device)
        stats = call(case, student, topk, labels, None)
        (gradient,) = torch.autograd.grad(stats.divergence.sum(), student)
        assert gradient.sum(-1).abs().max() <= 2e-6
        assert (stats.divergence <= full.divergence * (1 + 2e-6) + 4e-6).all()
        if below is not None:
            assert (below <= stats.divergence * (1 + 2e-6) + 4e-6).all(), "more ids, finer outcomes"
        below = stats.divergence
    # The last two: one token alone in the tail is known as well as any.
    torch.testing.assert_close(gradient, full_gradient, rtol=1e-5, atol=1e-6)
    for name in stats._fields:
        torch.testing.assert_close(getattr(stats, name), getattr(full, name), rtol=2e-6, atol=4e-6, msg=name)


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
def test_an_id_counts_once_at_its_largest_and_an_empty_entry_never(device, divergence):
    case = TopKCase((5,), 90, divergence=divergence, k=6)
    student, teacher, labels, _ = case.tensors(device)
    several = [
        (teacher.logprobs, teacher.ids),  # each twice
        (teacher.logprobs[:, :3] - 2, teacher.ids[:, :3]),  # smaller ones of the same ids
        (torch.full_like(teacher.logprobs, -torch.inf), torch.zeros_like(teacher.ids)),  # nothing, at id 0
    ]

    def result(logprobs, ids):
        leaf = student.clone().requires_grad_()
        form = vcrd.TopKLogits(logprobs, ids, teacher.log_tail)
        return backward(case, call(case, leaf, form, labels, None), leaf)

    stats, gradient = result(teacher.logprobs, teacher.ids)
    for logprobs, ids in several:
        for parts in (
            ((teacher.logprobs, logprobs), (teacher.ids, ids)),
            ((logprobs, teacher.logprobs), (ids, teacher.ids)),
        ):
            again, same = result(*(torch.cat(part, -1) for part in parts))
            assert all(torch.equal(a, b) for a, b in zip(stats, again, strict=True))
            assert torch.equal(gradient, same)
    doubled = vcrd.TopKLogits(
        *(torch.cat([x, x], -1) for x in (teacher.logprobs, teacher.ids)), teacher.log_tail
    )
    assert_stats(stats, case.statistics(student.cpu().double(), moved(doubled, "cpu"), labels.cpu(), None))


def test_every_type_of_integer_is_an_id(device):
    case = TopKCase((4,), 100)
    student, teacher, labels, _ = case.tensors(device)
    expected = call(case, student, teacher, labels, None).divergence
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        form = vcrd.TopKLogits(teacher.logprobs, teacher.ids.to(dtype), teacher.log_tail)
        assert torch.equal(call(case, student, form, labels, None).divergence, expected)


def test_the_loss_is_weighted_by_the_ratio_of_the_outcome(device):
    """For a label in the tail the relative validity is that of the tail's two masses."""
    case = TopKCase((6,), 80, log_tail=-2.0)
    student, teacher, _, _ = case.tensors(device)
    rest = torch.ones(6, 80, device=device).scatter_(-1, teacher.ids, 0.0)
    labels = torch.multinomial(rest, 1).squeeze(-1)
    leaf = student.clone().requires_grad_()
    out = vcrd.validity_calibrated_kl(leaf, teacher, labels, ce_weight=0.3, sharpness=1.0)
    log_q = student.cpu().double().log_softmax(-1)
    log_q_tail = log_q.scatter(-1, teacher.ids.cpu(), -torch.inf).logsumexp(-1)
    rho = torch.sigmoid(teacher.log_tail.cpu().double() - log_q_tail)
    torch.testing.assert_close(out.relative_validity.cpu().double(), rho, rtol=1e-5, atol=1e-6)
    out.loss.sum().backward()
    exact = student.cpu().double().requires_grad_()
    stats = case.statistics(exact, moved(teacher, "cpu"), labels.cpu(), None)
    ((0.1 + 1.8 * rho) * stats["divergence"] + 0.3 * stats["cross_entropy"]).sum().backward()
    assert relative_error(leaf.grad.cpu(), exact.grad) <= 1e-5


def test_what_is_not_a_number_is_loud_in_its_own_row(device):
    case = TopKCase((4,), 70)
    for spoilt in ("logprobs", "log_tail", "student"):
        student, teacher, labels, _ = case.tensors(device)
        {"student": student, **vars(teacher)}[spoilt][(2, 0) if spoilt != "log_tail" else 2] = torch.nan
        divergence = call(case, student, teacher, labels, None, _block_bytes=TINY).divergence
        assert divergence.isnan().tolist() == [False, False, True, False], spoilt


def test_ids_outside_the_vocabulary(device, monkeypatch):
    case = TopKCase((4,), 70, student_padding=2)
    for wrong in (-1, 70, NEVER):
        student, teacher, labels, _ = case.tensors(device)
        teacher.ids[2, 1] = wrong
        if device.type == "cpu":
            with pytest.raises(
                ValueError, match=f"teacher_logits.ids: expected ids from 0 to 69, got {wrong}"
            ):
                call(case, student, teacher, labels, None)
        # Where nobody looks before the kernels run.
        monkeypatch.setattr("vcrd.loss.divergence._check_ids", lambda *_: None)
        divergence = call(case, student, teacher, labels, None).divergence
        assert divergence.isnan().tolist() == [False, False, True, False]
        monkeypatch.undo()


def test_the_gradient_takes_the_logits_memory_and_inputs_keep_their_values(device):
    case = TopKCase((7,), 300, divergence="jsd", with_mask=True)
    for inplace in (False, True):
        student, teacher, labels, mask = case.tensors(device)
        kept = [tensor.clone() for tensor in (student, *vars(teacher).values(), labels, mask)]
        student.requires_grad_()
        loss = call(case, student, teacher, labels, mask, inplace_gradient=inplace, _block_bytes=TINY)
        loss.divergence.sum().backward(retain_graph=True)
        assert (student.grad.data_ptr() == student.data_ptr()) == inplace
        if inplace:
            with pytest.raises(RuntimeError, match="inplace_gradient"):
                loss.divergence.sum().backward()
        given = [tensor.detach() for tensor in (student, *vars(teacher).values(), labels, mask)]
        for tensor, before in list(zip(given, kept, strict=True))[inplace:]:
            assert torch.equal(tensor.nan_to_num(), before.nan_to_num())


def test_strided_rows_and_one_block_give_what_tiny_blocks_give(device):
    case = TopKCase((7,), 301, divergence="jeffreys")
    student, teacher, labels, _ = case.tensors(device)
    expected = run(case, device)
    wide = torch.zeros(7, 700, device=device)
    wide[:, 100:401] = student
    for inplace in (False, True):
        leaf = wide.clone().requires_grad_()
        stats = call(case, leaf[:, 100:401], teacher, labels, None, inplace_gradient=inplace, _block_bytes=1)
        stats, gradient = backward(case, stats, leaf)
        for a, b in zip(stats, expected[0], strict=True):  # a GPU may cut few rows into more parts
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient[:, 100:401], expected[1], rtol=1e-5, atol=1e-6)
        assert (gradient[:, :100] == 0).all() and (gradient[:, 401:] == 0).all()
