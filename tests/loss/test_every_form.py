"""Every divergence with every pair of types and every form of the teacher, against the float64 reference: many, small.

On emulated CUDA kernels these cases launch every instance of every kernel; tests/cuda_emulation counts them.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import Case, assert_matches, run
from forms import HiddenCase, MixedCase, TopKCase

from vcrd.loss.config import DIVERGENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# JSD with beta 1/2 uses other kernels than JSD with any other beta.
SETTINGS = [*((name, {}) for name in DIVERGENCES), ("jsd", {"beta": 0.3})]


@pytest.mark.parametrize(("divergence", "settings"), SETTINGS)
def test_logits_and_codes(device, divergence, settings):
    for number, (student, teacher) in enumerate(product(DTYPES, [*DTYPES, torch.uint8])):
        for temperature in (1.0, 2.0):
            case = Case(
                *((3,), 203, 2, 3, divergence, temperature),
                student_dtype=student,
                teacher_dtype=teacher,
                with_mask=number % 2 == 0,
                seed=number,
                settings=settings,
            )
            assert_matches(case, *run(case, device, inplace_gradient=number % 3 == 0))


@pytest.mark.parametrize(("divergence", "settings"), SETTINGS)
def test_one_row_of_many_columns(device, divergence, settings):
    """On a GPU several blocks read it, and what each found is combined."""
    case = Case((1,), 16391, 3, 1, divergence, 0.7, 5.0, torch.bfloat16, torch.float16, settings=settings)
    assert_matches(case, *run(case, device))


@pytest.mark.parametrize(("divergence", "settings"), SETTINGS)
def test_the_top_k_and_hidden_states(device, divergence, settings):
    for number, dtype in enumerate(DTYPES):
        shape = dict(divergence=divergence, student_dtype=dtype, seed=number, settings=settings)
        topk = TopKCase((5,), 203, 2, 0, with_mask=number % 2 == 0, k=8, **shape)
        assert_matches(topk, *run(topk, device))
        hidden = HiddenCase((5,), 203, 2, 3, temperature=2.0, teacher_dtype=dtype, **shape)
        assert_matches(hidden, *run(hidden, device), tolerance=5e-6)


@pytest.mark.parametrize(("divergence", "settings"), SETTINGS)
def test_a_mixture(device, divergence, settings):
    for number, (student, teacher) in enumerate(product(DTYPES, DTYPES)):
        shape = dict(
            divergence=divergence,
            student_dtype=student,
            teacher_dtype=teacher,
            seed=number,
            settings=settings,
        )
        case = MixedCase(
            (5,), 203, 2, 3, temperature=(1.0, 2.0)[number % 2], with_mask=number % 2 == 0, **shape
        )
        extra = dict(inplace_gradient=number % 3 == 0, _block_bytes=(4 * 203 * 2, 1 << 20)[number % 2])
        assert_matches(case, *run(case, device, **extra), tolerance=5e-6)


def test_a_mixture_of_more_columns_than_a_kernel_reads_at_once(device):
    case = MixedCase((2,), 2100, 2, 3)
    assert_matches(case, *run(case, device), tolerance=5e-6)
