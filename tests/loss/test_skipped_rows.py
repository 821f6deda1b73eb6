"""Rows whose teacher is no distribution are skipped as masked rows are, whatever the teacher's form."""

from __future__ import annotations

import kernels_under_test  # noqa: F401  before vcrd's operators
import pytest
import torch

import vcrd
from vcrd.link.payload import encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard
from vcrd.loss.config import DIVERGENCES
from vcrd.teacher_logits import DenseLogits, HiddenStates, MixedLogits, TopKLogits

VOCAB = 67
BAD = (1, 3, 4, 6)


def spoilt(rows: int = 8) -> torch.Tensor:
    """Teacher logits: a NaN, a +inf, nothing above -inf, NaN alone; elsewhere one logit of -inf, which is fine."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(rows, 1, VOCAB, generator=generator)
    logits[0, 0, 3] = -torch.inf
    logits[1, 0, 40], logits[3, 0, 2], logits[4], logits[6] = torch.nan, torch.inf, -torch.inf, torch.nan
    return logits


def as_payload(name: str, logits: torch.Tensor):
    """What the loss is given once these logits have travelled."""
    if name == "topk":
        return TopKLogits(*top_k_of(logits, 5, Shard(0, VOCAB), None))
    if name == "hidden":
        states = torch.randn(8, 1, 6, generator=torch.Generator().manual_seed(6))
        states[[1, 4], 0, 2] = torch.nan
        states[[3, 6], 0, 1] = torch.inf
        return HiddenStates(states, torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(7)))
    if name == "mixed":  # each teacher has its own invalid rows
        parts = []
        for number, payload in enumerate(("float32", "logits_8bit", "hidden")):
            here = logits.clone()
            here[[row for place, row in enumerate(BAD) if place % 3 != number]] = 0.5
            one = as_payload(payload, here)
            if payload == "hidden":
                one.states[[1, 3, 6]] = 0.5
            parts.append(DenseLogits(one) if isinstance(one, torch.Tensor) else one)
        return MixedLogits(tuple(parts), (1.0, 1.0, 2.0))
    payload = payload_named(name)
    return encode(payload, logits, row_max(logits))


def run(teacher, mask, divergence="forward_kl", **settings):
    generator = torch.Generator().manual_seed(8)
    leaf = (2 * torch.randn(8, 1, VOCAB, generator=generator)).requires_grad_()
    labels = torch.randint(VOCAB, (8, 1), generator=generator)
    out = vcrd.validity_calibrated_kl(
        leaf * 1.0, teacher, labels, divergence=divergence, mask=mask, ce_weight=0.5, **settings
    )
    out.loss.sum().backward()
    return out, leaf.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["float32", "float16", "logits_8bit", "topk", "hidden", "mixed"])
def test_invalid_rows_of_every_payload_are_skipped_as_masked_ones_are(name, inplace):
    teacher = as_payload(name, spoilt())
    mask = torch.ones(8, 1, dtype=torch.bool)
    mask[list(BAD)] = False
    settings = {"normalization": "mean", "steps": torch.arange(8)[:, None] // 4, "inplace_gradient": inplace}
    expected, gradient = run(teacher, mask, **settings)
    out, got = run(teacher, None, skip_invalid_teacher=True, **settings)
    assert out.stats.skipped.flatten().nonzero().flatten().tolist() == list(BAD)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.weight, expected.weight)
    assert torch.equal(got, gradient) and got.isfinite().all() and (got[0] != 0).any()
    assert (got[list(BAD)] == 0).all() and (out.loss[list(BAD)] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_invalid_rows_are_skipped_by_every_divergence(divergence):
    teacher = spoilt()
    mask = torch.ones(8, 1, dtype=torch.bool)
    mask[list(BAD)] = False
    expected, gradient = run(teacher, mask, divergence)
    out, got = run(teacher, None, divergence, skip_invalid_teacher=True)
    assert torch.equal(got, gradient) and torch.equal(out.loss, expected.loss)
    assert torch.equal(out.stats.skipped.flatten(), ~mask.flatten())


def test_a_mask_counts_beside_the_invalid_rows():
    """Of the masked rows one is bad and two are not: none of them is in the mean, and none brings a gradient."""
    mask = torch.ones(8, 1)
    mask[[0, 1, 7]] = 0.0
    both = mask.clone()
    both[list(BAD)] = 0.0
    expected, gradient = run(spoilt(), both, normalization="mean")
    out, got = run(spoilt(), mask, skip_invalid_teacher=True, normalization="mean")
    assert torch.equal(out.weight, expected.weight) and torch.equal(out.loss, expected.loss)
    assert torch.equal(got, gradient) and (got[2] != 0).any()


def test_nothing_is_skipped_unasked_and_a_masked_row_is_not_bad():
    out, _ = run(spoilt(), None)
    assert out.loss.isnan().sum() == len(BAD)
    out, _ = run(spoilt(), torch.zeros(8, 1), skip_invalid_teacher=True)
    assert not out.stats.skipped.any()


@pytest.mark.parametrize("name", ["float32", "topk", "logits_8bit"])
def test_a_nan_of_the_students_is_not_hidden(name):
    teacher = as_payload(name, spoilt())
    leaf = torch.zeros(8, 1, VOCAB).requires_grad_()
    student = leaf * 1.0
    with torch.no_grad():
        student[2], student[6] = torch.nan, torch.nan  # beside a good row and beside a bad one
    out = vcrd.validity_calibrated_kl(student, teacher, validity="uniform", skip_invalid_teacher=True)
    assert out.loss[[2, 6]].isnan().all() and not out.stats.skipped[[2, 6]].any()
    assert out.stats.skipped[[1, 3, 4]].all()


def test_codes_of_a_flat_row_and_of_a_far_shard_are_no_invalid_rows():
    flat, far = torch.zeros(1, 1, VOCAB), torch.full((1, 1, VOCAB), -100.0)
    far[..., 50] = 0.0
    teacher = as_payload("logits_8bit", torch.cat([flat, far] * 4))
    out, _ = run(teacher, None, skip_invalid_teacher=True)
    assert not out.stats.skipped.any() and out.loss.isfinite().all()
