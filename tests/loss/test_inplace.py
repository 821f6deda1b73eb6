"""In place among others that read the same logits: the gradient is right, or there is an error, and nothing between."""

from __future__ import annotations

import sys
from unittest.mock import patch

import pytest
import torch
from cases import relative_error
from forms import HiddenCase
from torch import Tensor

import vcrd
from vcrd.loss import ops, reference

TOKENS, COLUMNS = (5, 2), 70
CHANGED = "modified by an inplace operation"


class HeldByPython(torch.autograd.Function):
    """A term whose author keeps the logits where autograd does not see them."""

    @staticmethod
    def forward(ctx, logits):
        ctx.logits = logits
        return logits.square().sum() / 2

    @staticmethod
    def backward(ctx, gradient):
        return ctx.logits * gradient


class Scaled(torch.autograd.Function):
    """Like Megatron's MoEAuxLossAutoScaler: passes the logits on, and in backward also gives the term a gradient."""

    @staticmethod
    def forward(ctx, logits, term):
        ctx.save_for_backward(term)
        return logits

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.full_like(ctx.saved_tensors[0], 0.1)


def z(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().sum()


def loss(logits: Tensor, teacher: Tensor, inplace, name: str = "forward_kl") -> Tensor:
    """The reference's, of logits of float64."""
    if logits.dtype == torch.float64:
        return reference.statistics(logits, teacher, name=name)["divergence"].sum()
    stats = vcrd.vocab_parallel_divergence(logits, teacher, divergence=name, inplace_gradient=inplace)
    return stats.divergence.sum()


# What a model trains on, from its logits on.
def alone(logits, teacher, inplace):
    return loss(logits, teacher, inplace)


def term_after(logits, teacher, inplace):
    whole = loss(logits, teacher, inplace)
    return whole + z(logits)


def term_before(logits, teacher, inplace):
    term = z(logits)
    return loss(logits, teacher, inplace) + term


def term_of_a_view(logits, teacher, inplace):
    term = z(logits.view(-1, COLUMNS)[1:])
    return loss(logits, teacher, inplace) + term


def term_by_a_scaler(logits, teacher, inplace):
    whole = Scaled.apply(logits, logits.logsumexp(-1))
    if logits.dtype == torch.float64:
        return loss(logits, teacher, inplace) + 0.1 * logits.logsumexp(-1).sum()
    return loss(whole, teacher, inplace)


def output_that_is_saved(logits, teacher, inplace):
    return loss(torch.tanh(logits), teacher, inplace)


def two_losses(logits, teacher, inplace):
    other = loss(logits, teacher.flip(-1), inplace, "reverse_kl")
    return loss(logits, teacher, inplace) + other


def held_by_python(logits, teacher, inplace):
    term = logits.square().sum() / 2 if logits.dtype == torch.float64 else HeldByPython.apply(logits)
    return loss(logits, teacher, inplace) + term


def run(device, train, inplace, dtype=torch.float32) -> tuple[Tensor, bool]:
    """The gradient of the hidden states, and whether any loss wrote its own over the logits."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(*TOKENS, 8, generator=generator).to(device, dtype).requires_grad_()
    weight, teacher = (
        torch.randn(*shape, generator=generator) for shape in ((COLUMNS, 8), (*TOKENS, COLUMNS))
    )
    # No variable here holds the logits.
    total = train(states @ weight.to(device, dtype).t(), teacher.to(device, dtype), inplace)
    in_place = []
    plain = ops.gradient_
    with patch.object(ops, "gradient_", lambda *given: in_place.append(True) or plain(*given)):
        total.backward()
    return states.grad.cpu(), bool(in_place)


@pytest.mark.parametrize(
    ("train", "overwrites"),
    [
        (alone, True),
        (term_after, True),  # its backward is over by then
        (term_before, False),
        (term_of_a_view, False),
        (term_by_a_scaler, False),
        (output_that_is_saved, False),
        (two_losses, True),  # the one that comes last
        (held_by_python, False),
    ],
)
def test_nothing_else_that_reads_the_logits_gets_a_wrong_gradient(device, train, overwrites):
    truth, _ = run("cpu", train, False, torch.float64)
    gradient, overwritten = run(device, train, "if_unused")
    assert relative_error(gradient, truth) <= 1e-5 and overwritten == overwrites
    if train in (alone, term_after):
        gradient, overwritten = run(device, train, True)
        assert relative_error(gradient, truth) <= 1e-5 and overwritten
    elif train is not held_by_python:  # True is a promise about what autograd cannot see
        with pytest.raises(RuntimeError, match=CHANGED):
            run(device, train, True)


def test_unusual_counts_of_references_are_neither_trusted_nor_remembered(device):
    """Under a debugger's trace function, and under hooks of saved tensors."""
    truth, _ = run("cpu", alone, False, torch.float64)
    before = sys.gettrace()
    sys.settrace(lambda *event: None)
    try:
        traced = run(device, alone, "if_unused")
    finally:
        sys.settrace(before)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        hooked = run(device, alone, "if_unused")
    for (gradient, overwritten), expected in (
        (traced, False),
        (hooked, False),
        (run(device, alone, "if_unused"), True),
    ):
        assert relative_error(gradient, truth) <= 1e-5 and overwritten == expected


def test_a_python_variable_keeps_its_logits(device):
    """Of a model whose trainer did not ask for anything in place."""
    kept = []

    def train(logits, teacher, inplace):
        kept.append((logits, logits.detach().clone()))
        return loss(logits, teacher, inplace)

    _, in_place = run(device, train, "if_unused")
    assert not in_place and torch.equal(*kept[0])


def test_a_second_backward_is_right_where_a_buffer_was_used(device):
    states = torch.randn(4, 8, device=device, requires_grad=True)
    weight, teacher = torch.randn(50, 8, device=device), torch.randn(4, 50, device=device)
    logits = states @ weight.t()
    total = loss(logits, teacher, "if_unused")
    (first,) = torch.autograd.grad(total, states, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(total, states)[0])


@pytest.mark.parametrize("inplace", [True, "if_unused"])
def test_rows_that_share_memory_get_a_gradient_each(device, inplace):
    whole = torch.randn(200, device=device)
    for make in (
        lambda row: row[:60].expand(4, 60),  # stride 0
        lambda row: row.as_strided((4, 60), (10, 1)),  # windows that overlap
        lambda row: row[:60].expand(2, 2, 60),
    ):
        truth, leaf = whole.double().requires_grad_(), whole.clone().requires_grad_()
        teacher = torch.randn(make(whole).shape, device=device)
        loss(make(truth), teacher.double(), inplace).backward()
        loss(make(leaf * 1), teacher, inplace).backward()
        assert relative_error(leaf.grad.cpu(), truth.grad.cpu()) <= 1e-5


@pytest.mark.parametrize("inplace", [True, "if_unused"])
def test_a_teacher_in_the_same_memory_is_read_before_it_is_overwritten(device, inplace):
    both = torch.randn(6, 64, device=device)
    for student_of, teacher_of in (
        (lambda x: x[:5], lambda x: x[1:]),  # the next token's logits
        (lambda x: x, lambda x: x[:1].expand(6, 64)),
        (lambda x: x, lambda x: x),
    ):
        truth = both.double().requires_grad_()
        loss(student_of(truth * 2), teacher_of(2 * both.double()), inplace, "jsd").backward()
        leaf = both.clone().requires_grad_()
        logits = leaf * 2
        loss(student_of(logits), teacher_of(logits.detach()), inplace, "jsd").backward()
        assert relative_error(leaf.grad.cpu(), truth.grad.cpu()) <= 1e-5 or truth.grad.abs().max() < 1e-12
    # Side by side in one buffer is no reason for another.
    wide = torch.randn(6, 128, device=device)
    student, teacher = wide.clone().chunk(2, -1)
    loss(student.detach().requires_grad_(), teacher, True).backward()
    assert torch.equal(teacher, wide[:, 64:]) and not torch.isclose(student, wide[:, :64]).any()


@pytest.mark.parametrize("train", [term_before, two_losses])
def test_blocks_of_tokens_are_written_under_the_same_rule(device, train):
    """A teacher of hidden states, whose gradient is made block by block."""
    case = HiddenCase((7,), 90)
    student, teacher, *_ = case.tensors(device)
    leaf = student.clone().requires_grad_()

    def total(inplace) -> Tensor:
        logits = leaf * 1
        term = z(logits)
        stats = vcrd.vocab_parallel_divergence(
            logits, teacher, vocab_size=case.vocab, inplace_gradient=inplace, _block_bytes=4 * 2 * case.vocab
        )
        return stats.divergence.sum() + term

    (expected,) = torch.autograd.grad(total(False), leaf)
    (found,) = torch.autograd.grad(total("if_unused"), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match=CHANGED):
        total(True).backward()


def test_another_word_is_one_sentence():
    logits = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="^inplace_gradient: expected True, False or 'if_unused', got 'maybe'$"
    ):
        vcrd.validity_calibrated_kl(logits, logits, validity="uniform", inplace_gradient="maybe")
