"""What is installed: the wrong apex, an extension that does not fit, packages that do not load."""

from __future__ import annotations

import sys
import types

import psutil
import pytest
import torch
import wrong_apex
from doctor_runs import make_job

from vcrd.doctor import checks, extension, packages
from vcrd.doctor.findings import INFO, OK, PROBLEM, UNCHECKED
from vcrd.doctor.processes import World
from vcrd.loss import ops

ALONE = make_job()


def only(findings):
    (line,) = findings
    return line


def test_what_is_here_has_no_problem():
    findings = [f for check in (*packages.CHECKS, extension.extension) for f in check(ALONE)]
    assert not [finding for finding in findings if finding.fix]
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
    line = only(packages.apex(ALONE))
    assert (
        line.status == PROBLEM
        and "apex 0.9.10.dev0 from PyPI is another project (Pyramid toolkit" in line.found
    )
    assert "pip uninstall apex" in line.fix


def test_nvidias_apex_is_not_taken_for_it(on_path):
    (on_path / "apex" / "optimizers").mkdir(parents=True)
    (on_path / "apex" / "__init__.py").touch()
    line = only(packages.apex(ALONE))
    assert line.status == PROBLEM and "without its CUDA extensions" in line.found
    (on_path / "amp_C.py").touch()
    assert only(packages.apex(ALONE)).status == OK


def test_no_apex_is_no_problem():
    assert only(packages.apex(ALONE)).status == INFO


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


def test_an_extension_for_other_gpus_is_a_problem_that_names_both(gpu):
    line = extension._architectures(built("8.0;10.0a"))
    assert (
        line.status == PROBLEM
        and line.found == "the extension is built for 8.0;10.0a, the GPUs here have 9.0"
    )
    assert "TORCH_CUDA_ARCH_LIST=9.0" in line.fix
    assert extension._architectures(built("8.0;9.0a")).status == OK
    assert extension._architectures(built("")).status == UNCHECKED
    assert extension._architectures(built("Hopper")).status == UNCHECKED
    line = extension._architectures(built("", with_cuda=False))
    assert line.status == PROBLEM and "no CUDA kernels" in line.found


def test_torch_for_other_gpus_is_a_problem(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100", "sm_120"])
    (line,) = packages.torch_gpus(make_job())
    assert line.status == PROBLEM and "9.0, but torch is built for sm_100, sm_120" in line.found


def test_fewer_gpus_than_processes_is_a_problem(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (line,) = packages.torch_gpus(make_job(World(size=8, local_size=8)))
    assert line.status == PROBLEM and line.found == "4 for 8 processes on this node"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (
            "/x/vcrd/_C.so: undefined symbol: _ZN3c105ErrorC2ENS_14SourceLocationE",
            "it was not built with this torch",
        ),
        ("cannot import name '_C' from 'vcrd'", "it is built for another Python|it is not built"),
        (
            "libcudart.so.13: cannot open shared object file",
            "it cannot be loaded: libcudart.so.13: cannot open",
        ),
    ],
)
def test_an_extension_that_does_not_load_says_why_in_words(monkeypatch, said, found):
    import importlib
    import re

    real = importlib.import_module

    def broken(name, *rest):
        if name == "vcrd.loss.ops":
            raise ImportError("vcrd's compiled extension is missing") from ImportError(said)
        return real(name, *rest)

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    (line,) = extension.extension(ALONE)
    assert line.status == PROBLEM and re.search(found, line.found), line
    assert "pip install --no-build-isolation" in line.fix


def test_an_extension_that_was_built_with_another_torch_names_both(monkeypatch):
    stub = types.SimpleNamespace(torch_version="2.6.0", **vars(built("9.0a")))
    monkeypatch.setattr(ops, "_C", stub)
    line = extension.extension(ALONE)[0]
    assert line.status == PROBLEM and line.found == f"built with torch 2.6.0, but this is {torch.__version__}"


def test_an_extension_that_is_refused_because_of_its_torch_names_both(monkeypatch):
    """It has not been loaded, so its record says with which torch it was built."""
    monkeypatch.setattr(extension.build_record, "read", lambda: {"torch": "1.9.1"})
    line = extension._import_problem(ImportError("vcrd's extension was built with torch 1.9.1"))
    assert line.status == PROBLEM
    assert line.found == f"built with torch 1.9.1, but this is torch {torch.__version__}"


