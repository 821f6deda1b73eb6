"""The tests of the loss once more, on the CUDA kernels' own source: compiled as C++, under AddressSanitizer and
UndefinedBehaviorSanitizer, each CUDA thread a fiber.

Not emulated, so left to the compiler check and to a GPU: the machine code, its speed and registers, memory ordering
between blocks that run at the same time, approximate functions (exp2, division) and flushed denormals, the asynchrony
of streams, and the capture of a CUDA graph.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import emulated_build
import pytest

LOSS_TESTS = emulated_build.ROOT / "tests/loss"

pytestmark = pytest.mark.timeout(900)  # of which the first build takes a part


@pytest.fixture(scope="module")
def module() -> Path:
    return emulated_build.build_module()


def run(module: Path, *command: str, seconds: float) -> subprocess.CompletedProcess:
    environment = {
        **emulated_build.environment(),
        "VCRD_TEST_MODULE": str(module),
        "PYTHONPATH": str(emulated_build.ROOT),
    }
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=emulated_build.ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def test_the_tests_of_the_loss_pass_on_emulated_cuda_kernels(module):
    done = run(module, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(LOSS_TESTS), seconds=800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    # Left out are those about the CPU kernels, and nothing else.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1]) >= 150 and "skipped" not in done.stdout, done.stdout[-3000:]


def test_a_read_past_a_tensor_is_found(module):
    """Planted: tensors of 1001 columns on the memory of 1000."""
    script = """
import ctypes, sys
sys.path.insert(0, "tests/loss")
import kernels_under_test
import torch
from vcrd import vocab_parallel_divergence

def lying(true):
    return torch.frombuffer((ctypes.c_float * 1001).from_address(true.data_ptr()), dtype=torch.float32)[None]

assert torch.empty(1000).isnan().all(), "fresh memory must hold NaN"
student, teacher = torch.zeros(1000), torch.zeros(1000)
vocab_parallel_divergence(student[None], teacher[None])
print("the truth passes")
vocab_parallel_divergence(lying(student), lying(teacher))
"""
    done = run(module, "-c", script, seconds=120)
    assert "the truth passes" in done.stdout and done.returncode != 0, done.stdout + done.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "row.cuh" in done.stderr, done.stderr


def test_the_emulated_module_is_the_one_that_is_tested(module):
    script = "import sys; sys.path.insert(0, 'tests/loss'); import kernels_under_test as k; k.check(); "
    script += "from vcrd import ops; print(ops._C.__file__, ops._C.with_cuda)"
    done = run(module, "-c", script, seconds=120)
    assert done.stdout.split() == [str(module), "True"], done.stdout + done.stderr


def test_every_shared_variable_is_watched(module):
    """In a template or inline function that other files may share, g++ gives one neither redzones nor its section."""
    nm = subprocess.run(
        [emulated_build.compiler(), "-print-prog-name=nm"], capture_output=True, text=True, check=True
    )
    objects = emulated_build.kernel_objects()
    listed = subprocess.run([nm.stdout.strip(), "-C", *objects], capture_output=True, text=True, check=True)
    assert "::of_warps" in listed.stdout
    shared_with_others = re.findall(r"^.* [uVv] vcrd::cuda::.*\).*$", listed.stdout, re.M)
    assert not shared_with_others, "declare it in the kernel:\n" + "\n".join(shared_with_others)
