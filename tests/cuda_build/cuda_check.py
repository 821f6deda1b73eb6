"""Looks at the machine code of the CUDA kernels; needs no GPU.

    python tests/cuda_build/cuda_check.py [--arch sm_90a ...] [--jobs 2 | --objects build/temp.../csrc/cuda]

It compiles them as the extension does, or reads the object files of a build of the extension.

For every kernel: registers, shared memory, theoretical occupancy, the loads and stores of a loop. Fails, with a
sentence on each kernel, where registers spill, local memory is used, or rows are not read and written 16 bytes at a
time. The compiler is the toolkit's of this machine (CUDA_HOME, nvcc on the PATH, /usr/local/cuda) or, where there is
none, that of requirements/cuda-toolkit.txt in the environment that runs this; cuobjdump comes from
requirements/cuda-check.txt.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

ROOT = Path(__file__).resolve().parents[2]
# What torch.utils.cpp_extension adds to the flags of setup.py.
TORCH_FLAGS = ["-std=c++17", "--expt-relaxed-constexpr"] + [
    f"-D__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]

# What each kernel reads and writes of its rows. A kernel that is not here is a fault, so that a new one gets a rule.
RULES: dict[str, Rule | None] = {
    "row_statistics": Rule(loads=(0, 1)),
    "mixture_sums": Rule(loads=(0, 1)),
    "gradient": Rule(loads=(0, 1), stores=(0,)),
    "row_maxima": Rule(loads=(0,)),
    "encode": Rule(loads=(0,), stores=(1,)),
    "mix": Rule(loads=(0,)),
    "combine_partials": None,  # a few numbers per row, no logits
    "merge_statistics": None,
}


def packaged() -> Path:
    """Where NVIDIA's packages put their files in this environment."""
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"


def find_toolkit() -> Path | None:
    """Its folder, with compiler and headers. An nvcc on the PATH may be a script that stands for one elsewhere."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path and Path(on_path).parents[1]]
    found = [Path(home) for home in [*homes, "/usr/local/cuda", packaged()] if home]
    return next(
        (
            home
            for home in found
            if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists()
        ),
        None,
    )


def find_cuobjdump() -> Path | None:
    on_path = shutil.which("cuobjdump")
    found = [packaged() / "bin/cuobjdump", *([Path(on_path)] if on_path else [])]
    return next((path for path in found if path.exists()), None)


def nvcc_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, read without running it: what is checked must be what is built."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NVCC_FLAGS":
            return ast.literal_eval(node.value)
    raise SystemExit("setup.py has no list NVCC_FLAGS")


def divergence_names() -> dict[str, str]:
    """(vcrd::Divergence)1 -> ReverseKl, from csrc/params.h."""
    listed = re.search(r"enum class Divergence[^{]*\{([^}]*)\}", (ROOT / "csrc/params.h").read_text())[1]
    names = [name.strip().removeprefix("k") for name in listed.split(",")]
    return {f"(vcrd::Divergence){number}": name for number, name in enumerate(names)}


def compile_source(nvcc: Path, source: Path, arch: str, folder: str) -> Path:
    """The object file; SystemExit when it does not compile."""
    compiled = Path(folder) / f"{source.stem}.o"
    virtual = arch.replace("sm_", "compute_")
    flags = [*nvcc_flags(), *TORCH_FLAGS, f"-gencode=arch={virtual},code={arch}"]
    run = subprocess.run([nvcc, "-cubin", *flags, source, "-o", compiled], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{run.stdout}{run.stderr}\n{source.name} does not compile for {arch}")
    return compiled


def kernels_of(cuobjdump: Path, compiled: Path, arch: str) -> list[Kernel]:
    # cuobjdump calls nvdisasm, which lies beside it.
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}:{os.environ['PATH']}"}

    def dump(what: str) -> str:
        command = [cuobjdump, "-arch", arch, what, compiled]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    kernels = resources(dump("-res-usage"), CHIPS[arch].counted)
    bounds, accesses = launch_bounds(dump("-elf")), memory_accesses(dump("-sass"))
    names, divergences = demangled(list(kernels)), divergence_names()
    for symbol, kernel in kernels.items():
        kernel.threads = bounds.get(symbol, 0)
        kernel.local_accesses, kernel.loads, kernel.stores = accesses[symbol]
        kernel.name, kernel.arguments = names[symbol]
        kernel.name = kernel.name.removesuffix("_kernel")
        kernel.arguments = tuple(divergences.get(a, a) for a in kernel.arguments)
    return sorted(kernels.values(), key=lambda k: k.title)


def outdated(compiled: list[Path]) -> Path | None:
    """The first object file that is missing, or older than a file of csrc."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return next((path for path in compiled if not path.exists() or path.stat().st_mtime < newest), None)


