"""An extension that was built with another minor version of torch is refused before it is loaded, in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vcrd import build_record

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.cpu_kernels


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("2.13.0+cpu", "2.13.1+cu130", True),
        ("2.11.0", "2.11.0a0+eb65b36914.nv26.02", True),
        ("2.13.0+cpu", "2.11.0+cu130", False),
        ("2.1.0", "2.11.0", False),
        ("2.11.0", "3.11.0", False),
        (None, "2.11.0", True),
    ],
)
def test_the_minor_versions_must_agree(built, here, fits):
    assert (build_record.refusal({"torch": built}, here, None) == "") is fits


@pytest.mark.parametrize(
    ("built", "here", "says"),
    [
        ("13.0", "13.1", ""),
        (None, None, ""),
        (None, "13.0", ""),
        ("13.0", None, "and CUDA 13.0, but this is torch 2.11.0 without CUDA: install"),
        ("13.0", "12.8", "and CUDA 13.0, but this is torch 2.11.0 with CUDA 12.8: install"),
    ],
)
def test_cuda_kernels_need_the_cuda_of_torch(built, here, says):
    said = build_record.refusal({"torch": "2.11.0", "cuda": built}, "2.11.0", here)
    assert says in said and bool(said) is bool(says)


def imported(folder: Path) -> str:
    """The last line of an import of the loss of the copy of vcrd in this folder; empty if it succeeds."""
    call = [sys.executable, "-c", "import vcrd.loss.api"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=120)
    return (done.stderr.splitlines() or [""])[-1]


def test_a_wrong_torch_is_one_sentence_and_the_file_is_not_loaded(tmp_path):
    shutil.copytree(ROOT / "vcrd", tmp_path / "vcrd", ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    (built,) = (ROOT / "vcrd").glob(f"_C.*{sys.version_info[0]}{sys.version_info[1]}*.so")
    (tmp_path / "vcrd" / built.name).symlink_to(built)
    record = tmp_path / "vcrd" / built.with_suffix(".build.json").name
    record.write_text(json.dumps({"torch": torch.__version__}))
    assert imported(tmp_path) == ""
    record.write_text(json.dumps({"torch": "1.9.1+cu111"}))
    assert imported(tmp_path) == (
        f"ImportError: vcrd's extension was built with torch 1.9.1+cu111, but this is torch {torch.__version__}: "
        "install vcrd's wheel for this torch, or build it with this torch (`pip install --no-build-isolation`, from a "
        "checkout or the sdist)"
    )
    # Loading it would have been a crash.
    (tmp_path / "vcrd" / built.name).unlink()
    (tmp_path / "vcrd" / built.name).write_bytes(built.read_bytes()[:100_000])
    assert "was built with torch 1.9.1+cu111" in imported(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", None])
def test_a_record_that_cannot_be_read_refuses_nothing(tmp_path, monkeypatch, text):
    class Found:
        origin = str(tmp_path / "_C.so")

    monkeypatch.setattr(build_record.importlib.util, "find_spec", lambda name: Found)
    if text is not None:
        (tmp_path / "_C.build.json").write_text(text)
    assert build_record.read() == {}
    monkeypatch.setattr(build_record.importlib.util, "find_spec", lambda name: None)
    assert build_record.read() == {}
