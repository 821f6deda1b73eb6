"""The parts of `make cuda-check` that read text, on what nvcc 13.0 and cuobjdump 13.2 said of three small kernels:

row_maxima reads one float32 at a time, gradient four columns (16 bytes of float32, 8 of bfloat16), and merge_statistics
keeps an array in local memory.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_check
import pytest
from cuda_binary import (
    CHIPS,
    Kernel,
    Rule,
    demangled,
    faults,
    launch_bounds,
    memory_accesses,
    occupancy,
    resources,
)

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="module")
def kernels() -> dict[str, Kernel]:
    read = {name: (SAMPLES / f"{name}.txt").read_text() for name in ("usage", "elf", "sass")}
    found, bounds, accesses = (
        resources(read["usage"], CHIPS["sm_90a"].counted),
        launch_bounds(read["elf"]),
        memory_accesses(read["sass"]),
    )
    names = demangled(list(found))
    for symbol, kernel in found.items():
        kernel.name, kernel.arguments = names[symbol]
        kernel.threads = bounds[symbol]
        kernel.local_accesses, kernel.loads, kernel.stores = accesses[symbol]
    return {kernel.name.removesuffix("_kernel"): kernel for kernel in found.values()}


def test_reads_resources_and_names(kernels):
    gradient = kernels["gradient"]
    assert gradient.arguments == ("__nv_bfloat16", "float", "(vcrd::Divergence)1")
    assert gradient.types == ["__nv_bfloat16", "float"]
    assert gradient.title == "gradient_kernel<bf16, f32, 1>"
    assert (gradient.registers, gradient.threads, gradient.stack, gradient.shared) == (16, 256, 0, 0)
    assert kernels["merge_statistics"].arguments == ()
    assert [kernels[name].threads for name in ("row_maxima", "merge_statistics")] == [128, 64]


def test_accepts_vector_accesses(kernels):
    assert kernels["gradient"].loads == [[8, 16]]
    assert kernels["gradient"].stores == [[8]]
    assert faults(kernels["gradient"], cuda_check.RULES["gradient"]) == []


def test_narrow_loads_are_a_fault(kernels):
    (fault,) = faults(kernels["row_maxima"], cuda_check.RULES["row_maxima"])
    assert "no loop with 128-bit loads" in fault and "32" in fault


def test_narrow_stores_are_a_fault(kernels):
    gradient = kernels["gradient"]
    gradient = Kernel(**{**vars(gradient), "stores": [[4, 4, 4, 4]]})
    (fault,) = faults(gradient, cuda_check.RULES["gradient"])
    assert "no loop with 64-bit stores" in fault


def test_loads_of_two_rows_must_be_in_flight_together(kernels):
    gradient = Kernel(**{**vars(kernels["gradient"]), "loads": [[8], [16]]})
    assert len(faults(gradient, Rule(loads=(0, 1)))) == 1


def test_local_memory_is_a_fault(kernels):
    merge = kernels["merge_statistics"]
    assert (merge.stack, merge.local_accesses) == (256, 19)
    (fault,) = faults(merge, cuda_check.RULES["merge_statistics"])
    assert "256 bytes of stack, 19 accesses" in fault


def test_spills_are_a_fault_and_the_shared_memory_of_the_driver_is_not_the_kernels():
    """ptxas said of this kernel: 768 bytes spill stores, 788 bytes spill loads, 1024 bytes smem."""
    usage = (
        " Function k:\n  REG:32 STACK:536 SHARED:2048 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    (kernel,) = resources(usage, CHIPS["sm_90a"].counted).values()
    assert (kernel.registers, kernel.shared) == (32, 1024)
    (fault,) = faults(kernel, None)
    assert "536 bytes of stack" in fault


def test_a_build_of_other_sources_is_not_read(tmp_path):
    """Files of a build: one is missing, one is older than the sources, the third is as new as they are."""
    missing, old, new = (tmp_path / f"{name}.o" for name in ("missing", "old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    os.utime(new, (2**33, 2**33))
    assert [cuda_check.outdated([new, file]) for file in (missing, old, new)] == [missing, old, None]


@pytest.mark.parametrize(
    "registers, shared, threads, arch, share",
    [
        (32, 0, 256, "sm_90a", 1.0),
        (72, 0, 256, "sm_90a", 0.375),  # 7 warps fit a scheduler, so 28 of the chip's, 3 blocks
        (80, 0, 256, "sm_90a", 0.375),
        (255, 0, 64, "sm_90a", 0.125),  # 2 warps to each of the 4 schedulers
        (32, 0, 32, "sm_90a", 0.5),  # 32 blocks, whatever they hold
        (32, 48 << 10, 256, "sm_90a", 0.5),  # 4 blocks of 49 KB in 228 KB
        (32, 48 << 10, 256, "sm_80", 0.375),  # 3 in 164 KB
    ],
)
def test_occupancy(registers, shared, threads, arch, share):
    kernel = Kernel("k", registers=registers, shared=shared)
    assert occupancy(kernel, CHIPS[arch], threads) == share


def test_flags_are_those_of_setup():
    assert "-O3" in cuda_check.nvcc_flags()


def test_names_of_divergences_are_those_of_the_kernels():
    assert cuda_check.divergence_names()["(vcrd::Divergence)1"] == "ReverseKl"


def test_no_header_hides_one_of_the_system():
    """Whoever adds csrc to the include path must still get <math.h> itself: nvcc's own headers include it."""
    headers = [path for path in (cuda_check.ROOT / "csrc").rglob("*.*h") if path.is_file()]
    assert headers
    for header in headers:
        source = f"#if __has_include(<{header.name}>)\n#error hidden\n#endif\n"
        compiler = [os.environ.get("CXX", "g++"), "-E", "-x", "c++", "-"]
        run = subprocess.run(compiler, input=source, capture_output=True, text=True)
        assert run.returncode == 0, f"{header} hides a header of the system: {run.stderr}"