def widest(stretches: list[list[int]]) -> str:
    """4x128 2x64: the accesses of the stretch that moves most, by width in bits."""
    most = max(stretches, key=sum, default=[])
    return " ".join(f"{most.count(w)}x{w * 8}" for w in sorted(set(most), reverse=True)) or "-"


def compile_sources(nvcc: Path, sources: list[Path], arch: str, folder: str, jobs: int) -> list[Path]:
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(lambda source: compile_source(nvcc, source, arch, folder), sources))
    print(f"{arch}: compiled {len(compiled)} files in {time.monotonic() - started:.0f} s")
    return compiled


def check(arch: str, kernels: list[Kernel]) -> list[str]:
    """Prints the table of one architecture; sentences on what is wrong."""
    wrong = [] if kernels else [f"{arch}: there is no kernel for this architecture"]
    print(f"{arch}: {len(kernels)} kernels")
    width = max((len(kernel.title) for kernel in kernels), default=0)
    print(f"{'kernel':{width}}  threads  registers  shared B  occupancy  loads in a loop   stores in a loop")
    for kernel in kernels:
        share = occupancy(kernel, CHIPS[arch], kernel.threads or 256)
        print(
            f"{kernel.title:{width}}  {kernel.threads or '-':>7}  {kernel.registers:>9}  {kernel.shared:>8}  "
            f"{share:>8.0%}   {widest(kernel.loads):16}  {widest(kernel.stores)}"
        )
        if kernel.name not in RULES:
            wrong.append(f"{arch}: {kernel.title} has no rule in tests/cuda_build/cuda_check.py")
        wrong += [f"{arch}: {kernel.title} {fault}" for fault in faults(kernel, RULES.get(kernel.name))]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90a"], choices=sorted(CHIPS))
    parser.add_argument("--jobs", type=int, default=2, help="files compiled at a time")
    parser.add_argument(
        "--objects", type=Path, help="folder with the object files of a build, to be read in place"
    )
    parser.add_argument("--home", action="store_true", help="only print where the CUDA toolkit is")
    parser.add_argument("--sources", nargs="+", type=Path, default=sorted((ROOT / "csrc/cuda").glob("*.cu")))
    options = parser.parse_args()
    toolkit, cuobjdump = find_toolkit(), find_cuobjdump()
    if toolkit is None:
        return _stop("no CUDA toolkit found; set CUDA_HOME or install requirements/cuda-toolkit.txt")
    if options.home:
        print(toolkit.resolve())
        return 0
    if cuobjdump is None:
        return _stop("no cuobjdump found; install requirements/cuda-check.txt")
    if not options.sources:
        return _stop("there are no kernels in csrc/cuda")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch:
            if options.objects:
                compiled = [options.objects / f"{source.stem}.o" for source in options.sources]
                if old := outdated(compiled):
                    return _stop(
                        f"--objects: expected {old} of a build of these sources; build the extension first"
                    )
            else:
                compiled = compile_sources(toolkit / "bin/nvcc", options.sources, arch, folder, options.jobs)
            wrong += check(
                arch, [kernel for file in compiled for kernel in kernels_of(cuobjdump, file, arch)]
            )
    for sentence in wrong:
        print(f"FAULT {sentence}", file=sys.stderr)
    print("nothing in local memory, rows move 16 bytes at a time" if not wrong else f"{len(wrong)} faults")
    return bool(wrong)


def _stop(sentence: str) -> int:
    print(f"cuda-check: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
