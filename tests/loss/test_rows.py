"""How rows lie in memory and how long they are: what kernels that read 16 bytes at a time, and cut rows into parts, may
get wrong. Every test also holds for the CPU kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Case, assert_matches, assert_stats, backward, call, decoded, on_cpu, relative_error, run
from kernels_under_test import EMULATED
from torch import Tensor

import vcrd
from vcrd.loss import ops, reference
from vcrd.loss.config import DIVERGENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (1024, 4096, 8192)
# Few rows of so many columns are cut into parts that several blocks read; also where a part ends within a vector.
SPLIT = (16384, 16391, 40000)


def check(case: Case, device: torch.device, **extra) -> None:
    assert_matches(case, *run(case, device, **extra))


def placed(logits: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """The same logits as columns of a wider tensor, which holds NaN beside them; and that tensor."""
    poison = torch.nan if logits.is_floating_point() else 0
    wide = torch.nn.functional.pad(logits, (before, after), value=poison)
    return wide[..., before : before + logits.shape[-1]].detach(), wide


def test_every_number_of_columns_up_to_70(device):
    for columns in range(1, 71):
        divergence = DIVERGENCES[columns % len(DIVERGENCES)]
        dtype = DTYPES[columns % 3]
        case = Case((3,), columns, columns % 4, columns % 5, divergence, 1 + columns % 2, student_dtype=dtype)
        check(
            replace(case, teacher_dtype=DTYPES[columns // 3 % 3]), device, inplace_gradient=columns % 2 == 0
        )


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_around_what_blocks_are_made_for(device, edge, dtype):
    for columns in (edge - 1, edge, edge + 1, edge + 17):
        divergence = DIVERGENCES[columns % len(DIVERGENCES)]
        check(Case((2,), columns, 1, 0, divergence, student_dtype=dtype, teacher_dtype=dtype), device)


@pytest.mark.parametrize("columns", SPLIT)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_few_rows_of_many_columns(device, columns, divergence):
    for rows, temperature in ((1, 1.0), (3, 0.7)):
        case = Case((rows,), columns, 3, 1, divergence, temperature, 5.0, torch.bfloat16, torch.float16)
        check(replace(case, with_mask=rows > 1), device, inplace_gradient=rows > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_longest_row(device, dtype):
    check(Case((1,), 2**18, 0, 0, "jeffreys", student_dtype=dtype, teacher_dtype=dtype), device)


def test_many_short_rows(device):
    rows = 400 if EMULATED else 20000
    for columns in (5, 96):
        check(Case((rows,), columns, 0, 3, "jsd", student_dtype=torch.bfloat16, with_mask=True), device)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", [*DTYPES, torch.uint8])
def test_rows_that_begin_anywhere(device, student_dtype, teacher_dtype):
    """Student and teacher at every distance from 16 bytes, and rows of odd strides, so that each begins elsewhere."""
    case = Case((9,), 203, 2, 3, student_dtype=student_dtype, teacher_dtype=teacher_dtype, with_mask=True)
    steps = range(0, 17, 5 if EMULATED else 1)
    for number, before in enumerate(steps):
        case = replace(case, seed=number, divergence=DIVERGENCES[number % len(DIVERGENCES)])
        student, teacher, labels, mask = case.tensors(device)
        student, wide_student = placed(student, before, 1)
        teacher, wide_teacher = placed(teacher, (before * 7 + number) % 19, 2)
        kept = wide_teacher.clone()
        student.requires_grad_()
        stats = call(case, student, teacher, labels, mask, inplace_gradient=number % 2 == 0)
        assert_matches(case, *backward(case, stats, student))
        assert torch.equal(wide_teacher.nan_to_num(), kept.nan_to_num())
        beside = torch.cat([wide_student[:, :before], wide_student[:, -1:]], dim=1)
        assert beside.isnan().all(), "the gradient was written beside its columns"


def test_rows_that_end_with_their_memory(device):
    """Not even as a part of 16 bytes may anything behind them be read: the emulation's AddressSanitizer looks."""
    for number, before in enumerate(range(8)):
        divergence = ("forward_kl", "jsd")[number % 2]
        case = Case((2,), 64, 0, 0, divergence, student_dtype=torch.bfloat16, teacher_dtype=torch.bfloat16)
        student, teacher, labels, mask = case.tensors(device)
        student, _ = placed(student, before, 0)
        teacher, _ = placed(teacher, (before * 3 + 1) % 8, 0)
        stats = call(case, student.requires_grad_(), teacher, labels, mask)
        assert_matches(case, *backward(case, stats, student))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_long_rows_that_begin_anywhere(device, before):
    """Whole vectors in the middle, realigned ones too, and parts that begin within them."""
    for rows, columns in ((3, 2600), (1, 16400)):
        case = Case((rows,), columns, 1, 0, "reverse_kl", 1.3, 4.0, torch.bfloat16, torch.bfloat16)
        student, teacher, labels, mask = case.tensors(device)
        student, _ = placed(student, before, 0)
        teacher, _ = placed(teacher, 5 - before, 2)
        stats = call(case, student.requires_grad_(), teacher, labels, mask)
        assert_matches(case, *backward(case, stats, student))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_codes_of_the_teacher(device, divergence):
    """Eight-bit codes give what the logits that they stand for give."""
    for number, (rows, columns) in enumerate(((4, 1037), (5, 61), (1, 16385))):
        for student_dtype in DTYPES[: 1 if EMULATED and number else 3]:
            case = Case((rows,), columns, 3, 2, divergence, 1 + number / 2, 6.0, student_dtype, torch.uint8)
            check(replace(case, with_mask=number == 1), device)


