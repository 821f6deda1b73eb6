"""What only the CPU kernels have: threads of torch, and a copy for each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, run

from vcrd.loss import ops

pytestmark = pytest.mark.cpu_kernels


def test_results_are_bitwise_equal_for_any_number_of_threads():
    case = Case((64,), 3001, divergence="jsd", with_mask=True)
    stats, gradient = run(case, "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again, gradient_again = run(case, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gradient, gradient_again)
    for a, b in zip(stats, again, strict=True):
        assert torch.equal(a, b)


def test_the_kernels_run_on_torchs_threads():
    """Compiled without OpenMP, at::parallel_for would silently run on one thread; linked to a second OpenMP runtime, it
    would not hear of torch.set_num_threads."""
    assert ops._C.threaded == torch.backends.openmp.is_available()
    mapped = open("/proc/self/maps").read()
    assert (
        len({line.split()[-1] for line in mapped.splitlines() if "libgomp" in line or "libiomp" in line}) <= 1
    )


FEW = ("test_every_form.py",)
MANY = ("test_divergence.py", "test_rows.py", "test_lanes.py")


@pytest.mark.parametrize("names", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("instruction_set", ["generic", "avx2"])
def test_every_instruction_set_passes_these_tests(instruction_set, names):
    chosen = {**os.environ, "VCRD_CPU_INSTRUCTION_SET": instruction_set}
    used = subprocess.run(
        [sys.executable, "-c", "from vcrd.loss import ops; print(ops._C.cpu_instruction_set)"],
        env=chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    if used.stdout.strip() != instruction_set:
        pytest.skip(f"this processor has no {instruction_set}")
    files = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not cuda", *files]
    inner = subprocess.run(command, env=chosen, capture_output=True, text=True)
    assert inner.returncode == 0, inner.stdout[-4000:]
