"""One shard against the float64 reference: values, gradients, and what must not happen to the caller's tensors."""

from __future__ import annotations

import mmap

import pytest
import torch
from cases import Case, assert_stats, product_of_cases, relative_error, run
from kernels_under_test import EMULATED

import vcrd
from vcrd.loss.config import DIVERGENCES


@pytest.mark.parametrize("inplace", [False, True])
def test_values_and_gradients_match_the_reference(device, inplace):
    for case in product_of_cases():
        stats, gradient = run(case, device, inplace_gradient=inplace)
        expected, expected_gradient = case.expected()
        assert_stats(stats, expected)
        assert relative_error(gradient, expected_gradient) <= 1e-5, case
        assert (gradient[..., case.vocab :] == 0).all(), "padding must have zero gradient"


@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_narrow_dtypes_are_as_exact_as_float32_rounded_once(device, student_dtype, divergence):
    case = Case((6,), 1037, 3, 5, divergence, 1.0, 3.0, student_dtype, torch.bfloat16, with_mask=True)
    stats, gradient = run(case, device)
    expected, expected_gradient = case.expected()
    assert_stats(stats, expected)
    assert gradient.dtype == student_dtype
    # The best that the dtype can hold is the exact gradient rounded; half a unit in the last place more is allowed for
    # the float32 value that lies on the other side of a rounding boundary.
    best = (expected_gradient.to(student_dtype).double() - expected_gradient).abs().max()
    assert (gradient.double() - expected_gradient).abs().max() <= best + 1e-6


