"""The CPU loops where registers end: row lengths, alignment, ties, rising maxima, and what lies behind a row."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from cases import assert_stats, relative_error

import vcrd
from vcrd.loss import reference

pytestmark = pytest.mark.cpu_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(student, teacher, labels, inplace=False, **settings):
    """Statistics, and the gradient of a sum in which every token's two losses weigh differently."""
    logits = student.detach().requires_grad_()
    stats = vcrd.vocab_parallel_divergence(logits, teacher, labels, inplace_gradient=inplace, **settings)
    weights = torch.linspace(0.5, 1.5, len(student))
    loss = (stats.divergence * weights + stats.cross_entropy * weights.flip(0)).sum()
    return stats, torch.autograd.grad(loss, logits)[0]


def expected(student, teacher, labels, divergence="forward_kl", temperature=1.0, vocab_size=None):
    logits = student.detach().double().requires_grad_()
    stats = reference.statistics(
        logits, teacher, labels, name=divergence, temperature=temperature, vocab_size=vocab_size, mask=None
    )
    weights = torch.linspace(0.5, 1.5, len(student))
    (stats["divergence"] * weights + stats["cross_entropy"] * weights.flip(0)).sum().backward()
    return stats, logits.grad


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        pytest.param(*pair, marks=() if pair[0] == pair[1] else pytest.mark.slow)
        for pair in product(DTYPES, DTYPES)
    ],
)
def test_every_length_of_row_at_every_alignment(student_dtype, teacher_dtype):
    generator = torch.Generator().manual_seed(0)
    for columns in (*range(1, 71), 127, 1023, 1087, 1089, 1120):
        # Odd strides and an odd start: no row is aligned. NaN before, behind and between the rows.
        stored_student = torch.full((2, columns + 2), torch.nan, dtype=student_dtype)
        stored_teacher = torch.full((2, columns + 3), torch.nan, dtype=teacher_dtype)
        student, teacher = stored_student[:, 1:], stored_teacher[:, 1:]
        student[:, :columns] = torch.randn(2, columns, generator=generator) * 4
        teacher[:, :columns] = torch.randn(2, columns, generator=generator) * 4
        labels = torch.tensor([columns - 1, columns // 2])
        settings = {
            "divergence": ("forward_kl", "jeffreys")[columns % 2],
            "temperature": (1.0, 2.0)[columns // 2 % 2],
            "vocab_size": columns,
        }
        stats, gradient = run(student, teacher, labels, **settings)
        stats_expected, gradient_expected = expected(student, teacher, labels, **settings)
        assert_stats(stats, stats_expected)
        best = (gradient_expected.to(student_dtype).double() - gradient_expected).abs().max()
        assert (gradient.double() - gradient_expected).abs().max() <= best + 1e-6, columns
        _, overwritten = run(student, teacher, labels, inplace=True, **settings)
        assert overwritten.data_ptr() == student.data_ptr() and torch.equal(overwritten, gradient), columns
        assert stored_student[:, 0].isnan().all() and stored_teacher[:, columns + 1 :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_column(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(200, 2500, generator=generator).clamp(max=2).to(dtype) for _ in range(2))
    stats = vcrd.vocab_parallel_divergence(student, teacher)  # many columns hold the maximum
    for action, logits in ((stats.student_action, student), (stats.teacher_action, teacher)):
        first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
        assert torch.equal(action, first)
    zeros = torch.full((1, 40), -1.0, dtype=dtype)
    zeros[0, 5], zeros[0, 9] = -0.0, 0.0
    assert vcrd.vocab_parallel_divergence(zeros, zeros).student_action == 5


@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_maxima_that_rise_along_the_row(divergence, temperature):
    """Sums are taken relative to what has been seen so far, and are moved when that has grown too small."""
    generator = torch.Generator().manual_seed(0)
    rise = torch.tensor([0.0, 3.0, 7.9, 8.1, 20.0, 100.0, 5000.0])[:, None]
    ramp = torch.linspace(0, 1, 4200) * rise
    student = ramp + torch.randn(7, 4200, generator=generator)
    teacher = ramp.flip(0) + torch.randn(7, 4200, generator=generator)
    labels = torch.full((7,), 3000)
    settings = {"divergence": divergence, "temperature": temperature}
    stats, gradient = run(student, teacher, labels, **settings)
    stats_expected, gradient_expected = expected(student, teacher, labels, **settings)
    assert_stats(stats, stats_expected)
    assert relative_error(gradient, gradient_expected) <= 1e-5


def test_no_probability_at_all_until_late_in_the_row():
    student, teacher = torch.randn(2, 3000), torch.randn(2, 3000)
    student[0, :2100] = teacher[0, :2100] = -torch.inf
    student[1, :2100] = -torch.inf  # infinite as it stands, until the teacher's probability there vanishes
    assert vcrd.vocab_parallel_divergence(student, teacher).divergence[1] == torch.inf
    teacher[1, 2500] = 2000.0
    stats = vcrd.vocab_parallel_divergence(student, teacher)
    kept = student[:, 2100:].double().log_softmax(-1), teacher[:, 2100:].double().log_softmax(-1)
    exact = (kept[1].exp() * (kept[1] - kept[0])).sum(-1)
    torch.testing.assert_close(stats.divergence.double(), exact, rtol=1e-6, atol=1e-6)


def test_nothing_is_read_or_written_behind_the_last_row():
    """The rows end where the memory does, so that touching one element too many would end the process."""
    script = """
import torch
from test_lanes import DTYPES, memory_with_an_end, run
for dtype in DTYPES:
    for columns in (1, 7, 16, 31, 33, 100, 1061):
        student = memory_with_an_end(2 * columns, dtype).view(2, columns)
        teacher = memory_with_an_end(2 * columns, dtype).view(2, columns)
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            run(student, teacher, torch.zeros(2, dtype=torch.int64), inplace=True, divergence=divergence)
print("done")
"""
    paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "done", f"exit status {done.returncode}: {done.stderr[-2000:]}"


def memory_with_an_end(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose last byte is the last of a page, with a page behind it that nobody may touch."""
    size = elements * dtype.itemsize
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, length + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + length), mmap.PAGESIZE, no_access) == 0
    return torch.frombuffer(pages, dtype=dtype, count=elements, offset=length - size)
