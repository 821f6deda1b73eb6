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
# Run first, in the fast tier: every form in every type, every length and alignment of rows, and logits of -inf.
FIRST = ("test_every_form.py", "test_encode.py", "test_rows.py", "test_minus_infinity.py")
# All of whose tests are about the CPU kernels or about messages, or need a GPU.
WITHOUT_EMULATION = (
    "test_cpu_kernels.py",
    "test_lanes.py",
    "test_head.py",
    "test_cuda.py",
    "test_arguments.py",
)

pytestmark = pytest.mark.timeout(900)  # of which the first build takes a part


@pytest.fixture(scope="module")
def module() -> Path:
    return emulated_build.build_module()


def symbols(*files: Path) -> str:
    nm = subprocess.run(
        [emulated_build.compiler(), "-print-prog-name=nm"], capture_output=True, text=True, check=True
    )
    return subprocess.run(
        [nm.stdout.strip(), "-C", *files], capture_output=True, text=True, check=True
    ).stdout


def run(module: Path, *command: str, seconds: float, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **emulated_build.environment(),
        "VCRD_TEST_MODULE": str(module),
        "PYTHONPATH": f"{emulated_build.ROOT}:{LOSS_TESTS.parent}",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=emulated_build.ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def run_tests(module: Path, *files: str, leave_out: str = "", seconds: float, **variables: str) -> int:
    """How many of these tests of the loss ran on the emulated kernels; all passed and none was skipped.

    In one process, because the import of torch under the sanitizers takes long.
    """
    options = ["-q", "-p", "no:cacheprovider", *(["-k", f"not {leave_out}"] if leave_out else [])]
    paths = [str(LOSS_TESTS / file) for file in files]
    done = run(module, "-m", "pytest", *options, *paths, seconds=seconds, **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "skipped" not in done.stdout, done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_every_kernel_is_right_under_the_sanitizers(module, tmp_path):
    """Against the float64 reference, and no instance of a kernel stays without a launch."""
    launches = tmp_path / "launches"
    run_tests(module, *FIRST, seconds=600, VCRD_EMULATION_LAUNCHES=str(launches))
    launched = {int(line, 16) for line in launches.read_text().split()}
    kernels = {
        name: int(address, 16)
        for address, name in re.findall(
            r"^(\w+) \w ((?:void )?vcrd::cuda::.*_kernel.*\).*)$", symbols(module), re.M
        )
        if " (." not in name and "::of_" not in name
    }
    assert len(kernels) > 100
    missed = sorted(name for name, address in kernels.items() if address not in launched)
    assert not missed, "\n".join(missed)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_the_other_tests_of_the_loss_pass_on_emulated_cuda_kernels(module):
    """Without those of torch.compile, which calls the same operators with the same tensors."""
    files = {path.name for path in LOSS_TESTS.glob("test_*.py")} - {*FIRST, *WITHOUT_EMULATION}
    assert run_tests(module, *sorted(files), leave_out="compiled", seconds=1800) > 200


def test_a_read_past_a_tensor_is_found(module):
    """Planted: tensors of 1001 columns on the memory of 1000."""
    script = """
import ctypes
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
    script = "import kernels_under_test as k; k.check(); "
    script += "from vcrd.loss import ops; print(ops._C.__file__, ops._C.with_cuda)"
    done = run(module, "-c", script, seconds=120)
    assert done.stdout.split() == [str(module), "True"], done.stdout + done.stderr


def test_every_shared_variable_is_watched(module):
    """In a template or inline function that other files may share, g++ gives one neither redzones nor its section."""
    listed = symbols(*emulated_build.kernel_objects())
    assert "::of_warps" in listed
    shared_with_others = re.findall(r"^.* [uVv] vcrd::cuda::.*\).*$", listed, re.M)
    assert not shared_with_others, "declare it in the kernel:\n" + "\n".join(shared_with_others)
