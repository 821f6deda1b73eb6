"""Builds what runs the CUDA kernels' own source on the CPU: `toys`, and an emulated vcrd._C under both sanitizers.

Ninja compiles again only what changed. Everything lies in build/emulation: the kernels once, and a folder for each
version of Python and torch with what depends on these.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build/emulation"
VERSIONS = f"{sys.implementation.cache_tag}-torch{torch.__version__}"

# What costs much and finds little here is left out: the type of every object, and null before every access, which the
# memory protection finds too. -g1 is enough for lines in reports, and -fno-strict-aliasing is what nvcc lives by.
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=null,vptr,object-size,pointer-overflow "
    "-fno-sanitize-recover=all -fsanitize-sections=vcrd_shared"
)
KERNELS = f"-O1 -g1 -fPIC -fno-strict-aliasing -Wall {SANITIZERS} -I{HERE}/include"
STANDARD = "-std=c++20"


class BuildFailed(Exception):
    pass


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise BuildFailed("the emulation needs g++ (or a g++ named in CXX)")
    return found


def runtime_library(name: str) -> Path:
    """The compiler's own copy of a library, for LD_PRELOAD."""
    said = subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = Path(said.stdout.strip())
    if not path.is_absolute():
        raise BuildFailed(
            f"{compiler()} has no {name}; the emulation runs under the sanitizers that g++ brings along"
        )
    return path.resolve()


def environment() -> dict[str, str]:
    """For a process that is not itself instrumented, such as Python, but loads what is."""
    options = {
        # Python and torch keep what they allocate until they end.
        "detect_leaks": 0,
        # Fresh tensors are full of NaN, so that an output that nobody wrote is seen.
        "malloc_fill_byte": 255,
        "max_malloc_fill_size": 1 << 24,
        "detect_odr_violation": 0,
        "quarantine_size_mb": 16,
        "malloc_context_size": 8,
    }
    return {
        **os.environ,
        # libstdc++ too: the sanitizer looks for the C++ functions that it wraps when the process starts.
        "LD_PRELOAD": f"{runtime_library('libasan.so')} {runtime_library('libstdc++.so.6')}",
        "ASAN_OPTIONS": ":".join(f"{key}={value}" for key, value in options.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build_toys() -> Path:
    rule = f"{compiler()} {STANDARD} {KERNELS} -Wno-infinite-recursion -MD -MF $out.d -x c++ $in -o $out"
    return _ninja("toys", {"toys": rule}, [("toys", "toys", [HERE / "toys.cu"])])


def build_module() -> Path:
    """A module _C whose operators run the emulated kernels on CPU tensors."""
    folders = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    system = " ".join(f"-isystem {folder}" for folder in folders)
    # The binding is the longest to compile, and not what is looked at here.
    binding = f"-O0 -fPIC -fvisibility=hidden -I{HERE}/include {system}"
    defines = f"-DVCRD_CUDA -DVCRD_CUDA_DEVICE=at::kCPU -DVCRD_TORCH_VERSION='\"{torch.__version__}\"'"
    compile_ = f"{compiler()} {STANDARD} -MD -MF $out.d -o $out -c"
    libraries = " ".join(f"-L{path} -Wl,-rpath,{path}" for path in library_paths())
    rules = {
        "binding": f"{compile_} {binding} {defines} $in",
        "cpu": f"{compile_} -O0 -fPIC -fvisibility=hidden $in",
        "cuda": f"{compile_} -x c++ {KERNELS} -fvisibility=hidden $in",
        "link": f"{compiler()} -shared {SANITIZERS} $in -o $out {libraries} -ltorch_cpu -ltorch -lc10",
    }
    csrc = ROOT / "csrc"
    objects = [
        ("binding", f"{VERSIONS}/bind.o", [csrc / "bind.cpp"]),
        *(("cuda", f"cuda/{path.stem}.o", [path]) for path in sorted(csrc.glob("cuda/*.cu"))),
        *(("cpu", f"cpu/{path.stem}.o", [path]) for path in sorted(csrc.glob("cpu/*.cpp"))),
    ]
    module = f"{VERSIONS}/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return _ninja(VERSIONS, rules, [*objects, ("link", module, [name for _, name, _ in objects])])


def kernel_objects() -> list[Path]:
    return sorted((FOLDER / "cuda").glob("*.o"))


def _ninja(name: str, rules: dict[str, str], edges: list[tuple[str, str, list]]) -> Path:
    """Builds the last edge's output: edges are (rule, output, inputs)."""
    lines = ["ninja_required_version = 1.3", "builddir = log"]
    for rule, command in rules.items():
        lines += [f"rule {rule}", f"  command = {command}"]
        if "-MF" in command:
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for rule, out, inputs in edges:
        lines.append(f"build {out}: {rule} {' '.join(str(path).replace(' ', '$ ') for path in inputs)}")
    target = FOLDER / edges[-1][1]
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise BuildFailed("the emulation is built with ninja, as the extension is; it was not found")
    runtime_library("libasan.so")  # or says what is missing
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may start at once
        script = FOLDER / f"{name}.ninja"
        script.write_text("\n".join([*lines, ""]))
        command = [ninja, "--quiet", "-f", script.name, str(target.relative_to(FOLDER))]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(
            f"the emulated kernels did not compile:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        )
    return target


if __name__ == "__main__":
    print(build_toys(), build_module(), sep="\n")
