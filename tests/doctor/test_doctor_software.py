"""What is installed: the wrong apex, an extension that does not fit, packages that do not load."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import wrong_apex

from vcrd import ops
from vcrd.doctor import software
from vcrd.doctor.findings import FACT, FAULT, OK, UNCHECKED
from vcrd.doctor.job import Job
from vcrd.doctor.world import World


def test_what_is_here_has_no_fault():
    findings = software.check(Job(World(), {}))
    assert not [finding for finding in findings if finding.mend]
    texts = {finding.name: finding.found for finding in findings}
    assert texts["torch"].startswith(torch.__version__)
    assert texts["extension"].startswith("built with this torch")
    assert "megatron.training" in texts["megatron-core"]


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_apex_from_pypi_is_recognised_by_what_it_is(on_path):
    wrong_apex.install(on_path)
    line = software._apex()
    assert (
        line.status == FAULT
        and "apex 0.9.10.dev0 from PyPI is another project (Pyramid toolkit" in line.found
    )
    assert "pip uninstall apex" in line.mend


def test_nvidias_apex_is_not_taken_for_it(on_path):
    (on_path / "apex" / "optimizers").mkdir(parents=True)
    (on_path / "apex" / "__init__.py").touch()
    line = software._apex()
    assert line.status == FAULT and "without its CUDA extensions" in line.found
    (on_path / "amp_C.py").touch()
    assert software._apex().status == OK


def test_no_apex_is_no_fault():
    assert software._apex().status == FACT


def test_the_extension_says_for_which_gpus_it_was_built():
    assert bool(ops._C.cuda_architectures) == ops._C.with_cuda


@pytest.fixture
def gpu(monkeypatch):
    """One of compute capability 9.0, as far as torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))


def built(architectures: str, with_cuda: bool = True) -> types.SimpleNamespace:
    return types.SimpleNamespace(cuda_architectures=architectures, with_cuda=with_cuda)


def test_an_extension_for_other_gpus_is_a_fault_that_names_both(gpu):
    line = software._architectures(built("8.0;10.0a"))
    assert (
        line.status == FAULT and line.found == "the extension is built for 8.0;10.0a, the GPUs here are 9.0"
    )
    assert "TORCH_CUDA_ARCH_LIST=9.0" in line.mend
    assert software._architectures(built("8.0;9.0a")).status == OK
    assert software._architectures(built("")).status == UNCHECKED
    assert software._architectures(built("Hopper")).status == UNCHECKED
    line = software._architectures(built("", with_cuda=False))
    assert line.status == FAULT and "no CUDA kernels" in line.found


def test_torch_for_other_gpus_is_a_fault(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100", "sm_120"])
    (line,) = software._torch_gpus(Job(World(), {}))
    assert line.status == FAULT and "9.0; torch is built for sm_100, sm_120" in line.found


def test_fewer_gpus_than_processes_is_a_fault(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (line,) = software._torch_gpus(Job(World(size=8, local_size=8), {}))
    assert line.status == FAULT and line.found == "4 for 8 processes on this node"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (
            "/x/vcrd/_C.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE",
            "it was built against another torch than",
        ),
        ("cannot import name '_C' from 'vcrd'", "it is built for another Python|it is not built"),
        ("libcudart.so.13: cannot open shared object file", "it does not load: libcudart.so.13: cannot open"),
    ],
)
def test_an_extension_that_does_not_load_says_why_in_words(monkeypatch, said, found):
    import importlib
    import re

    real = importlib.import_module

    def broken(name, *rest):
        if name == "vcrd.ops":
            raise ImportError("vcrd's compiled extension is missing") from ImportError(said)
        return real(name, *rest)

    monkeypatch.setattr(software.importlib, "import_module", broken)
    (line,) = software._extension()
    assert line.status == FAULT and re.search(found, line.found), line
    assert "pip install --no-build-isolation" in line.mend


def test_an_extension_that_was_built_with_another_torch_names_both(monkeypatch):
    stub = types.SimpleNamespace(torch_version="2.6.0", **vars(built("9.0a")))
    monkeypatch.setattr(ops, "_C", stub)
    line = software._extension()[0]
    assert line.status == FAULT and line.found == f"built with torch 2.6.0, and this is {torch.__version__}"


@pytest.mark.parametrize(("number", "status"), [("0.15.3", FAULT), ("0.16.0", OK)])
def test_a_megatron_that_is_too_old_is_a_fault(monkeypatch, number, status):
    monkeypatch.setattr(software, "version", lambda name: number)
    assert software._megatron().status == status


def test_a_package_that_does_not_load_is_a_fault(on_path, monkeypatch):
    folder = on_path / "transformer_engine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "pytorch.py").write_text("raise OSError('libtransformer_engine.so: undefined symbol: x')\n")
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    assert software._transformer_engine().status == UNCHECKED  # no GPU here, on which alone it would load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = software._transformer_engine()
    assert line.status == FAULT and "undefined symbol: x" in line.found
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


def test_without_rich_one_line_says_so(monkeypatch):
    real = software.find_spec
    monkeypatch.setattr(software, "find_spec", lambda name: None if name == "rich" else real(name))
    (line,) = software._rich()
    assert line.status == FACT and "pip install rich" in line.found
