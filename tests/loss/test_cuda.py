"""What only a GPU can show: streams, graphs, and that the host never waits. Collected where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, call
from forms import HiddenCase, TopKCase

import vcrd
from vcrd.loss.config import DIVERGENCES

FEW_LONG_ROWS = Case((2,), 40_000, student_dtype=torch.bfloat16, teacher_dtype=torch.bfloat16)
MANY_ROWS = Case((1200,), 500, student_dtype=torch.bfloat16, teacher_dtype=torch.bfloat16)


def on_gpu(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student, teacher, labels, _ = case.tensors("cuda")
    return student.requires_grad_(), teacher, labels


def loss_and_gradient(student, teacher, labels, divergence="forward_kl"):
    out = vcrd.validity_calibrated_kl(student, teacher, labels, divergence=divergence, ce_weight=0.1)
    return out.loss, torch.autograd.grad(out.loss.sum(), student)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_captured_graph_computes_what_the_calls_compute(divergence):
    student, teacher, labels = on_gpu(FEW_LONG_ROWS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, as torch asks of every capture
        loss_and_gradient(student, teacher, labels, divergence)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(student, teacher, labels, divergence)
    fresh = on_gpu(replace(FEW_LONG_ROWS, seed=7))
    with torch.no_grad():
        for old, new in zip((student, teacher, labels), fresh, strict=True):
            old.copy_(new)
    graph.replay()
    for got, expected in zip(captured, loss_and_gradient(*fresh, divergence), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_host_never_waits_for_the_device(divergence):
    student, teacher, labels = on_gpu(MANY_ROWS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(student, teacher, labels, divergence)
        steps = torch.arange(len(labels), device="cuda") // 7
        vcrd.validity_calibrated_kl(student, teacher, labels, steps=steps, normalization="mean")
        vcrd.validity_calibrated_kl(student, teacher, labels, weighting="gap", normalization="mass")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_fused_head_never_waits_where_an_even_gradient_is_promised(divergence):
    hidden = torch.randn(1200, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(500, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(1200, 500, device="cuda", dtype=torch.float16)
    labels = torch.randint(500, (1200,), device="cuda")
    mask = (torch.rand(1200, device="cuda") < 0.7).float()
    found = torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = vcrd.fused_validity_calibrated_kl(
            *(hidden, weight, teacher, labels),
            divergence=divergence,
            mask=mask,
            chunk_bytes=4 * 500 * 300,
            upstream="even",
            found_uneven=found,
        )
        ((out.loss * mask).sum() / mask.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == 0 and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [TopKCase, HiddenCase])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_host_never_waits_whatever_the_teachers_form(kind, divergence):
    case = kind((1200,), 500, divergence=divergence, student_dtype=torch.bfloat16, with_mask=True)
    student, teacher, labels, mask = case.tensors("cuda")
    student.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = call(case, student, teacher, labels, mask, _block_bytes=100 * 500 * 4)
        (stats.divergence + stats.cross_entropy).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_output_layer_of_16_bits_is_multiplied_as_it_is():
    case = HiddenCase((3,), 40, teacher_dtype=torch.bfloat16)
    _, teacher, _, _ = case.tensors("cuda")
    narrow = "dtype" in torch.ops.aten.mm.overloads()
    assert (teacher.factor.data_ptr() == teacher.weight.data_ptr()) == narrow


def test_the_current_stream_is_used():
    student, teacher, labels = on_gpu(MANY_ROWS)
    expected = loss_and_gradient(student, teacher, labels)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        late = torch.full_like(student, torch.nan)
        torch.cuda._sleep(100_000_000)  # on any other stream the loss would read the NaN
        late.copy_(student)
    with torch.cuda.stream(side):
        got = loss_and_gradient(late.requires_grad_(), teacher, labels)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("case", "forward"), [(MANY_ROWS, 2), (FEW_LONG_ROWS, 3)])
def test_few_launches(case, forward):
    """Two launches forward, a third where rows are split over blocks; one backward."""
    student, teacher, labels = on_gpu(case)
    loss_and_gradient(student, teacher, labels)  # so that nothing is loaded under the profiler

    def launches(call) -> tuple[object, list[str]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = call()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if "vcrd" in event.name]
        return result, names

    stats, names = launches(lambda: vcrd.vocab_parallel_divergence(student, teacher, labels))
    assert len(names) == forward, names
    total = stats.divergence.sum()
    _, names = launches(lambda: total.backward())
    assert len(names) == 1, names
