"""The encoder: logits as distances below their row's maximum, in 16 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from cases import Case, coded, on_cpu
from kernels_under_test import EMULATED

import vcrd
from vcrd.loss import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encoded(logits: torch.Tensor, maxima: torch.Tensor, bits: int) -> torch.Tensor:
    codes = torch.empty(logits.shape, dtype=torch.uint8 if bits == 8 else torch.float16, device=logits.device)
    ops.encode(logits, maxima, codes)
    return codes


def placed(values: torch.Tensor, before: int, device: torch.device) -> torch.Tensor:
    """As columns of a wider matrix that holds infinity beside them, which would be every maximum."""
    wide = torch.nn.functional.pad(values, (before, 3), value=torch.inf).to(device)
    return wide[:, before : before + values.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_the_formula(device, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, columns) for columns in (*range(1, 36), 100, 1037, 4099)] + [(1, 17001), (70, 9)]
    for number, (rows, columns) in enumerate(shapes):
        values = (torch.randn(rows, columns, generator=generator) * 6).to(dtype)
        logits = placed(values, number % 9, device)
        maxima = ops.row_maxima(logits)
        assert torch.equal(maxima.cpu(), values.float().amax(-1)), (dtype, rows, columns)
        distance = maxima.cpu()[:, None] - values.float()
        eight, sixteen = encoded(logits, maxima, 8).cpu(), encoded(logits, maxima, 16).cpu()
        assert torch.equal(sixteen, (-distance).half()), (dtype, rows, columns)
        # The root's last bit may put a distance that lies between two codes on the other side.
        exact = 255 * (distance.double().clamp(max=24) / 24).sqrt()
        assert ((eight.double() - exact).abs() <= 0.5 + 1e-4).all(), (dtype, rows, columns)


def test_distances_past_the_range_and_rows_without_a_number(device):
    values = torch.zeros(5, 40)
    values[0, 1:] = -torch.arange(1, 40).float()  # from 24 on all the same
    values[1, :] = -torch.inf
    values[2, 1:] = -torch.inf
    values[3, 7] = 1e30
    logits = values.to(device)
    maxima = ops.row_maxima(logits)
    assert maxima.tolist() == [0.0, -torch.inf, 0.0, values[3, 7].item(), 0.0]
    maxima[4] = torch.nan  # what the link says of a row that is no distribution
    eight, sixteen = encoded(logits, maxima, 8).cpu(), encoded(logits, maxima, 16).cpu()
    assert (eight[0, 24:] == 255).all() and (eight[0, 1:24] < 255).all()
    assert (eight[1] == 255).all() and (sixteen[1] == -65504).all()
    assert eight[2].tolist() == [0] + [255] * 39 and (sixteen[2, 1:] == -65504).all()
    assert eight[3, 7] == 0 and (eight[3, :7] == 255).all() and (sixteen[3, :7] == -65504).all()
    assert (eight[4] == 255).all() and sixteen[4].isnan().all()


def test_maxima_of_the_whole_vocabulary_may_lie_above_the_shards_own(device):
    values = torch.randn(5, 333)
    maxima = values.amax(-1) + torch.tensor([0.0, 1.0, 5.0, 20.0, 100.0])
    codes = encoded(values.to(device), maxima.to(device), 8).cpu()
    exact = 255 * ((maxima[:, None] - values).double().clamp(max=24) / 24).sqrt()
    assert ((codes.double() - exact).abs() <= 0.5 + 1e-4).all()


def test_nothing_to_encode(device):
    for rows, columns in ((0, 7), (0, 0)):
        logits = torch.zeros(rows, columns, device=device)
        maxima = ops.row_maxima(logits)
        assert maxima.shape == (rows,) and encoded(logits, maxima, 8).shape == (rows, columns)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_loss_reads_what_the_encoder_wrote(device, bits):
    """Coded in one kernel, decoded in another: only the code's own error is left."""
    case = Case((6,), 2050, scale=2.0)
    student, teacher, labels, _ = case.tensors()
    codes = encoded(teacher.to(device), ops.row_maxima(teacher.to(device)), bits)
    assert bits == 16 or (codes.cpu().int() - coded(teacher).int()).abs().max() <= 1
    stats = on_cpu(vcrd.vocab_parallel_divergence(student.to(device), codes, labels.to(device)))
    exact = reference.statistics(student, teacher, labels)
    error = (stats.divergence - exact["divergence"]).abs()
    assert error.max() < (0.05 if bits == 8 else 5e-3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [0] if EMULATED else [0, 1])
def test_results_larger_than_the_caches_are_the_same(device, dtype, bits, more):
    """They are written past the caches, where their rows are aligned; a part of a few rows is not."""
    rows, columns = 300, 4096 * 16 // bits * 8 + more
    logits = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 6).to(device, dtype)
    maxima = ops.row_maxima(logits)
    codes = encoded(logits, maxima, bits)
    assert codes.numel() * codes.element_size() > 8 << 20
    for start in range(0, rows, 100):
        part = slice(start, start + 3)
        assert torch.equal(codes[part], encoded(logits[part], maxima[part], bits))
