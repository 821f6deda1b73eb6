"""The test of the kernels finds a kernel that computes wrong values, and says which."""

from __future__ import annotations

import pytest
import torch
from doctor_runs import make_job

from vcrd.doctor import extension
from vcrd.doctor.findings import OK, PROBLEM, UNCHECKED
from vcrd.doctor.processes import World
from vcrd.loss import ops


def lines(world: World | None = None) -> list:
    return extension.kernels(make_job(world))


def test_the_kernels_here_are_right():
    cpu, cuda = lines()[:2]
    assert (cpu.name, cpu.status) == ("kernels", OK)
    assert cuda.name == "cuda kernels"
    if not torch.cuda.is_available():
        assert cuda.status == UNCHECKED


def test_every_divergence_form_and_dtype_is_tried():
    from vcrd.loss.config import DIVERGENCES

    cases = list(extension._cases())
    assert {case.divergence for case in cases} == set(DIVERGENCES)
    assert {case.form for case in cases} == {"logits", "logits_8bit", "topk", "hidden"}
    assert {(case.form, case.dtype) for case in cases if case.form == "logits"} == {
        ("logits", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


@pytest.mark.parametrize("name", ["row_statistics", "merge_statistics", "mixture_sums", "gradient", "encode"])
def test_an_operator_that_computes_a_little_wrongly_is_found(monkeypatch, name):
    """By a thousandth, in one of its results, one row of it only."""
    real = getattr(ops if name != "encode" else torch.ops.vcrd, name)

    def wrong(*arguments):
        result = real(*arguments)
        if name == "encode":
            arguments[2][3] //= 2
        else:
            first = result[0] if isinstance(result, tuple) else result
            first[..., 3, :].mul_(1.001) if name != "merge_statistics" else first[:, 3].mul_(1.001)
        return result

    monkeypatch.setattr(torch.ops.vcrd if name == "encode" else ops, name, wrong)
    line = lines()[0]
    assert (line.name, line.status) == ("kernels", PROBLEM)
    said = "8-bit codes do not match" if name == "encode" else "times the allowed error"
    assert " on cpu: " in line.found and said in line.found


def test_a_kernel_that_gives_nan_or_does_not_run_is_found(monkeypatch):
    real = ops.gradient
    monkeypatch.setattr(ops, "gradient", lambda *arguments: real(*arguments) * float("nan"))
    assert "is wrong on cpu: inf times" in lines()[0].found

    def fails(*arguments):
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(ops, "gradient", fails)
    assert lines()[0].found.endswith(
        " fails on cpu: no kernel image is available for execution on the device"
    )


def test_the_cpu_is_tested_once_per_node():
    assert "kernels" not in [line.name for line in lines(World(rank=1, size=2, local_rank=1, local_size=2))]