@pytest.mark.parametrize(("number", "status"), [("0.15.3", PROBLEM), ("0.16.0", OK)])
def test_a_megatron_that_is_too_old_is_a_problem(monkeypatch, number, status):
    monkeypatch.setattr(packages, "version", lambda name: number)
    assert only(packages.megatron_core(ALONE)).status == status


@pytest.fixture
def engine(on_path, monkeypatch):
    """A function that puts a Transformer Engine there, of files and their text, which is forgotten in the end."""

    def install(**files: str) -> None:
        folder = on_path / "transformer_engine"
        folder.mkdir()
        for name in ("__init__", "pytorch"):
            (folder / f"{name}.py").write_text(files.get(name, ""))

    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    yield install
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


BROKEN = "raise OSError('libtransformer_engine.so: undefined symbol: x')\n"


def test_a_package_that_does_not_load_is_a_problem(engine, monkeypatch):
    engine(pytorch=BROKEN)
    # No GPU here, on which alone it would load.
    assert only(packages.transformer_engine(ALONE)).status == UNCHECKED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = only(packages.transformer_engine(ALONE))
    assert line.status == PROBLEM and "undefined symbol: x" in line.found


def test_a_transformer_engine_that_breaks_megatron_core_is_named_and_not_megatron_core(engine, monkeypatch):
    engine(__init__=BROKEN)
    # As megatron.core, whose own import tries it; here that has been imported long ago.
    (importer := types.ModuleType("imports_engine")).__path__ = []
    monkeypatch.setitem(sys.modules, "imports_engine", importer)
    real = packages.importlib.import_module
    monkeypatch.setattr(
        packages.importlib,
        "import_module",
        lambda name: real("transformer_engine" if name == "megatron.core" else name),
    )
    line = only(packages.megatron_core(ALONE))
    assert line.status == UNCHECKED and "because transformer_engine cannot" in line.found
    line = only(packages.transformer_engine(ALONE))
    assert (
        line.status == PROBLEM and "undefined symbol: x" in line.found and "--no-build-isolation" in line.fix
    )


def test_an_old_megatron_core_is_told_before_it_is_imported(monkeypatch):
    monkeypatch.setattr(packages, "version", lambda name: "0.12.0")
    monkeypatch.setattr(packages, "import_failure", lambda name: pytest.fail("imported"))
    assert only(packages.megatron_core(ALONE)).found == "0.12.0, but vcrd needs 0.16 or newer"


def test_the_fix_of_megatron_core_leaves_torch_alone(monkeypatch):
    monkeypatch.setattr(
        packages, "import_failure", lambda name: packages.ImportFailure("no module named x", "")
    )
    assert "--no-deps" in only(packages.megatron_core(ALONE)).fix


def test_a_folder_that_is_taken_for_apex_is_named(on_path):
    (on_path / "apex" / "apex").mkdir(parents=True)
    line = only(packages.apex(ALONE))
    assert line.status == PROBLEM and f"Python imports {on_path}/apex as apex" in line.found
    assert "uninstall" not in line.fix


@pytest.mark.parametrize(
    ("text", "seconds", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 30, "crashes with SIGSEGV"),
        ("import time; time.sleep(60)", 0.5, "does not finish within 0.5 seconds"),
        ("raise ImportError", 30, ""),
    ],
)
def test_an_import_that_crashes_or_hangs_is_tried_once_and_leaves_no_process(on_path, text, seconds, says):
    module = f"bad_module_{len(says)}"
    (on_path / f"{module}.py").write_text(text)
    before = psutil.Process().children()
    assert [checks.import_crash(module, seconds) for _ in range(2)] == [says] * 2
    assert psutil.Process().children() == before


def test_an_extension_that_hangs_is_not_loaded_here(monkeypatch):
    monkeypatch.setattr(
        extension, "import_crash", lambda module, seconds: "does not finish within 30 seconds"
    )
    line = only(extension.extension(ALONE))
    assert line.status == PROBLEM and "importing it does not finish" in line.found


def test_without_rich_one_line_says_so(monkeypatch):
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "rich" else real(name))
    (line,) = packages.rich(ALONE)
    assert line.status == INFO and "pip install rich" in line.found


def test_without_psutil_no_checkpoint_is_saved(monkeypatch):
    assert packages.psutil(ALONE) == []
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "psutil" else real(name))
    assert only(packages.psutil(ALONE)).status == PROBLEM
