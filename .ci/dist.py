"""Builds the files of a release into dist/: an sdist, a CPU wheel and, if torch has CUDA, a CUDA wheel. `make dist`.

    make dist PYTHON=python3.12 ARGS="--only cpu"

The source is the last commit, without changes that are not committed. The wheels are built from the sdist, with the
torch of this interpreter. A wheel fits one minor version of torch, and its name says which: 0.2.0+cu130.torch2.11.

Two builds of one commit with the same torch and compilers give the same bytes, whatever the checkout is called:

- All times are that of the commit, and the entries of the archives are sorted.
- The sources are unpacked at one place, because nvcc names the kernels after the path of their file.
- Paths in messages of the compiled code are relative, and debug information is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Compute capabilities of the CUDA wheel, unless TORCH_CUDA_ARCH_LIST says others.
ARCHITECTURES = "8.0;9.0a;10.0"
KINDS = ("sdist", "cpu", "cuda")
# Not below TMPDIR, which differs between machines.
PLACE = Path("/tmp/vcrd-dist")
# Variables that would change what is compiled.
_FOREIGN = (
    "CFLAGS",
    "CPPFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "NVCC_APPEND_FLAGS",
    "NVCC_PREPEND_FLAGS",
    "PYTHONPATH",
)


def fail(text: str) -> NoReturn:
    raise SystemExit(f"make dist: {text}")


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        fail(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Path]:
    """Creates the folder in which everything is built, for this build alone, and removes it."""
    try:
        folder.mkdir(mode=0o700)  # not exist_ok: another build, or another user's folder
    except FileExistsError:
        fail(f"{folder} exists: wait for the build that uses it, or remove it if there is none")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def unpack(archive: bytes, folder: Path) -> None:
    """With the same permissions for every user's umask."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            tar.extract(member, folder, filter="data")


def reproducible(sdist: bytes, seconds: int) -> bytes:
    """The same .tar.gz with sorted entries that all have this time and no owner."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(sdist)) as source, tarfile.open(fileobj=packed, mode="w") as target:
        for member in sorted(source, key=lambda member: member.name):
            clean = tarfile.TarInfo(member.name)
            clean.type, clean.size, clean.mtime = member.type, member.size, seconds
            clean.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            target.addfile(clean, source.extractfile(member) if member.isfile() else None)
    return gzip.compress(packed.getvalue(), mtime=seconds)


def compiler_flags(source: Path) -> dict[str, str]:
    """Flags that leave the folders of this machine out of the extension: headers name their files in messages."""
    import pybind11
    import torch

    folders = {
        str(source): ".",
        str(Path(torch.__file__).parents[1]): "site-packages",
        str(Path(pybind11.__file__).parents[1]): "site-packages",
        sysconfig.get_path("include"): "python",
    }
    return {
        "CFLAGS": " ".join(f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()),
        "LDFLAGS": "-Wl,-s",
    }


def build(source: Path, kind: str, out: Path, variables: Mapping[str, str]) -> Path:
    """The one file that PyPA build makes of a source folder."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{kind}",
        "--outdir",
        str(out),
        str(source),
    ]
    log = out.with_suffix(".log")
    with open(log, "w") as output:
        done = subprocess.run(command, env={**kept, **variables}, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        print(log.read_text()[-6000:], file=sys.stderr)
        fail(f"the {kind} did not build; the end of the output is above")
    (made,) = out.iterdir()
    return made


def label(cuda: bool) -> str:
    """The local version of a wheel: cpu.torch2.13, cu130.torch2.11."""
    import torch

    kind = f"cu{torch.version.cuda.replace('.', '')}" if cuda else "cpu"
    return f"{kind}.torch{'.'.join(torch.__version__.split('.')[:2])}"


def wheel(sdist: Path, folder: Path, cuda: bool, variables: Mapping[str, str]) -> Path:
    """Built from the sdist, so that an incomplete sdist is noticed."""
    import torch

    folder.mkdir()
    unpack(sdist.read_bytes(), folder)
    (source,) = folder.iterdir()
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES) if cuda else "none"
    own = {"VCRD_LOCAL_VERSION": label(cuda), "TORCH_CUDA_ARCH_LIST": architectures, **compiler_flags(source)}
    made = build(source, "wheel", folder / "out", {**variables, **own})
    check(
        made,
        cuda,
        [str(source), str(ROOT), str(Path.home()), sys.prefix, str(Path(torch.__file__).parents[1])],
    )
    return made


def check(made: Path, cuda: bool, folders: list[str]) -> None:
    """The extension has the kernels that the name of the wheel promises, and no folder of this machine."""
    with zipfile.ZipFile(made) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        extension = archive.read(name)
        record = archive.read(str(Path(name).with_suffix(".build.json")))
    found = [folder for folder in folders if len(folder) > 1 and folder.encode() in extension]
    if found:
        fail(f"{name} of {made.name} contains the path {found[0]}")
    if (b'"with_cuda": true' in record) is not cuda:
        fail(f"{made.name} has {'no' if cuda else 'the'} CUDA kernels")


def no_cuda() -> str:
    """Why there can be no CUDA wheel; empty if there can be one."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, has no CUDA"
    if os.environ.get("TORCH_CUDA_ARCH_LIST") == "none":
        return "TORCH_CUDA_ARCH_LIST is none"
    return "" if CUDA_HOME is not None else "there is no CUDA toolkit; set CUDA_HOME"


def chosen(only: str | None) -> list[str]:
    reason = no_cuda()
    if only == "cuda" and reason:
        fail(f"there is no CUDA wheel: {reason}")
    if only is None and reason:
        print(f"no CUDA wheel: {reason}")
    wanted = KINDS if only is None else dict.fromkeys(("sdist", only))
    return [kind for kind in wanted if kind != "cuda" or not reason]


def keep(made: Path, out: Path) -> None:
    content = made.read_bytes()
    (out / made.name).write_bytes(content)
    print(f"{hashlib.sha256(content).hexdigest()}  {len(content):>10}  {made.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--only", choices=KINDS, help="sdist, or the sdist and one wheel")
    parser.add_argument(
        "--place", type=Path, default=PLACE, help="where to build: changes names in the CUDA wheel"
    )
    options = parser.parse_args()
    os.umask(0o022)
    kinds = chosen(options.only)
    if git("status", "--porcelain", "--untracked-files=no"):
        print("the changes that are not committed are left out")
    seconds = int(git("log", "-1", "--format=%ct"))
    variables = {"SOURCE_DATE_EPOCH": str(seconds)}
    options.out.mkdir(parents=True, exist_ok=True)
    with place(options.place) as folder:
        unpack(git("archive", "HEAD"), folder / "commit")
        made = build(folder / "commit", "sdist", folder / "out", variables)
        made.write_bytes(reproducible(made.read_bytes(), seconds))
        keep(made, options.out)
        for kind in kinds[1:]:
            keep(wheel(made, folder / kind, kind == "cuda", variables), options.out)
    files = sorted(path for path in options.out.iterdir() if path.name.startswith("vcrd-"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (options.out / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
