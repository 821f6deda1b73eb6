"""A teacher of hidden states and an output layer, against the dense reference on its logits in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import assert_stats, backward, call, relative_error, run
from forms import HiddenCase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vcrd
from vcrd.loss.config import DIVERGENCES
from vcrd.loss.teacher_blocks import BLOCK_BYTES, HiddenBlocks

TINY = 3 * 4 * 300  # bytes: few rows of most vocabularies here, one of the others
# Float32 products of these sizes: the logits themselves are exact to about 1e-6.
TOLERANCE = 5e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_match_the_reference(device, divergence):
    shapes = [((5,), 257), ((2, 3), 64), ((7,), 1), ((2, 1, 2), 530), ((0,), 33)]
    for number, (tokens, vocab) in enumerate(shapes):
        for temperature, scale, multiplier, softcap in (
            (1.0, 0.1, 1.0, None),
            (2.0, 3.0, 0.5, None),
            (0.5, 3.0, 1.0, 5.0),
            (1.0, 30.0, 2.0, 30.0),
        ):
            case = HiddenCase(
                *(tokens, vocab, number % 3, number * 5 % 7, divergence, temperature, scale),
                with_mask=number % 2 == 0,
                seed=number,
                multiplier=multiplier,
                softcap=softcap,
            )
            stats, gradient = run(case, device, inplace_gradient=softcap is None, _block_bytes=TINY)
            expected, expected_gradient = case.expected()
            assert_stats(stats, expected, TOLERANCE * max(1, scale / temperature))
            assert relative_error(gradient, expected_gradient) <= 1e-5 * max(1, scale / temperature), case
            assert (gradient[..., vocab:] == 0).all()


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "dtypes", [(d, w) for d in (torch.bfloat16, torch.float16) for w in (None, torch.float32)]
)
def test_every_pair_of_dtypes(device, student_dtype, dtypes):
    case = HiddenCase(
        (6,), 700, 1, 2, "jsd", student_dtype=student_dtype, teacher_dtype=dtypes[0], with_mask=True
    )
    case = replace(case, weight_dtype=dtypes[1])
    stats, gradient = run(case, device)
    expected, expected_gradient = case.expected()
    assert_stats(stats, expected, TOLERANCE)
    best = (expected_gradient.to(student_dtype).double() - expected_gradient).abs().max()
    assert (gradient.double() - expected_gradient).abs().max() <= best + 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_never_rounded_to_the_states_dtype(device, dtype, autocast):
    """Large logits lose in 16 bits, where autocast would put them, what the divergence is made of."""
    case = HiddenCase((8,), 300, scale=30.0, teacher_dtype=dtype, divergence="reverse_kl")
    student, teacher, labels, _ = case.tensors(device)
    student.requires_grad_()
    with torch.autocast(device.type, dtype=dtype, enabled=autocast):
        stats = call(case, student, teacher, labels, None)
    stats, gradient = backward(case, stats, student)  # outside: the logits must be those of forward
    expected, expected_gradient = case.expected()
    torch.testing.assert_close(
        stats.divergence.double(), expected["divergence"].detach(), rtol=2e-6, atol=1e-4
    )
    assert relative_error(gradient, expected_gradient) <= 3e-5
    rounded = case.teacher_logits(case.tensors()[1]).to(dtype)
    loss = call(case, case.tensors()[0], rounded, None, None).divergence.double()
    assert (loss - expected["divergence"].detach()).abs().max() > 1e-2


def test_equal_to_the_dense_loss_on_the_same_logits(device):
    case = HiddenCase((9,), 400, temperature=2.0, teacher_padding=8)
    student, teacher, labels, _ = case.tensors(device)
    logits = teacher.states @ teacher.weight.T
    leaf, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    dense, dense_gradient = backward(case, call(case, leaf, logits, labels, None), leaf)
    for block_bytes in (BLOCK_BYTES, TINY, 1):
        other.grad = None
        stats = call(case, other, teacher, labels, None, _block_bytes=block_bytes)
        stats, gradient = backward(case, stats, other)
        for a, b in zip(stats, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(gradient, dense_gradient, rtol=1e-4, atol=1e-6)


class Allocations(TorchDispatchMode):
    """Bytes of the largest new tensor that an operator returned, and how many operators ran."""

    def __init__(self, known):
        super().__init__()
        self.largest, self.operators = 0, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_for_a_block_of_tokens_at_a_time(device, monkeypatch, divergence, dtype):
    case = HiddenCase((64,), 1000, divergence=divergence, student_dtype=dtype, teacher_dtype=torch.float32)
    student, teacher, labels, _ = case.tensors(device)
    student.requires_grad_()
    spans = []
    original = HiddenBlocks.logits

    def spied(self, tensors, rows, first, last):
        logits, maximum = original(self, tensors, rows, first, last)
        spans.append((first, last))
        assert logits.shape == (last - first, 1000) and logits.dtype == torch.float32
        return logits, maximum

    monkeypatch.setattr(HiddenBlocks, "logits", spied)
    limit = 7 * 1000 * 4 + 100  # seven rows and a bit
    known = (student, labels, teacher.states, teacher.weight)
    with Allocations(known) as seen:
        stats = call(case, student, teacher, labels, None, inplace_gradient=True, _block_bytes=limit)
        stats.divergence.sum().backward()
    blocks = [(first, min(first + 7, 64)) for first in range(0, 64, 7)]
    assert spans == blocks * (3 if divergence == "jsd" else 2), "each pass makes each block once"
    assert 7 * 1000 * 4 <= seen.largest <= limit


def test_the_default_block(device):
    """Below 32 MiB, yet of many tokens."""
    for columns in (1, 1000, 32_064, 131_072, 151_936):
        spans = HiddenBlocks(columns, 1.0, None, BLOCK_BYTES).spans(20_000)
        assert all((last - first) * columns * 4 < 32 * 2**20 for first, last in spans)
        assert [0, *(last for _, last in spans)] == [*(first for first, _ in spans), 20_000]
        assert spans[0][1] >= 50
    assert HiddenBlocks(10**9, 1.0, None, BLOCK_BYTES).spans(2) == [(0, 1), (1, 2)], "one token is the least"


def test_the_output_layer_is_converted_once_and_shared_where_it_need_not_be():
    states, weight = torch.randn(3, 8), torch.randn(20, 8)
    assert vcrd.HiddenStates(states, weight).factor.data_ptr() == weight.data_ptr()
    assert vcrd.HiddenStates(states.bfloat16(), weight).factor.data_ptr() == weight.data_ptr()
    narrow = vcrd.HiddenStates(states.bfloat16(), weight.bfloat16())
    assert narrow.factor.dtype == torch.float32
    assert narrow.factor is narrow.factor


def test_inputs_keep_their_values_and_the_teacher_gets_no_gradient(device):
    case = HiddenCase((7,), 300, divergence="skew_kl", with_mask=True)
    for inplace in (False, True):
        student, teacher, labels, mask = case.tensors(device)
        tensors = (teacher.states, teacher.weight, labels, mask)
        kept = [tensor.clone() for tensor in tensors]
        student.requires_grad_()
        teacher.states.requires_grad_()
        teacher.weight.requires_grad_()
        out = vcrd.validity_calibrated_kl(
            student,
            teacher,
            labels,
            mask=mask,
            divergence="skew_kl",
            ce_weight=0.2,
            inplace_gradient=inplace,
        )
        out.loss.sum().backward(retain_graph=True)
        assert (student.grad.data_ptr() == student.data_ptr()) == inplace
        assert teacher.states.grad is None and teacher.weight.grad is None
        for tensor, before in zip(tensors, kept, strict=True):
            assert torch.equal(tensor.detach().nan_to_num(), before.nan_to_num())
        if inplace:
            with pytest.raises(RuntimeError, match="inplace_gradient"):
                out.loss.sum().backward()


def test_what_is_not_a_number_is_loud_in_its_own_row(device):
    case = HiddenCase((4,), 70)
    student, teacher, labels, _ = case.tensors(device)
    teacher.states[2, 0] = torch.nan
    divergence = call(case, student, teacher, labels, None, _block_bytes=TINY).divergence
    assert divergence.isnan().tolist() == [False, False, True, False]
