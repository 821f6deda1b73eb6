"""`python -m vcrd --version` says what a report of an error needs, whatever is broken."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from doctor_runs import ROOT, environment
from fake_nvml import FakeGpu, FakeNvml

import vcrd
from vcrd.doctor import loaded, versions
from vcrd.loss import ops

NAMES = [
    *("vcrd", "extension", "Python", "torch", "CUDA of torch", "NCCL of torch", "nccl4py", "megatron-core"),
    *("Transformer Engine", "GPU", "driver"),
]


def said(*path, options=(), **more) -> dict[str, str]:
    """What the command prints, with these folders of packages before all others."""
    done = subprocess.run(
        [sys.executable, *options, "-m", "vcrd", "--version"],
        env=environment(path),
        capture_output=True,
        text=True,
        timeout=120,
        **{"cwd": ROOT, **more},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert list(found) == NAMES
    return {name: value.strip() for name, value in found.items()}


def test_every_version_has_a_line():
    found = said()
    assert found["vcrd"] == f"{vcrd.__version__}, a checkout"
    kernels = f"CUDA kernels for {ops._C.cuda_architectures}" if ops._C.with_cuda else "CPU kernels only"
    assert found["extension"].startswith(f"loads; built with torch {ops._C.torch_version}, {kernels}")
    assert found["Python"].startswith(f"{platform.python_version()}, ")
    assert found["torch"] == torch.__version__
    assert found["CUDA of torch"] == (torch.version.cuda or "none: this torch is built without CUDA")
    assert found["megatron-core"] == version("megatron-core")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ImportError('libcudnn.so.9: cannot open')", "cannot be imported: libcudnn.so.9: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "loading it crashes with SIGSEGV"),
        ("import os; os._exit(3)", "loading it ends the process with status 3"),
        ("print('hello'); raise ValueError", "cannot be imported: ValueError"),
    ],
)
def test_a_torch_that_does_not_load_leaves_the_other_lines(tmp_path, text, says):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(text)
    found = said(tmp_path)
    assert found["torch"] == says
    assert "loads" not in found["extension"] and found["driver"] != "not known"


def test_without_any_package_every_line_says_so(tmp_path):
    """Python's own modules alone, and a copy of vcrd without its extension."""
    shutil.copytree(ROOT / "vcrd", tmp_path / "vcrd", ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    found = said(tmp_path, options=("-S",), cwd=tmp_path)
    for name in NAMES[3:9]:
        assert found[name] == "not installed"
    assert found["extension"] == "not loaded, because torch cannot be"
    assert said(tmp_path, cwd=tmp_path)["extension"].startswith("does not load: vcrd's compiled extension")


def test_loading_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(versions.sys, "path", ["/nowhere"])  # the child finds no modules
    assert versions.lines()["GPU"] == "loading it ends the process with status 1"
    sleeping = "import time; time.sleep(600)"
    real = versions.subprocess.Popen
    monkeypatch.setattr(
        versions.subprocess, "Popen", lambda command, **more: real([*command[:2], sleeping], **more)
    )
    assert versions.lines(0.2)["GPU"] == "loading it does not finish within 0.2 seconds"


def test_what_cannot_be_read_is_not_known(monkeypatch):
    def broken(*_):
        raise ValueError("metadata without a version")

    monkeypatch.setattr(versions, "version_of", broken)
    monkeypatch.setattr(versions, "_loaded", lambda seconds: dict.fromkeys(versions._LOADED, "x"))
    assert versions.lines()["nccl4py"] == "not known: metadata without a version"


def test_gpus_and_driver(monkeypatch, tmp_path):
    gpus = [FakeGpu(), FakeGpu(lost=True), FakeGpu()]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*gpus))
    models = "2 x NVIDIA H100 80GB HBM3 and 1 x one that does not answer (GPU is lost)"
    assert loaded.gpus() == {"GPU": models, "driver": "580.65.06, for CUDA up to 13.0"}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    monkeypatch.setattr(loaded, "_DRIVER", tmp_path)
    assert loaded.gpus() == {"GPU": "none", "driver": "none"}
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version: 12\n"
    (tmp_path / "version").write_text(line)
    for number in range(2):
        (tmp_path / f"gpus/0000:{number}").mkdir(parents=True)
        (tmp_path / f"gpus/0000:{number}/information").write_text("Model: \t\t NVIDIA H200\nIRQ: 4\n")
    assert loaded.gpus() == {"GPU": "2 x NVIDIA H200", "driver": "570.124.06"}


def test_the_versions_of_nccl(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert loaded.torch_versions()["NCCL of torch"] == "2.28.9"


def test_an_extension_with_cuda_kernels_names_its_cuda(monkeypatch):
    built = SimpleNamespace(torch_version="2.11.0", with_cuda=True, cuda_architectures="9.0a")
    monkeypatch.setattr(ops, "_C", built)
    monkeypatch.setattr(loaded.build_record, "read", lambda: {"cuda": "13.0"})
    line = "loads; built with torch 2.11.0, CUDA kernels for 9.0a, built with CUDA 13.0"
    assert loaded.extension() == {"extension": line}
