"""Checks an installed vcrd in an image, without a GPU. Prints the errors, and exits with 1 if there are any.

    python -I docker/check.py ARCHITECTURES

ARCHITECTURES are the targets of the extension in torch's notation ("9.0a", "9.0a;10.0+PTX"), or "none".
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

EXAMPLE = ("plan", "--teacher", "Qwen3-32B,tp=8", "--student", "Qwen3-4B,tp=2,dp=8")


def asked(architectures: str) -> set[str]:
    """{"sm_90a", "sm_100", "compute_100"} of "9.0a;10.0+PTX"; empty for "none"; SystemExit for anything else."""
    if architectures == "none":
        return set()
    names = re.split(r"[;, ]+", architectures)
    wrong = [name for name in names if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]
    if wrong:
        raise SystemExit(
            "CUDA_ARCHITECTURES must list compute capabilities, such as 9.0a;10.0+PTX, or be none; "
            f"got {architectures!r}"
        )
    chips = [name.removesuffix("+PTX").replace(".", "") for name in names]
    ptx = [chip for chip, name in zip(chips, names, strict=True) if name.endswith("+PTX")]
    return {f"sm_{chip}" for chip in chips} | {f"compute_{chip}" for chip in ptx}


def listed(elf: str, ptx: str) -> set[str]:
    """The same from the output of `cuobjdump --list-elf` and `--list-ptx`."""
    chips = {f"sm_{chip}" for chip in re.findall(r"^ELF file.*\.sm_(\d+[af]?)\.cubin$", elf, re.M)}
    return chips | {f"compute_{chip}" for chip in re.findall(r"^PTX file.*\.sm_(\d+[af]?)\.ptx$", ptx, re.M)}


def built(extension: Path) -> set[str]:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = os.pathsep.join([f"{home}/bin" for home in homes if home] + [os.environ.get("PATH", "")])
    cuobjdump = shutil.which("cuobjdump", path=folders)
    if cuobjdump is None:
        raise SystemExit("no cuobjdump found (CUDA_HOME, the PATH): what was built cannot be looked at")

    def dump(what: str) -> str:
        return subprocess.run([cuobjdump, what, extension], capture_output=True, text=True, check=True).stdout

    return listed(dump("--list-elf"), dump("--list-ptx"))


def faults(architectures: set[str]) -> list[str]:
    import torch

    import vcrd
    from vcrd import _C

    found, home = [], Path(vcrd.__file__).parent
    if not any(home.is_relative_to(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")):
        found.append(f"vcrd comes from {home}, not from the installed package")
    if _C.torch_version != torch.__version__:
        found.append(
            f"the extension was built with torch {_C.torch_version}, and this is {torch.__version__}"
        )
    has = built(Path(_C.__file__)) if _C.with_cuda else set()
    if has != architectures:
        sets = [" ".join(sorted(s)) or "no CUDA architecture" for s in (architectures, has)]
        found.append(f"the extension should hold {sets[0]}, and holds {sets[1]}")

    logits = torch.randn(4, 32, requires_grad=True)
    vcrd.validity_calibrated_kl(logits, torch.randn(4, 32), torch.arange(4)).loss.sum().backward()
    if logits.grad is None or not logits.grad.isfinite().all():
        found.append("the loss gave no finite gradient")
    command = subprocess.run([sys.executable, "-I", "-m", "vcrd", *EXAMPLE], capture_output=True, text=True)
    if command.returncode:
        found.append(f"python -m vcrd plan ended with status {command.returncode}: {command.stderr.strip()}")
    if not torch.cuda.is_available():
        # Transformer Engine may want a driver as it is imported, and an image is built without one. Megatron-Core then
        # takes it for absent.
        sys.modules["transformer_engine"] = None
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed")
    import vcrd.megatron

    if importlib.util.find_spec("megatron.training") is None and sys.version_info >= (3, 12):
        found.append("megatron.training, which the examples need, is missing")
    if not callable(vcrd.megatron.distill):
        found.append("vcrd.megatron offers no distill")
    print(
        f"vcrd {vcrd.__version__} in {home}, torch {torch.__version__}, {' '.join(sorted(has)) or 'CPU kernels only'}"
    )
    return found


def main(architectures: str) -> int:
    found = faults(asked(architectures))
    for sentence in found:
        print(f"vcrd: {sentence}", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
