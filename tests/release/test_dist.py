"""`make dist`: the same bytes from any checkout of a commit, and an sdist from which pip builds and installs vcrd."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, version
from pathlib import Path
from types import SimpleNamespace

import page_environment
import pytest
import torch

import vcrd

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("vcrd_release_dist", ROOT / ".ci/dist.py")
dist = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dist)


def packed(names: list[str], **each) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            for key, value in each.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(name.encode()))
    return archive.getvalue()


def test_an_archive_depends_only_on_names_contents_and_the_time_of_the_commit():
    first = packed(["v/b", "v/a"], mtime=5, uid=1000, uname="somebody", mode=0o640)
    second = packed(["v/a", "v/b"], mtime=7, mode=0o664)
    assert dist.reproducible(first, 99) == dist.reproducible(second, 99) != dist.reproducible(second, 98)
    with tarfile.open(fileobj=io.BytesIO(dist.reproducible(first, 99))) as tar:
        assert [(m.name, m.mtime, m.mode, m.uname) for m in tar] == [
            ("v/a", 99, 0o644, ""),
            ("v/b", 99, 0o644, ""),
        ]
        assert tar.extractfile("v/b").read() == b"v/b"


@pytest.mark.parametrize(
    ("cuda", "torch_version", "label"),
    [(None, "2.13.0+cpu", "cpu.torch2.13")]
    + [("13.0", "2.11.0+cu130", "cu130.torch2.11"), ("13.0", "2.11.0a0+eb65.nv26", "cu130.torch2.11")],
)
def test_the_label_names_torch_and_cuda(monkeypatch, cuda, torch_version, label):
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(__version__=torch_version, version=SimpleNamespace(cuda=cuda))
    )
    assert dist.label(cuda is not None) == label


@pytest.mark.parametrize(
    ("extension", "cuda", "says"),
    [
        (b"\0/home/me/csrc/bind.cpp\0", False, "contains the path /home/me"),
        (b"\0./csrc/bind.cpp\0", True, "has the CUDA kernels"),
        (b"\0./csrc/bind.cpp\0", False, ""),
    ],
)
def test_a_wheel_with_paths_or_other_kernels_is_refused(tmp_path, extension, cuda, says):
    made = tmp_path / "vcrd.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("vcrd/_C.abi.so", extension)
        archive.writestr("vcrd/_C.abi.build.json", f'{{"with_cuda": {str(cuda).lower()}}}')
    if not says:
        return dist.check(made, False, ["/home/me"])
    with pytest.raises(SystemExit, match=says):
        dist.check(made, False, ["/home/me"])


def test_two_builds_do_not_share_a_folder(tmp_path):
    with dist.place(tmp_path / "here") as folder:
        assert folder.is_dir()
        with pytest.raises(SystemExit, match="exists: wait for the build"), dist.place(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdists(tmp_path_factory) -> list[Path]:
    """Of the last commit, from two checkouts with other names, users' masks and times of files."""
    if not (ROOT / ".git").exists():
        pytest.skip("an sdist is built from a commit, and this is no checkout of git")
    pytest.importorskip("build")
    folder, made = tmp_path_factory.mktemp("dist"), []
    for name, mask in (("a", 0o022), ("another", 0o077)):
        before = os.umask(mask)
        try:
            call("git", "clone", "-q", "--no-hardlinks", ROOT, folder / name, cwd=folder)
        finally:
            os.umask(before)
        options = ["--only", "sdist", "--place", folder / f"place-{name}"]
        call(sys.executable, ".ci/dist.py", *options, cwd=folder / name)
        made += (folder / name / "dist").glob("vcrd-*.tar.gz")
    return made


@pytest.mark.slow
def test_two_checkouts_give_the_same_sdist(sdists):
    first, second = (path.read_bytes() for path in sdists)
    assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest()
    assert sdists[0].name == f"vcrd-{vcrd.__version__}.tar.gz"
    with tarfile.open(sdists[0]) as tar:
        files = {name.partition("/")[2] for name in tar.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= files
    listed = call("git", "ls-files", "csrc", "vcrd", cwd=ROOT).split()
    assert set(listed) == {name for name in files if name.startswith(("csrc/", "vcrd/")) and "." in name}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_pip_installs_the_sdist_into_an_environment_with_this_torch(sdists, tmp_path):
    packages = page_environment.with_needs(
        ["torch", "numpy", "ninja", "pybind11", "setuptools", "wheel", "pip"]
    )
    python = page_environment.create(tmp_path / "venv", packages)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "vcrd.pth").unlink()  # the checkout
    env = {**page_environment.environment(python), "TORCH_CUDA_ARCH_LIST": "none", "MAX_JOBS": "2"}
    install = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps", sdists[0]]
    call(*install, cwd=tmp_path, env=env)
    text = (
        "import torch, vcrd; x = torch.randn(4, 32, requires_grad=True); "
        "vcrd.validity_calibrated_kl(x, torch.randn(4, 32), torch.arange(4)).loss.sum().backward(); "
        "print(vcrd.__file__, bool(x.grad.isfinite().all()))"
    )
    assert call(python, "-c", text, cwd=tmp_path, env=env).split() == [str(site / "vcrd/__init__.py"), "True"]
    versions = call(python, "-m", "vcrd", "--version", cwd=tmp_path, env=env).splitlines()
    assert versions[0].split() == ["vcrd", vcrd.__version__]
    assert f"loads; built with torch {torch.__version__}, CPU kernels only" in versions[1]


FAKE_TORCH = {
    "torch/__init__.py": "from torch import utils\n__version__ = '99.0.0'\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "CUDA_HOME = CppExtension = CUDAExtension = None\n"
    "from setuptools.command.build_ext import build_ext as BuildExtension\n",
}


def repack(folder: Path, package: Distribution) -> None:
    """Makes a wheel of an installed package again."""
    tag = next(
        line.split(": ")[1] for line in package.read_text("WHEEL").splitlines() if line.startswith("Tag: ")
    )
    made = folder / f"{package.name}-{package.version}-{tag}.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for file in package.files:
            if ".." not in file.parts and file.suffix != ".pyc":
                archive.write(package.locate_file(file), str(file))


@pytest.mark.slow
def test_pips_isolation_with_another_torch_says_what_to_add(sdists, tmp_path):
    """pip fetches a torch for the build, newer than that of the environment."""
    for package in page_environment.with_needs(["setuptools", "wheel", "ninja", "pybind11"]).values():
        repack(tmp_path, package)
    with zipfile.ZipFile(tmp_path / "torch-99.0.0-py3-none-any.whl", "w") as archive:
        meta = {"METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 99.0.0\n", "RECORD": ""}
        meta["WHEEL"] = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in (FAKE_TORCH | {f"torch-99.0.0.dist-info/{n}": t for n, t in meta.items()}).items():
            archive.writestr(name, text)
    python = page_environment.create(tmp_path / "venv", page_environment.with_needs(["torch", "pip"]))
    env = page_environment.environment(python) | {"PIP_CONSTRAINT": "", "PIP_FIND_LINKS": str(tmp_path)}
    install = [python, "-m", "pip", "install", "--no-index", "--no-deps", sdists[0]]
    done = subprocess.run(install, cwd=tmp_path, env=env, capture_output=True, text=True)
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "vcrd: " in line]
    assert done.returncode != 0 and said == [
        f"vcrd: this isolated build has torch 99.0.0 and the environment has torch {version('torch')}, which could not "
        "load the extension: add --no-build-isolation"
    ], (done.stdout + done.stderr)[-3000:]
