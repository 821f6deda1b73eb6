"""Enforces the layers of the design: which file may import and include which, and the length of a file.

Reads the source text and runs none of it. A new module needs a line in `LAYERS`, so that its layer is a decision.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 700  # lines of one file
CODE = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
FOLDERS = ("vcrd", "csrc", "examples", "tests", "benchmarks", "research")


@dataclass(frozen=True)
class Layer:
    """The imports that files matching `files` may have besides the standard library: our modules, and packages.

    A name in `ours` is the module and all modules below it; "vcrd" alone is the content of `vcrd/__init__.py`.
    `packages` None: any. `never` removes modules from `ours`.
    """

    files: str
    ours: tuple[str, ...] = ()
    packages: tuple[str, ...] | None = ("torch",)
    never: tuple[str, ...] = ()


# Every module may import errors.py, which imports nothing but the standard library.
ERRORS = "vcrd.errors"
# The first line that matches a file is its layer.
LAYERS = (
    Layer("vcrd/__init__.py", packages=()),
    Layer("vcrd/errors.py", packages=()),
    Layer("vcrd/build_record.py", packages=()),
    Layer("vcrd/settings.py", ("vcrd.errors",), packages=()),
    Layer(
        "vcrd/__main__.py",
        ("vcrd.cache.command", "vcrd.doctor.command", "vcrd.doctor.versions", "vcrd.plan", "vcrd.report"),
        packages=(),
    ),
    Layer("vcrd/doctor/findings.py", packages=("rich",)),
    Layer("vcrd/doctor/processes.py", ("vcrd.doctor.findings",)),
    Layer(
        "vcrd/doctor/checks.py",
        ("vcrd.doctor.findings", "vcrd.doctor.processes", "vcrd.plan.scenario", "vcrd.settings"),
        packages=(),
    ),
    Layer(
        "vcrd/doctor/versions.py",
        ("vcrd", "vcrd.doctor.findings", "vcrd.doctor.packages"),
        packages=(),
    ),
    Layer(
        "vcrd/doctor/loaded.py",
        ("vcrd.build_record", "vcrd.doctor.findings", "vcrd.loss.ops"),
        packages=("torch", "pynvml"),
    ),
    Layer("vcrd/doctor/command.py", ("vcrd.doctor", "vcrd.plan.command", "vcrd.plan.scenario")),
    Layer(
        "vcrd/doctor/gpus.py", ("vcrd.doctor.checks", "vcrd.doctor.findings"), packages=("torch", "pynvml")
    ),
    Layer(
        "vcrd/doctor/packages.py",
        ("vcrd", "vcrd.doctor.checks", "vcrd.doctor.findings"),
        packages=("torch", "pynvml"),
    ),
    Layer(
        "vcrd/doctor/extension.py",
        (
            "vcrd",
            "vcrd.build_record",
            "vcrd.doctor.checks",
            "vcrd.doctor.findings",
            "vcrd.doctor.packages",
            "vcrd.loss.config",
            "vcrd.loss.ops",
            "vcrd.loss.reference",
            "vcrd.teacher_logits",
        ),
    ),
    Layer(
        "vcrd/doctor/environment.py",
        (
            "vcrd.doctor.checks",
            "vcrd.doctor.findings",
            "vcrd.settings",
        ),
    ),
    Layer(
        "vcrd/doctor/network.py",
        (
            "vcrd.doctor.checks",
            "vcrd.doctor.environment",
            "vcrd.doctor.findings",
            "vcrd.link",
            "vcrd.settings",
        ),
    ),
    Layer("vcrd/doctor/*.py", ("vcrd.doctor", "vcrd.link", "vcrd.plan"), never=("vcrd.doctor.command",)),
    Layer("vcrd/monitor/__init__.py", packages=()),
    Layer("vcrd/monitor/nvml.py", packages=("pynvml",)),
    Layer("vcrd/monitor/records.py", packages=()),
    Layer("vcrd/monitor/telemetry.py", ("vcrd.monitor.nvml", "vcrd.monitor.records"), packages=()),
    Layer("vcrd/monitor/bottleneck.py", ("vcrd.link.payload",), packages=()),
    Layer(
        "vcrd/report/*.py",
        ("vcrd.report", "vcrd.monitor.records"),
        packages=("matplotlib", "numpy"),
    ),
    Layer("vcrd/plan/scenario.py", packages=()),
    Layer(
        "vcrd/plan/*.py",
        ("vcrd.plan", "vcrd.link.connection", "vcrd.link.payload", "vcrd.link.plan"),
        packages=(),
    ),
    Layer("vcrd/loss/__init__.py", packages=()),
    Layer(
        "vcrd/loss/api.py",
        (
            "vcrd.loss.checks",
            "vcrd.loss.config",
            "vcrd.loss.divergence",
            "vcrd.loss.judge",
            "vcrd.loss.validity",
            "vcrd.teacher_logits",
        ),
    ),
    Layer("vcrd/loss/fused_head.py", ("vcrd.loss", "vcrd.teacher_logits")),
    Layer(
        "vcrd/loss/judge.py",
        (
            "vcrd.loss.config",
            "vcrd.loss.divergence",
            "vcrd.loss.ops",
            "vcrd.loss.teacher_blocks",
            "vcrd.teacher_logits",
        ),
    ),
    Layer("vcrd/loss/validity.py", ("vcrd.loss.checks", "vcrd.loss.config", "vcrd.loss.divergence")),
    Layer(
        "vcrd/loss/divergence.py",
        (
            "vcrd.loss.checks",
            "vcrd.loss.config",
            "vcrd.loss.ops",
            "vcrd.loss.overwriting",
            "vcrd.loss.teacher_blocks",
            "vcrd.teacher_logits",
        ),
    ),
    Layer("vcrd/loss/overwriting.py"),
    Layer("vcrd/loss/teacher_blocks.py", ("vcrd.loss.checks", "vcrd.loss.ops", "vcrd.teacher_logits")),
    Layer("vcrd/loss/checks.py", ("vcrd.loss.config", "vcrd.teacher_logits")),
    Layer("vcrd/loss/config.py"),
    Layer("vcrd/loss/ops.py", ("vcrd._C", "vcrd.build_record")),
    Layer("vcrd/loss/reference.py"),
    Layer("vcrd/teacher_logits.py"),
    Layer("vcrd/link/errors.py", packages=()),
    Layer("vcrd/link/plan.py", ("vcrd.link.errors",), packages=()),
    Layer(
        "vcrd/link/payload.py",
        (
            "vcrd.link.plan",
            "vcrd.loss.ops",
        ),
    ),
    Layer(
        "vcrd/link/student*.py",
        ("vcrd.link", "vcrd.settings", "vcrd.teacher_logits"),
        never=("vcrd.link.teacher",),
    ),
    Layer("vcrd/link/teacher*.py", ("vcrd.link", "vcrd.settings"), never=("vcrd.link.student",)),
    Layer("vcrd/link/__init__.py", ("vcrd.link", "vcrd.settings")),
    Layer("vcrd/link/*.py", ("vcrd.link", "vcrd.settings"), never=("vcrd.link.student", "vcrd.link.teacher")),
    # The only module that calls NCCL.
    Layer(
        "vcrd/link/transport/nccl.py",
        ("vcrd.link.transport", "vcrd.link.connection"),
        packages=("torch", "nccl", "cuda"),
    ),
    Layer(
        "vcrd/link/transport/*.py",
        (
            "vcrd.link.transport",
            "vcrd.link.buffers",
            "vcrd.link.connection",
            "vcrd.link.errors",
            "vcrd.settings",
        ),
    ),
    Layer(
        "vcrd/cache/*.py",
        ("vcrd.cache", "vcrd.link", "vcrd.settings", "vcrd.teacher_logits"),
        packages=("torch", "numpy", "safetensors"),
    ),
    Layer("vcrd/megatron/random_state.py", packages=("torch", "numpy")),
    Layer(
        "vcrd/megatron/*.py",
        (
            "vcrd",
            "vcrd.loss.fused_head",
            "vcrd.loss.api",
            "vcrd.loss.config",
            "vcrd.loss.divergence",
            "vcrd.teacher_logits",
            "vcrd.link",
            "vcrd.cache",
            "vcrd.monitor.bottleneck",
            "vcrd.monitor.telemetry",
            "vcrd.settings",
            "vcrd.megatron",
        ),
        ("torch", "megatron"),
    ),
    Layer("vcrd/integrations/__init__.py", packages=()),
    Layer("vcrd/integrations/automodel.py", ("vcrd.loss.api", "vcrd.loss.config")),
    Layer(
        "vcrd/integrations/modelopt.py",
        ("vcrd.loss.api", "vcrd.loss.config", "vcrd.megatron.layout"),
        packages=("torch", "megatron"),
    ),
    Layer(
        "vcrd/integrations/nemo_rl.py", ("vcrd.loss.api", "vcrd.loss.config"), packages=("torch", "nemo_rl")
    ),
    Layer(
        "vcrd/integrations/slime.py",
        (
            *(
                "vcrd.link.plan",
                "vcrd.link.rendezvous",
                "vcrd.link.student",
                "vcrd.loss.api",
                "vcrd.loss.config",
            ),
            *("vcrd.megatron.identity", "vcrd.settings"),
        ),
        packages=("torch", "megatron"),
    ),
    Layer(
        "vcrd/integrations/verl.py",
        ("vcrd.loss.api", "vcrd.loss.config", "vcrd.teacher_logits"),
        packages=("torch", "megatron", "verl"),
    ),
    Layer(
        "vcrd/integrations/transformers.py",
        ("vcrd.loss.api", "vcrd.loss.config", "vcrd.loss.fused_head", "vcrd.teacher_logits"),
        packages=("torch", "transformers"),
    ),
    Layer(
        "vcrd/integrations/trl.py",
        ("vcrd.integrations.transformers", "vcrd.loss.config"),
        packages=("torch", "trl"),
    ),
    Layer(
        "examples/**/*.py",
        (
            *(
                "vcrd",
                "vcrd.loss.api",
                "vcrd.loss.validity",
                "vcrd.loss.reference",
                "vcrd.link",
                "vcrd.megatron",
                "vcrd.integrations",
            ),
            *("vcrd.report", "examples"),
        ),
        packages=None,
    ),
)


@dataclass(frozen=True)
class Includes:
    """Files matching `files` may not include files matching `forbidden`."""

    files: tuple[str, ...]
    forbidden: str
    reason: str


TORCH = r"^(torch/|ATen/|c10/|pybind11/|Python\.h)"
INCLUDES = (
    Includes(
        ("csrc/cuda/**/*", "csrc/cpu/**/*", "csrc/*.h"),
        TORCH,
        "only csrc/bind.cpp may see torch and pybind11",
    ),
    Includes(("csrc/cpu/**/*",), r"(^|/)cuda|^cub/|^thrust/", "CPU kernels do not know CUDA"),
    Includes(("csrc/cuda/**/*",), r"(^|/)cpu/", "CUDA kernels do not know the CPU kernels"),
    Includes(
        ("csrc/bind.cpp",), r"^(\.\./|csrc/)*(cpu|cuda)/", "bind.cpp calls kernels only through kernels.h"
    ),
    Includes(("csrc/*.h",), r"(^|/)(cpu|cuda)/", "shared headers do not know the kernels"),
    Includes(
        ("csrc/elementwise.h", "csrc/merge.h", "csrc/params.h"),
        r"kernels\.h$",
        "kernels.h is above the mathematics",
    ),
)


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import of a file, also in a function or as a literal name."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def is_module(root: Path, name: str) -> bool:
    path = root / name.replace(".", "/")
    return name == "vcrd._C" or path.is_dir() or path.with_suffix(".py").exists()


def resolve(root: Path, name: str) -> str:
    """The module of an imported name: `vcrd.loss.api` for `vcrd.loss.api.CalibratedLoss`."""
    while "." in name and not is_module(root, name):
        name = name.rpartition(".")[0]
    return name


def import_violations(root: Path) -> list[str]:
    found = []
    for path in sorted([*root.glob("vcrd/**/*.py"), *root.glob("examples/**/*.py")]):
        relative = path.relative_to(root)
        layer = next((layer for layer in LAYERS if matches(relative, layer.files)), None)
        if layer is None:
            found.append(f"{relative}:1: no layer; add a line to LAYERS of tests/test_layers.py")
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for line, name in imports(path, module):
            top = name.split(".")[0]
            if top in ("vcrd", "examples"):
                target = resolve(root, name)
                allowed = any(
                    target == ours if ours == "vcrd" else within(target, ours)
                    for ours in (*layer.ours, ERRORS)
                )
                allowed = allowed and not any(within(target, never) for never in layer.never)
            else:
                target = top
                known = layer.packages is None or top in layer.packages
                allowed = known or top in sys.stdlib_module_names
            if not allowed:
                found.append(f"{relative}:{line}: {layer.files} may not import {target}")
    return found


def startup_violations(root: Path) -> list[str]:
    """Packages that `python -m vcrd` would import before it reads its options. --help must not wait for torch."""
    found, seen, waiting = [], set(), ["vcrd/__main__.py"]
    while waiting:
        file = waiting.pop()
        path = root / file
        if file in seen or not path.exists():
            continue
        seen.add(file)
        for line, name in startup_imports(path):
            top = name.split(".")[0]
            if top == "vcrd":
                parts = resolve(root, name).split(".")
                waiting += ["/".join([*parts[:n], "__init__.py"]) for n in range(1, len(parts) + 1)]
                waiting.append("/".join(parts) + ".py")
            elif top not in sys.stdlib_module_names:
                found.append(f"{file}:{line}: imports {top} when the command starts")
    return found


def startup_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Absolute imports that run with the module itself: not those in functions and under TYPE_CHECKING."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def include_violations(root: Path) -> list[str]:
    found = []
    for rule in INCLUDES:
        for path in sorted({path for pattern in rule.files for path in root.glob(pattern) if path.is_file()}):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                included = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
                if included and re.search(rule.forbidden, included[1]):
                    found.append(
                        f"{path.relative_to(root)}:{number}: includes {included[1]}, but {rule.reason}"
                    )
    return found


def length_violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for folder in FOLDERS for kind in CODE for path in (root / folder).rglob(kind)):
        lines = len(path.read_text().splitlines())
        if lines > LONGEST:
            found.append(
                f"{path.relative_to(root)}:{LONGEST + 1}: {lines} lines; split files before {LONGEST}"
            )
    return found


def matches(relative: Path, pattern: str) -> bool:
    """Glob match of the whole path; `**/` spans any number of folders, also none."""
    expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.fullmatch(expression, relative.as_posix()) is not None


@pytest.mark.parametrize(
    "check", [import_violations, startup_violations, include_violations, length_violations]
)
def test_the_repository_follows_its_layers(check):
    found = check(ROOT)
    assert not found, "\n" + "\n".join(found)


PLANTED = [
    (
        "vcrd/link/connection.py",
        "import torch\nfrom vcrd.loss.api import validity_calibrated_kl\n",
        "vcrd/link/connection.py:2:",
    ),
    ("vcrd/link/connection.py", "import vcrd\n", "vcrd/link/connection.py:1:"),
    ("vcrd/link/connection.py", "from .. import loss\n", "may not import vcrd.loss"),
    ("vcrd/link/connection.py", "def f():\n    from ..loss import x\n", "vcrd/link/connection.py:2:"),
    ("vcrd/link/connection.py", "import numpy\n", "may not import numpy"),
    (
        "vcrd/link/connection.py",
        "import importlib\nimportlib.import_module('megatron.core')\n",
        "connection.py:2:",
    ),
    ("vcrd/link/connection.py", "from .student import StudentLink\n", "may not import vcrd.link.student"),
    ("vcrd/link/student.py", "from .teacher import TeacherLink\n", "may not import vcrd.link.teacher"),
    ("vcrd/link/plan.py", "import torch\n", "may not import torch"),
    ("vcrd/loss/api.py", "from megatron.core import parallel_state\n", "may not import megatron"),
    ("vcrd/loss/api.py", "from vcrd import _C\n", "may not import vcrd._C"),
    ("vcrd/loss/divergence.py", "from vcrd.loss.api import CalibratedLoss\n", "may not import vcrd.loss.api"),
    ("vcrd/loss/reference.py", "from vcrd.loss import ops\n", "may not import vcrd.loss.ops"),
    ("vcrd/megatron/distillation.py", "from vcrd.loss.ops import gradient\n", "may not import vcrd.loss.ops"),
    ("vcrd/doctor/command.py", "import rich\n", "may not import rich"),
    ("vcrd/doctor/checks.py", "import torch\n", "may not import torch"),
    ("vcrd/doctor/gpus.py", "from vcrd.doctor import network\n", "may not import vcrd.doctor.network"),
    (
        "vcrd/doctor/examination.py",
        "from vcrd.doctor.command import run\n",
        "may not import vcrd.doctor.command",
    ),
    ("vcrd/surprise.py", "", "no layer"),
    ("examples/demo/run.py", "import vcrd\nfrom vcrd.loss.ops import gradient\n", "examples/demo/run.py:2:"),
    ("csrc/cuda/forward.cu", "#include <torch/extension.h>\n", "csrc/cuda/forward.cu:1:"),
    ("csrc/cpu/inner/loops.h", '//\n#  include "ATen/ATen.h"\n', "csrc/cpu/inner/loops.h:2:"),
    ("csrc/kernels.h", "#include <c10/util/Half.h>\n", "csrc/kernels.h:1:"),
    ("csrc/cpu/loops.h", "#include <cuda_runtime.h>\n", "do not know CUDA"),
    ("csrc/bind.cpp", '#include "cpu/loops.h"\n', "only through kernels.h"),
    ("csrc/elementwise.h", '#include "kernels.h"\n', "is above"),
    ("tests/test_long.py", "\n" * (LONGEST + 1), "701 lines"),
]

ALLOWED = [
    (
        "vcrd/link/connection.py",
        "import json\nimport torch.distributed as dist\nfrom .errors import LinkError\n",
    ),
    ("vcrd/link/plan.py", "from .errors import LinkError\nfrom vcrd.errors import expected\n"),
    ("vcrd/loss/api.py", "from torch import Tensor\nfrom vcrd.loss.divergence import DivergenceStats\n"),
    ("vcrd/loss/ops.py", "from vcrd import _C\n"),
    (
        "vcrd/megatron/distillation.py",
        "import vcrd\nfrom megatron.core import mpu\nfrom vcrd.link.student import StudentLink\n",
    ),
    ("examples/demo/run.py", "import rich\nimport vcrd\nfrom vcrd import megatron\n"),
    ("csrc/bind.cpp", '#include <torch/extension.h>\n#include "kernels.h"\n'),
    ("csrc/cuda/forward.cu", '#include <cuda_runtime.h>\n#include "../kernels.h"\n'),
    ("tests/test_long.py", "\n" * 400),
]


def plant(root: Path, file: str, text: str) -> list[str]:
    """The errors of a repository with these empty modules and this one file."""
    exact = [layer.files for layer in LAYERS if "*" not in layer.files]
    for empty in [*exact, "vcrd/link/student.py", "vcrd/link/teacher.py", "vcrd/megatron/distillation.py"]:
        (root / empty).parent.mkdir(parents=True, exist_ok=True)
        (root / empty).touch()
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)
    return import_violations(root) + include_violations(root) + length_violations(root)


@pytest.mark.parametrize(("file", "text", "complaint"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path, file, text, complaint):
    found = plant(tmp_path, file, text)
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.parametrize(("file", "text"), ALLOWED)
def test_what_the_design_allows_passes(tmp_path, file, text):
    assert plant(tmp_path, file, text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch\n", ["vcrd/doctor/processes.py:1: imports torch when the command starts"]),
        (
            "if True:\n    from torch import nn\n",
            ["vcrd/doctor/processes.py:2: imports torch when the command starts"],
        ),
        ("def f():\n    import torch\n", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n", []),
    ],
)
def test_an_import_that_delays_the_command_is_caught(tmp_path, text, found):
    plant(tmp_path, "vcrd/doctor/processes.py", text)
    (tmp_path / "vcrd" / "__main__.py").write_text("from vcrd.doctor import command\n")
    (tmp_path / "vcrd" / "doctor" / "command.py").write_text("from vcrd.doctor.processes import World\n")
    assert startup_violations(tmp_path) == found
