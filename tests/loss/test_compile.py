"""The loss under torch.compile, under no_grad and under PyTorch's own checks of custom operators."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from torch import library

import vcrd
from vcrd.loss import ops, reference


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_compiled_equals_eager_without_graph_breaks(device, divergence, dynamic, with_config):
    config = vcrd.LossConfig(divergence=divergence, temperature=1.0 + with_config)
    settings = {"config": config} if with_config else {"divergence": divergence}

    def loss(student, teacher, labels, mask):
        out = vcrd.validity_calibrated_kl(
            student * 1.5,
            teacher,
            labels,
            mask=mask,
            ce_weight=0.1,
            inplace_gradient=True,
            **settings,
        )
        return out.loss.sum() + 0 * out.weight.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (6, 9) if dynamic else (6,):
        student, teacher, labels, mask = Case((tokens,), 130, with_mask=True).tensors(device)
        student, teacher = student.nan_to_num(), teacher.nan_to_num()
        a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
        eager, graph = loss(a, teacher, labels, mask), compiled(b, teacher, labels, mask)
        torch.testing.assert_close(graph, eager)
        eager.backward()
        graph.backward()
        torch.testing.assert_close(b.grad, a.grad)


def test_no_grad_gives_the_same_numbers_and_no_graph(device):
    student, teacher, labels, _ = Case((6,), 130).tensors(device)
    student.requires_grad_()
    with torch.no_grad():
        out = vcrd.validity_calibrated_kl(student, teacher, labels, ce_weight=0.1)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, vcrd.validity_calibrated_kl(student, teacher, labels, ce_weight=0.1).loss)
    with torch.inference_mode():
        assert torch.equal(
            out.loss, vcrd.validity_calibrated_kl(student, teacher, labels, ce_weight=0.1).loss
        )


@pytest.mark.parametrize("with_teacher_max", [False, True])
def test_operators_pass_torchs_own_checks(device, with_teacher_max):
    student, teacher, labels, _ = Case((3,), 20).tensors(device)
    mask, ones = torch.tensor([1, 0, 1], dtype=torch.uint8, device=device), torch.ones(3, device=device)
    teacher_max = ones.clone() if with_teacher_max else None
    statistics = (student, teacher, teacher_max, labels, mask, 1.0, 20, 0, 3)
    partials = ops.row_statistics(*statistics)
    merge = (partials[None], labels, mask, 1.0, 3)
    _, _, constants = ops.merge_statistics(*merge)
    mixture = (student, teacher, teacher_max, mask, constants, 1.0, 20, 3, 0.5)
    sums = ops.mixture_sums(*mixture)
    rest = (teacher, teacher_max, labels, mask, constants, sums, ones, ones, 1.0, 20, 0, 3, 0.5)
    for operator, arguments in (
        (ops.row_statistics, statistics),
        (ops.merge_statistics, merge),
        (ops.mixture_sums, mixture),
        (ops.gradient, (student, *rest)),
        (ops.gradient_, (student.clone(), *rest)),
    ):
        library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_only_the_requested_gradient_is_computed(device):
    """A loss of the cross-entropy alone, or of the divergence alone, through the one backward pass."""
    case = Case((4,), 90)
    for name in ("divergence", "cross_entropy"):
        student, teacher, labels, _ = case.tensors(device)
        student.requires_grad_()
        getattr(vcrd.vocab_parallel_divergence(student, teacher, labels), name).sum().backward()
        copy, teacher, labels, _ = case.tensors()
        copy = copy.double().requires_grad_()
        reference.statistics(copy, teacher, labels)[name].sum().backward()
        torch.testing.assert_close(student.grad.double().cpu(), copy.grad, rtol=1e-5, atol=1e-6)