def test_every_code_is_decoded(device):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    uniform = torch.zeros(1, 256, device=device)
    stats = vcrd.vocab_parallel_divergence(uniform, codes.to(device), divergence="reverse_kl")
    expected = -decoded(codes).log_softmax(-1).mean(-1) - math.log(256)
    torch.testing.assert_close(stats.divergence.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    # One at a time, beside a code of 0 that holds the maximum.
    pairs = torch.stack([torch.zeros(256, dtype=torch.uint8), codes[0]], dim=1).to(device)
    student = torch.tensor([0.0, 1.0], device=device).expand(256, 2)
    stats = vcrd.vocab_parallel_divergence(student, pairs)
    expected = decoded(pairs.cpu()).log_softmax(-1)[:, 1]
    actual = stats.teacher_logprob_of_student_action.cpu().double()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_a_shift_of_whole_rows_changes_nothing(device):
    """`row_max` moves a row's logits; within one shard no statistic sees it."""
    for divergence in DIVERGENCES:
        for dtype in (torch.uint8, torch.float16):
            case = Case((4,), 300, divergence=divergence, teacher_dtype=dtype, temperature=1.5)
            shift = torch.tensor([0.0, 3.0, -40.0, 100.0], device=device)
            stats, gradient = run(case, device, row_max=shift)
            expected, expected_gradient = case.expected()
            # A teacher 100 higher has its digits cut by float32 itself.
            assert_stats(stats, expected, tolerance=2e-5)
            assert relative_error(gradient, expected_gradient) <= 2e-5


def test_results_are_bitwise_equal_from_run_to_run_and_in_place(device):
    """Whatever the order of blocks and threads, which the emulation draws anew for each launch."""
    for number, (rows, columns) in enumerate(((33, 301), (2, 5000), (1, 33000))):
        for divergence in ("forward_kl", "jeffreys", "jsd")[number:]:
            case = Case((rows,), columns, 1, 0, divergence, student_dtype=torch.bfloat16, with_mask=rows > 1)
            first, gradient = run(case, device)
            for inplace in (False, True):
                again, other = run(case, device, inplace_gradient=inplace)
                assert torch.equal(gradient, other)
                for a, b in zip(first, again, strict=True):
                    assert torch.equal(a, b)


def test_of_equal_maxima_the_lowest_id_is_the_action(device):
    for columns in (7, 300, 2100, 20000):
        student = torch.zeros(5, columns)
        teacher = torch.zeros(5, columns)
        places = [0, 1, columns // 3, columns // 2, columns - 2]
        for row, place in enumerate(places):
            student[row, place:] = 2.5
            teacher[row, [columns - 1 - place // 2, columns - 1]] = 1.0
        stats = vcrd.vocab_parallel_divergence(student.to(device), teacher.to(device))
        assert stats.student_action.tolist() == places
        assert stats.teacher_action.tolist() == [columns - 1 - place // 2 for place in places]
    equal = torch.full((3, 513), -7.0, device=device)
    stats = vcrd.vocab_parallel_divergence(equal, equal.half())
    assert stats.student_action.tolist() == stats.teacher_action.tolist() == [0, 0, 0]


def test_two_shards_are_one_row(device):
    """Ids are those of the whole vocabulary; of equal maxima in two shards the action is in the first."""
    student, teacher, labels, _ = Case((8,), 300).tensors()
    student[:4, [20, 250]], teacher[2:6, [40, 299]] = 15.0, 15.0
    whole = student.double().requires_grad_()
    expected = reference.statistics(whole, teacher, labels, name="reverse_kl")
    (expected["divergence"] + 2 * expected["cross_entropy"]).sum().backward()
    code, labels, ones = DIVERGENCES.index("reverse_kl"), labels.to(device), torch.ones(8, device=device)
    shards = [
        (student[:, a:b].to(device), teacher[:, a:b].to(device), b - a, a) for a, b in ((0, 120), (120, 300))
    ]
    partials = [ops.row_statistics(s, t, None, labels, None, 1.0, *place, code) for s, t, *place in shards]
    statistics, actions, constants = ops.merge_statistics(torch.stack(partials), labels, None, 1.0, code)
    stats = vcrd.DivergenceStats(*statistics, *actions, torch.zeros_like(actions[0], dtype=torch.bool))
    assert_stats(on_cpu(stats), expected)
    for s, t, width, first in shards:
        upstream = (ones, 2 * ones, 1.0, width, first, code, 0.0)
        gradient = ops.gradient(s, t, None, labels, None, constants, None, *upstream)
        assert relative_error(gradient.cpu(), whole.grad[:, first : first + width]) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_maxima_far_apart_are_one_reference(device, divergence):
    """Sums relative to the teacher's logit at the student's action must all mean the same one of equal maxima."""
    generator = torch.Generator().manual_seed(0)
    for columns in (20, 300, 3000, 20000):
        rows = 2 if columns > 10000 else 12
        case = Case((rows,), columns, divergence=divergence, scale=2.0)
        student, teacher, labels, _ = case.tensors()
        for row in range(rows):
            places = torch.randperm(columns, generator=generator)[:6]
            student[row, places] = 12.0
            teacher[row, places] = torch.tensor([3.0, -6.0, 5.0, 0.0, 4.0, -2.0])
        whole = student.double().requires_grad_()
        expected = reference.statistics(whole, teacher, labels, name=divergence)
        upstream, of_cross_entropy = case.upstream()
        (expected["divergence"] * upstream + expected["cross_entropy"] * of_cross_entropy).sum().backward()
        mine = student.to(device).requires_grad_()
        stats = call(case, mine, teacher.to(device), labels.to(device), None)
        stats, gradient = backward(case, stats, mine)
        assert_stats(stats, expected)
        assert relative_error(gradient, whole.grad) <= 1e-5


def test_parts_of_rows_without_any_probability(device):
    """Where a thread, a warp, a block or all but one column has -inf alone, nothing turns into NaN."""
    for columns in (70, 1100, 20000):
        case = Case((6,), columns, with_mask=False, temperature=0.5)
        student, teacher, labels, _ = case.tensors()
        student[0, : columns // 2] = -torch.inf
        student[1, 1:] = -torch.inf
        teacher[1, 1:] = -torch.inf
        teacher[2, columns // 3 :] = -torch.inf
        student[3, ::2] = -torch.inf
        teacher[3, ::2] = -torch.inf
        student[4, :-1] = -torch.inf
        teacher[4, :-1] = -torch.inf
        labels[:] = columns - 1
        labels[1] = 0
        for divergence in ("skew_kl", "jsd", "forward_kl"):
            case = replace(case, divergence=divergence)
            expected = reference.statistics(student, teacher, labels, name=divergence, temperature=0.5)
            stats = call(case, student.to(device), teacher.to(device), labels.to(device), None)
            stats = on_cpu(stats)
            for row in range(6):
                for name in ("divergence", "student_entropy", "teacher_entropy", "cross_entropy"):
                    actual = getattr(stats, name)[row].double()
                    torch.testing.assert_close(actual, expected[name][row].double(), rtol=1e-5, atol=1e-5)
            assert torch.equal(stats.student_action, expected["student_action"])
    nothing = torch.full((2, 1100), -torch.inf, device=device)
    stats = vcrd.vocab_parallel_divergence(nothing, torch.zeros(2, 1100, device=device))
    assert stats.divergence.isnan().all() and stats.student_action.tolist() == [0, 0]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
def test_a_teacher_without_probability_where_the_student_is_surest(device, divergence):
    """Infinite, not NaN; and finite again where a far higher logit leaves no probability there."""
    for columns in (60, 3000, 20000):
        student, teacher, *_ = Case((3,), columns).tensors()
        lost = columns // 3
        student[:, lost], teacher[:, lost] = 20.0, -torch.inf
        student[1, 2 * lost + 5] = 4000.0
        student[2, 3] = 4000.0
        stats = vcrd.vocab_parallel_divergence(student.to(device), teacher.to(device), divergence=divergence)
        assert stats.divergence[0] == torch.inf
        kept = torch.arange(columns) != lost
        exact = reference.statistics(student[1:, kept], teacher[1:, kept], name=divergence)["divergence"]
        torch.testing.assert_close(stats.divergence[1:].cpu().double(), exact, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand(device, divergence):
    for columns in (333, 17000):
        check(Case((3,), columns, 2, 5, divergence, 1.0, 1e4, torch.float32, torch.float32), device)


def test_a_label_outside_the_vocabulary_is_not_a_number(device):
    """On the CPU Python refuses it; elsewhere the kernels are the last to see it."""
    student, teacher = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device)
    labels = torch.tensor([39, 40, 10**12], device=device)
    if device.type != "cpu":
        stats = vcrd.vocab_parallel_divergence(student, teacher, labels)
        assert stats.cross_entropy.isnan().tolist() == [False, True, True]
    partials = ops.row_statistics(student, teacher, None, labels, None, 1.0, 40, 0, 0)
    statistics, _, _ = ops.merge_statistics(partials[None], labels, None, 1.0, 0)
    assert statistics[1].isnan().tolist() == [False, True, True]
    assert not statistics[0].isnan().any()


def test_masked_rows_are_not_read_and_neighbours_keep_theirs(device):
    """Every second row of each size holds NaN and is masked; its gradient is zero, in place over the NaN too."""
    for rows, columns in ((64, 17), (7, 3000), (4, 20000)):
        case = Case((rows,), columns, student_dtype=torch.float16, teacher_dtype=torch.bfloat16)
        student, teacher, labels, _ = case.tensors(device)
        mask = torch.arange(rows, device=device) % 2
        student[mask == 0], teacher[mask == 0] = torch.nan, torch.nan
        stats = call(case, student.requires_grad_(), teacher, labels, mask, inplace_gradient=True)
        stats, gradient = backward(case, stats, student)
        kept = mask.cpu() == 1
        expected, expected_gradient = case.expected()
        for name in ("divergence", "cross_entropy", "teacher_entropy"):
            field = getattr(stats, name)
            assert (field[~kept] == 0).all()
            torch.testing.assert_close(field[kept].double(), expected[name][kept], rtol=2e-6, atol=4e-6)
        assert (gradient[~kept] == 0).all()
        error = (gradient[kept].double() - expected_gradient[kept]).abs()
        assert error.max() <= 1e-3 * expected_gradient.abs().max()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_has_zero_gradient_even_in_a_row_that_is_not_a_number(device, divergence):
    for columns in (13, 2500):
        student, teacher, *_ = Case((3,), columns, 5, 5).tensors(device)
        student[1, columns // 2] = torch.nan
        student.requires_grad_()
        stats = vcrd.vocab_parallel_divergence(student, teacher, divergence=divergence, vocab_size=columns)
        stats.divergence.sum().backward()
        assert (student.grad[:, columns:] == 0).all()
        assert student.grad[1, :columns].isnan().any() and not student.grad[::2].isnan().any()
