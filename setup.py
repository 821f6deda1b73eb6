"""Builds vcrd and its compiled extension vcrd._C.

The CPU kernels are always built. The CUDA kernels are built too if torch has CUDA, a toolkit is found and csrc/cuda has
sources. The build must use the torch that will run the extension, so build without isolation:

    pip install --no-build-isolation -e .

Variables: TORCH_CUDA_ARCH_LIST (none: no CUDA kernels), CUDA_HOME, and VCRD_LOCAL_VERSION for a wheel that others
install (`make dist`): 0.2.0 becomes 0.2.0+LABEL, and the wheel requires the minor version of torch of its build.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import site
import subprocess
from importlib import metadata
from pathlib import Path

import pybind11
import torch
from setuptools import find_packages, setup


def find_toolkit() -> None:
    """Sets CUDA_HOME if it is not set. torch would use the folder above nvcc, but nvcc may be a wrapper."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    steps = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", steps.stderr, re.M)
    if top:
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


find_toolkit()  # before torch reads CUDA_HOME
from torch.utils.cpp_extension import (  # noqa: E402
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
)

ROOT = Path(__file__).parent

# This package needs exact sums, so there is no -ffast-math. Three flags are safe: nothing reads errno or floating-point
# traps, which lets loops with comparisons vectorise, and a * b + c may be rounded once. -fopenmp is for the `omp simd`
# annotations of the reductions and for torch's thread pool; without it at::parallel_for is a plain loop. The linker
# does not get it, so that the extension uses torch's OpenMP runtime. torch's headers choose the C++ standard.
CXX_FLAGS = [
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
LABEL = os.environ.get("VCRD_LOCAL_VERSION", "")
# Denormals are flushed, so that an exponential is one instruction on the special-function unit.
NVCC_FLAGS = ["-O3", "-ftz=true"]
# For profilers. Line numbers contain the path of the sources, which a wheel for other machines must not.
LINES = [] if LABEL else ["-lineinfo"]
# For a machine where torch finds no GPU.
DEFAULT_CUDA_ARCHITECTURES = "9.0a"


def version() -> str:
    number = re.search(r'^__version__ = "(.+)"', (ROOT / "vcrd/__init__.py").read_text(), re.M).group(1)
    return f"{number}+{LABEL}" if LABEL else number


def required_torch() -> str:
    """What pip installs beside this package: for a wheel that others install, the torch that its extension fits."""
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*" if LABEL else "torch>=2.6"


def check_torch(folders: list[str]) -> None:
    """SystemExit if pip builds with another torch than that of the environment.

    folders: where the environment has its packages. pip's isolation hides them from the build, but it runs the
    interpreter of the environment, so `site` still names them. Other tools build in an environment of their own, and
    vcrd refuses at its first import.
    """
    if "pip-build-env-" not in torch.__file__:
        return
    # Not torch.__version__, which may have a local version that the metadata lack: 2.11.0+cu130 for 2.11.0 of PyPI.
    used = metadata.version("torch")
    for found in metadata.distributions(name="torch", path=folders):
        if found.version != used:
            raise SystemExit(
                f"vcrd: this isolated build has torch {used} and the environment has torch {found.version}, which "
                "could not load the extension: add --no-build-isolation"
            )


def sources() -> tuple[list[str], bool]:
    """Source files relative to the root, and whether CUDA is among them: TORCH_CUDA_ARCH_LIST=none leaves it out."""
    cpu = ["csrc/bind.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))]
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.cu"))
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") != "none"
    with_cuda = bool(cuda) and wanted and torch.version.cuda is not None and CUDA_HOME is not None
    return cpu + (cuda if with_cuda else []), with_cuda


def built_from() -> dict[str, str]:
    """SHA-256 of each source file of the extension, by name."""
    files = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def architectures() -> str:
    """The target architectures in torch's notation: "8.0;9.0a"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if listed:
        return listed.replace(" ", ";")
    found = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def extension():
    files, with_cuda = sources()
    flags = [*CXX_FLAGS, f'-DVCRD_TORCH_VERSION="{torch.__version__}"']
    include_dirs = [pybind11.get_include()]
    if not with_cuda:
        return CppExtension("vcrd._C", files, include_dirs=include_dirs, extra_compile_args={"cxx": flags})
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    flags += ["-DVCRD_CUDA", f'-DVCRD_CUDA_ARCHITECTURES="{architectures()}"']
    return CUDAExtension(
        "vcrd._C",
        files,
        include_dirs=include_dirs,
        extra_compile_args={"cxx": flags, "nvcc": [*NVCC_FLAGS, *LINES]},
    )


class SummarisedBuild(BuildExtension):
    """A ninja build that prints a summary at its end."""

    def run(self) -> None:
        before = built_from()  # before compiling: later changes of the sources may be missing in the build
        super().run()
        _, with_cuda = sources()
        # vcrd/build_record.py reads this before it loads the extension. benchmarks/gpu/build.py finds out with it
        # whether a copied build is up to date; file times do not matter on another machine.
        record = {
            "sources": before,
            "torch": torch.__version__,
            "with_cuda": with_cuda,
            "cuda": torch.version.cuda if with_cuda else None,
        }
        built = Path(self.get_ext_fullpath("vcrd._C"))
        built.with_suffix(".build.json").write_text(json.dumps(record, indent=1) + "\n")
        if with_cuda:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "this machine's architecture")
            cuda = f"{architectures}, CUDA {torch.version.cuda}, toolkit {CUDA_HOME}"
        elif not list((ROOT / "csrc/cuda").glob("*.cu")):
            cuda = "no (this version has no CUDA kernels)"
        else:
            reasons = {
                torch.version.cuda is None: "torch has no CUDA",
                CUDA_HOME is None: "no CUDA toolkit found",
            }
            cuda = f"no ({reasons.get(True, 'TORCH_CUDA_ARCH_LIST is none')})"
        threads = "torch's OpenMP threads" if torch.backends.openmp.is_available() else "one thread"
        rows = {"vcrd": version(), "torch": torch.__version__, "CPU kernels": threads, "CUDA kernels": cuda}
        print("\nvcrd._C built:\n" + "\n".join(f"  {name:<13}{value}" for name, value in rows.items()))


check_torch(site.getsitepackages())
setup(
    name="vcrd",
    version=version(),
    description="Validity-calibrated reasoning distillation for Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vcrd", "vcrd.*"]),
    package_data={"vcrd.report": ["page.html"]},
    install_requires=[required_torch()],
    extras_require={
        "nccl": ["nccl4py>=0.6"],
        "megatron": ["megatron-core>=0.16"],
        "doctor": ["nvidia-ml-py>=12.535", "rich>=13"],
        "telemetry": ["nvidia-ml-py>=12.535"],
        "cache": ["numpy", "safetensors>=0.4"],
        "report": ["matplotlib>=3.8"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": SummarisedBuild.with_options(use_ninja=True)},
)
