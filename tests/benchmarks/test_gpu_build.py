"""`make gpu-check` uses an existing extension of the same sources and torch, whatever the file times are."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.gpu import build
from benchmarks.gpu.results import ROOT


def built_from(root: Path) -> dict[str, str]:
    """The record of setup.py, computed again, because importing setup.py starts a build."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "built_from"]
    names = {"ROOT": root, "hashlib": hashlib}
    exec(compile(tree, "setup.py", "exec"), names)
    return names["built_from"]()


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in ("setup.py", "csrc/bind.cpp", "csrc/cuda/rows.cu", "vcrd/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    record = build.record_of_the_build(tmp_path)
    record.with_name(record.name.replace(".build.json", ".so")).touch()
    write(tmp_path, with_cuda=True)
    return tmp_path


def write(checkout: Path, **changes) -> None:
    record = {"sources": built_from(checkout), "torch": "2.11", "with_cuda": True, **changes}
    build.record_of_the_build(checkout).write_text(json.dumps(record))


def test_a_build_from_another_machine_is_used_with_the_same_sources_and_torch(checkout):
    assert build.reason_to_build("2.11", checkout) is None
    (checkout / "csrc/bind.cpp").touch()
    (checkout / "vcrd/__init__.py").write_text("not part of the extension")
    assert build.reason_to_build("2.11", checkout) is None
    assert "with torch 2.11, here is 2.13" in build.reason_to_build("2.13", checkout)


def test_a_change_is_found_and_named(checkout):
    (checkout / "csrc/cuda/rows.cu").write_text("csrc/cuda/rows.cv")
    assert build.changed(checkout) == ["csrc/cuda/rows.cu"]
    assert build.reason_to_build("2.11", checkout).startswith("csrc/cuda/rows.cu changed")
    (checkout / "csrc/bind.cpp").unlink()
    (checkout / "csrc/new.h").touch()
    assert build.changed(checkout) == ["csrc/bind.cpp", "csrc/cuda/rows.cu", "csrc/new.h"]
    assert "and 2 more changed" in build.reason_to_build("2.11", checkout)


def test_an_extension_without_a_valid_record_is_built_again(checkout):
    write(checkout, with_cuda=False)
    assert build.reason_to_build("2.11", checkout) == "vcrd._C was built without its CUDA kernels"
    record = build.record_of_the_build(checkout)
    record.unlink()
    assert build.changed(checkout) is None
    assert build.reason_to_build("2.11", checkout).startswith("there is no record")
    record.with_name(record.name.replace(".build.json", ".so")).unlink()
    assert build.reason_to_build("2.11", checkout).startswith("vcrd._C is not built")


def test_changed_files_are_touched_for_ninja(monkeypatch, tmp_path):
    touched, commands = [], []
    monkeypatch.setattr(Path, "touch", lambda path, *_: touched.append(path.name))
    monkeypatch.setattr(build, "run", lambda command, seconds: commands.append(command))
    monkeypatch.setattr(build, "changed", lambda: ["csrc/merge.h", "csrc/removed.h"])
    build.build(300)
    assert touched == ["merge.h"] and "--force" in commands[0]
    monkeypatch.setattr(build, "changed", lambda: None)
    build.build(300)
    assert {"setup.py", "bind.cpp", "merge.h"} <= set(touched[1:])