def test_every_pair_of_dtypes_is_read_exactly(device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for student_dtype in dtypes:
        for teacher_dtype in (*dtypes, torch.uint8):
            case = Case((3,), 700, student_dtype=student_dtype, teacher_dtype=teacher_dtype)
            stats, _ = run(case, device)
            assert_stats(stats, case.expected()[0])


def test_all_float16_and_bfloat16_numbers_survive_the_conversion(device):
    """Every bit pattern, subnormals included: read as a teacher's logit at the student's action."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(0, 2**16, 37 if EMULATED else 1, dtype=torch.int32).to(torch.int16).view(dtype)
        # Past 1e37 a distance from the maximum is taken as infinite.
        finite = values[values.double().abs() < 1e37]
        student = torch.tensor([0.0, -1.0]).expand(len(finite), 2)
        teacher = torch.stack([finite, torch.zeros_like(finite)], dim=1)
        stats = vcrd.vocab_parallel_divergence(student.to(device), teacher.to(device))
        expected = teacher.double().log_softmax(-1)[:, 0]
        torch.testing.assert_close(
            stats.teacher_logprob_of_student_action.double().cpu(), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
def test_gradient_is_rounded_to_nearest_even(device, loss):
    """With q = (1, 0) and p or the label (0, 1) it is upstream * (1, -1), of chosen numbers. Forward KL, and all other
    divergences with whatever they bring along, are written by two loops."""
    divergence = "forward_kl" if loss == "divergence" else "jeffreys"
    rows = 256 if EMULATED else 4096
    for dtype, digits in ((torch.float16, 10), (torch.bfloat16, 7)):
        generator = torch.Generator().manual_seed(0)
        exponents = torch.randint(-9, 4, (rows,), generator=generator)
        upstream = torch.randn(rows, generator=generator) * 10.0**exponents
        # Every second one lies halfway between two neighbours.
        odd = 2 * (torch.arange(rows // 2) % 2**digits) + 1
        upstream[::2] = 1 + odd * 2.0 ** -(digits + 1)
        student = torch.tensor([0.0, -torch.inf], dtype=dtype, device=device).repeat(rows, 1)
        teacher = student.flip(1) if loss == "divergence" else student.clone()
        labels = torch.ones(rows, dtype=torch.int64, device=device)
        student.requires_grad_()
        stats = vcrd.vocab_parallel_divergence(student, teacher, labels, divergence=divergence)
        getattr(stats, loss).backward(upstream.to(device))
        assert torch.equal(student.grad.cpu(), torch.stack([upstream, -upstream], 1).to(dtype))


def test_minus_infinity_is_no_probability_and_not_a_number_nowhere(device):
    student = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf], [0.0, 1.0, 2.0, 3.0]], device=device)
    teacher = torch.tensor([[2.0, -torch.inf, 0.0, -torch.inf], [-torch.inf, 1.0, -torch.inf, 0.0]])
    student.requires_grad_()
    teacher = teacher.to(device)
    for divergence in DIVERGENCES:
        student.grad = None
        stats = vcrd.vocab_parallel_divergence(student, teacher, divergence=divergence)
        stats.divergence[0].backward()
        for name in ("divergence", "student_entropy", "teacher_entropy"):
            assert torch.isfinite(getattr(stats, name)[0])
        assert torch.isfinite(student.grad).all(), divergence
        assert (student.grad[0, [1, 3]] == 0).all()
    infinite = vcrd.vocab_parallel_divergence(student, teacher, divergence="reverse_kl").divergence[1]
    assert infinite == torch.inf


def test_not_a_number_is_loud_in_its_own_row_and_silent_in_others(device):
    student, teacher = torch.randn(3, 600, device=device), torch.randn(3, 600, device=device)
    student[1, 555] = torch.nan
    stats = vcrd.vocab_parallel_divergence(student, teacher)
    assert stats.divergence.isnan().tolist() == [False, True, False]
    empty = vcrd.vocab_parallel_divergence(
        torch.full((1, 4), -torch.inf, device=device), torch.zeros(1, 4, device=device)
    )
    assert empty.divergence.isnan().all()


def test_no_tokens_at_all(device):
    for divergence in DIVERGENCES:
        case = Case((0,), 33, divergence=divergence)
        stats, gradient = run(case, device)
        assert stats.divergence.shape == (0,) and gradient.shape == (0, 33)


def test_mask_of_zeros_reads_nothing(device):
    student = torch.full((4, 9), torch.nan, device=device, requires_grad=True)
    labels, mask = torch.full((4,), 10**6, device=device), torch.zeros(4, device=device)
    out = vcrd.validity_calibrated_kl(student, student.detach().clone(), labels, mask=mask, ce_weight=1.0)
    out.loss.sum().backward()
    assert (out.loss == 0).all() and (student.grad == 0).all() and (out.weight == 0).all()


def test_inputs_keep_their_values_and_the_teacher_gets_no_gradient(device):
    student, teacher, labels, mask = Case((4,), 300, with_mask=True).tensors(device)
    student, teacher = student.nan_to_num(), teacher.nan_to_num()
    kept = student.clone(), teacher.clone(), labels.clone(), mask.clone()
    student.requires_grad_()
    teacher.requires_grad_()
    out = vcrd.validity_calibrated_kl(student, teacher, labels, mask=mask, ce_weight=0.5)
    out.loss.sum().backward()
    for tensor, before in zip((student, teacher, labels, mask), kept, strict=True):
        assert torch.equal(tensor.detach(), before)
    assert teacher.grad is None and not out.weight.requires_grad and not out.relative_validity.requires_grad


def test_inplace_gradient_takes_the_logits_memory_and_runs_once(device):
    case = Case((4,), 300)
    student, teacher, *_ = case.tensors(device)
    student.requires_grad_()
    loss = vcrd.vocab_parallel_divergence(student, teacher, inplace_gradient=True).divergence.sum()
    loss.backward(retain_graph=True)
    assert student.grad.data_ptr() == student.data_ptr()
    with pytest.raises(RuntimeError, match="inplace_gradient"):
        loss.backward()


def test_backward_twice_gives_the_same_gradient_out_of_place(device):
    student, teacher, *_ = Case((4,), 300).tensors(device)
    student.requires_grad_()
    loss = vcrd.vocab_parallel_divergence(student, teacher).divergence.sum()
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


def test_rows_with_strides_and_transposed_logits(device):
    wide, teacher = torch.randn(6, 900), torch.randn(6, 300)
    expected = torch.autograd.functional.jacobian(
        lambda x: torch.nn.functional.kl_div(
            x.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
        ),
        wide[:, 100:400].clone(),
    )
    wide, teacher = wide.to(device), teacher.to(device)
    strided = wide.clone().requires_grad_()
    vcrd.vocab_parallel_divergence(strided[:, 100:400], teacher).divergence.sum().backward()
    assert relative_error(strided.grad[:, 100:400].cpu(), expected) < 1e-5
    transposed = wide[:, 100:400].t().contiguous().requires_grad_()
    vcrd.vocab_parallel_divergence(transposed.t(), teacher).divergence.sum().backward()
    assert relative_error(transposed.grad.t().cpu(), expected) < 1e-5


def test_skew_of_zero_is_the_plain_divergence(device):
    student, teacher, *_ = Case((4,), 300).tensors(device)
    for skewed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        a = vcrd.vocab_parallel_divergence(student, teacher, divergence=skewed, alpha=0.0).divergence
        assert torch.equal(a, vcrd.vocab_parallel_divergence(student, teacher, divergence=plain).divergence)


def test_other_mixtures_match_the_reference(device):
    for divergence, settings in (
        ("jsd", {"beta": 0.1}),
        ("jsd", {"beta": 0.9}),
        ("skew_kl", {"alpha": 0.9}),
        ("skew_reverse_kl", {"alpha": 0.5}),
    ):
        case = Case((5,), 700, divergence=divergence, settings=settings)
        stats, gradient = run(case, device)
        expected, expected_gradient = case.expected()
        assert_stats(stats, expected)
        assert relative_error(gradient, expected_gradient) <= 1e-5


def test_divergences_are_never_negative_where_student_and_teacher_agree(device):
    rows = 8 if EMULATED else 64
    student = torch.randn(rows, 5000, device=device)
    for divergence in DIVERGENCES:
        for noise in (0.0, 1e-6, 1e-4):
            teacher = student + noise * torch.randn(rows, 5000, device=device)
            value = vcrd.vocab_parallel_divergence(student, teacher, divergence=divergence).divergence
            assert (value >= 0).all() and value.max() < 1e-5


def test_a_row_past_two_to_the_31_elements_is_found(device):
    """64-bit row offsets: 9 rows that lie 300 million elements apart, almost all of them never touched."""
    stride, columns = 300_000_000, 128
    elements = 8 * stride + 2 * columns  # 4.8 GB, on the CPU of addresses alone
    if device.type == "cpu":
        storage = torch.frombuffer(mmap.mmap(-1, 2 * elements), dtype=torch.bfloat16)
    else:
        storage = torch.empty(elements, dtype=torch.bfloat16, device=device)
    far = torch.as_strided(storage, (9, columns), (stride, 1))
    far_teacher = torch.as_strided(storage, (9, columns), (stride, 1), columns)
    student, teacher = torch.randn(2, 9, columns, device=device).bfloat16()
    far.copy_(student)
    far_teacher.copy_(teacher)

    def loss_and_gradient(student, teacher, inplace):
        student = student.detach().requires_grad_()
        stats = vcrd.vocab_parallel_divergence(student, teacher, divergence="jsd", inplace_gradient=inplace)
        return stats.divergence, torch.autograd.grad(stats.divergence.sum(), student)[0]

    expected, expected_gradient = loss_and_gradient(student, teacher, False)
    for inplace in (False, True):
        divergence, gradient = loss_and_gradient(far, far_teacher, inplace)
        assert torch.equal(divergence, expected)
        assert torch.equal(gradient, expected_gradient)
    assert torch.equal(far, expected_gradient), "in place is where the logits were"
