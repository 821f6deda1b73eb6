"""The stages of `make gpu-check`, in order of worth: what each proves, how it is run, and which files it tests.

Each is short and needs nothing of another but the build, so that any lease of a GPU, however short, gets some of them
done. What a stage tests decides when its result is stale: a new file of the loss belongs to every stage by its glob.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu import build as extension
from benchmarks.gpu.process import run
from benchmarks.gpu.results import Finding
from benchmarks.gpu.tests import run_tests, workers

LIMIT = 90  # seconds of any stage but these two
# The whole extension, torch's headers among it, on however many cores there are. Nothing can run before it.
LIMIT_OF_THE_BUILD = 300
# A minute in which a student trains on, and two runs of five processes each before it.
LIMIT_OF_THE_LOOK = 180

Work = Callable[[float], Finding]


@dataclass(frozen=True)
class Stage:
    """expected: seconds below which it is not worth a start, until a run that passed has shown how long it takes."""

    name: str
    proves: str
    work: Work
    sources: tuple[str, ...]
    expected: int = 30
    limit: int = LIMIT
    modules: tuple[str, ...] = ()  # that must be importable
    tool: str | None = None  # that must be on the PATH or in the CUDA toolkit

    def reason_to_skip(self) -> str | None:
        """Why it cannot be tried with this interpreter, as far as that is known without a process."""
        for module in self.modules:
            try:
                found = importlib.util.find_spec(module)
            except ModuleNotFoundError:  # its parent package is not installed
                found = None
            if found is None:
                return f"{PACKAGES.get(module, module)} is not installed"
        if self.tool is not None and tool(self.tool) is None:
            return f"{self.tool} is neither on the PATH nor in a CUDA toolkit"
        return None


PACKAGES = {
    "megatron.core": "megatron-core",
    "transformer_engine": "Transformer Engine",
    "nccl": "nccl4py",
}


def tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


@dataclass(frozen=True)
class Script:
    """A script and its arguments: it writes figures where --json says, and exits with 1 where something is wrong."""

    command: tuple[str, ...]

    def __call__(self, seconds: float) -> Finding:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            outcome = run([sys.executable, *self.command, "--json", str(path)], seconds, show=True)
            try:
                figures = json.loads(path.read_text())
            except (OSError, ValueError):  # not written, or cut off while it was
                figures = {}
        figures.pop("machine", None)  # is in every result
        passed, how = figures.pop("passed", True), figures.pop("how", outcome.how)
        if outcome.ended_well and passed is None:
            return Finding(None, how, figures)
        passed = outcome.ended_well and passed is True and bool(figures)
        if not passed:
            figures["output"] = outcome.tail()
        figures = {"command": " ".join(["python", *self.command]), **figures}
        return Finding(passed, how if passed else outcome.how, figures)


@dataclass(frozen=True)
class Tests:
    """Those of these files that are on CUDA tensors, in at most so many processes."""

    paths: tuple[str, ...]
    most_workers: int = 8
    keyword: str = "cuda"  # in the names of those tests

    def __call__(self, seconds: float) -> Finding:
        return run_tests(self.paths, seconds, workers(self.most_workers), self.keyword)


def build(seconds: float) -> Finding:
    outcome = extension.build(seconds)
    built = outcome.output[outcome.output.rfind("vcrd._C built") :].strip() if outcome.ended_well else ""
    figures = {"built": built} if built else {"output": outcome.tail()}
    return Finding(outcome.ended_well, outcome.how, figures, built or outcome.tail())


def sanitizer(seconds: float) -> Finding:
    command = [tool("compute-sanitizer"), "--tool", "memcheck", "--error-exitcode", "9"]
    # Without torch's pool, so that reading past a tensor is reading past an allocation.
    outcome = run(
        [*command, sys.executable, "-m", "benchmarks.gpu.small_case"],
        seconds,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    tail = outcome.tail(1 if outcome.ended_well else 25)
    return Finding(outcome.ended_well, outcome.how, {"output": tail}, tail)


LOSS = (
    *("setup.py", "csrc/**/*", "vcrd/*.py", "vcrd/loss/*.py"),
    "!vcrd/__main__.py",
)
LINK = (*LOSS, "vcrd/link/**/*.py")
MEGATRON = (*LINK, "vcrd/monitor/bottleneck.py", "vcrd/megatron/*.py", "benchmarks/gpu/models.py")
BENCHMARK = (
    *LOSS,
    *("benchmarks/loss.py", "benchmarks/device_*.py", "benchmarks/loss_methods.py"),
)


MODULES_OF_TESTS = ("pytest", "hypothesis")
# What every test is run by.
HARNESS = tuple(f"tests/{name}.py" for name in ("conftest", "fork_server", "kernels_under_test", "preloaded"))


def of_loss(*names: str) -> dict:
    """A shard of the tests of the loss: its work, and its sources, helpers of the tests among them."""
    paths = tuple(f"tests/loss/test_{name}.py" for name in names)
    # Each of these tests starts several processes, each of which needs memory of the GPU and a core.
    most = 5 if any("sharded" in path for path in paths) else 8
    return {
        "work": Tests(paths, most),
        "sources": (*(*LOSS, *HARNESS, "tests/loss/*.py", "!tests/loss/test_*.py", *paths),),
        "modules": MODULES_OF_TESTS,
        "expected": 40,
    }


def of_link(*names: str, keyword: str = "cuda", expected: int = 30) -> dict:
    paths = tuple(f"tests/link/test_{name}.py" for name in names)
    return {
        # They time what the host waits for, so they run one after another.
        "work": Tests(paths, 1, keyword),
        "sources": (
            *(*LINK, *HARNESS, "tests/ports.py", "tests/waiting.py"),
            *("tests/link/*.py", "!tests/link/test_*.py", *paths),
        ),
        "modules": (*MODULES_OF_TESTS, *(["nccl"] if "nccl" in keyword else [])),
        "expected": expected,
    }


def benchmark(*shapes: str) -> dict:
    """Peers are left out after 50 s: one that is slow, or compiles for long, must not cost the shapes after it."""
    return {
        "work": Script(("benchmarks/loss.py", "--device", "cuda", "--limit", "50", "--shapes", *shapes)),
        "sources": BENCHMARK,
        "expected": 45,
    }


def head(shape: str, *hidden: str) -> dict:
    command = ("benchmarks/loss.py", "--head", "--device", "cuda", "--shapes", shape, "--hidden", *hidden)
    return {
        # Each run is tens to hundreds of milliseconds long, so five of them say enough.
        "work": Script((*command, "--repeats", "5")),
        "sources": (*LOSS, "benchmarks/head.py", "benchmarks/head_device.py", "benchmarks/device_measure.py"),
        "expected": 45,
    }


FP8 = {
    "sources": (*MEGATRON, "benchmarks/gpu/fp8.py"),
    "modules": ("transformer_engine", "megatron.core"),
    "expected": 40,
}

STAGES = (
    Stage(
        "build",
        "The extension with its CUDA kernels compiles for this GPU with this torch, and loads.",
        build,
        extension.SOURCES,
        expected=60,
        limit=LIMIT_OF_THE_BUILD,
    ),
    Stage(
        "kernels-rows",
        "Rows of every length, alignment and dtype, masks and in-place gradients agree with the float64 reference.",
        **of_loss("rows", "inplace"),
    ),
    Stage(
        "kernels-divergence",
        "Every divergence and pair of types, logits of -inf and the codes of 8 bits agree with the float64 reference.",
        **of_loss("divergence", "minus_infinity", "encode", "every_form"),
    ),
    Stage(
        "kernels-topk",
        "The loss from a teacher's top k agrees with the float64 reference.",
        **of_loss("topk", "topk_facts"),
    ),
    Stage(
        "kernels-hidden",
        "The loss from a teacher's hidden states agrees with the float64 reference; torch.compile takes the loss.",
        **of_loss("hidden", "form_arguments", "compile"),
    ),
    Stage(
        "kernels-validity",
        "Validities and weights agree with the float64 reference.",
        **of_loss("validity"),
    ),
    Stage(
        "kernels-sharded",
        "With the vocabulary and the context over ranks that share the GPU, values and gradients are the same.",
        **of_loss("sharded", "forms_sharded", "context_split"),
    ),
    Stage(
        "streams",
        "The loss runs on the current stream and in captured graphs, and the host never waits for the device.",
        **of_loss("cuda"),
    ),
    Stage(
        "benchmark-headline",
        "Time, bandwidth, memory and error of the loss beside its peers, at the shapes of the page's table.",
        **benchmark("4096x131072", "4096x16384of131072", "1024x32768"),
    ),
    Stage(
        "head-4096x131072",
        "Time, memory and error of the fused head beside stored logits, hidden sizes 2048 and 4096.",
        **head("4096x131072", "2048", "4096"),
    ),
    Stage(
        "head-16384x151936-2048",
        "The same with 16384 tokens and the vocabulary of Qwen3, hidden size 2048.",
        **head("16384x151936", "2048"),
    ),
    Stage(
        "head-16384x151936-4096",
        "The same with 16384 tokens and the vocabulary of Qwen3, hidden size 4096.",
        **head("16384x151936", "4096"),
    ),
    Stage(
        "training",
        "How much longer a Megatron training step takes with the plug than with plain cross-entropy, answers ready.",
        Script(("-m", "benchmarks.gpu.training")),
        (*MEGATRON, "benchmarks/gpu/training.py", "benchmarks/device_measure.py"),
        expected=60,
        modules=("megatron.core",),
    ),
    Stage(
        "link-tcp",
        "Answers that cross TCP arrive whole on the device, without a wait of the host or growing memory.",
        **of_link("cuda_link"),
    ),
    Stage(
        "nccl-ranks",
        "Two processes on one GPU are two ranks for NCCL: what the next stages rest on.",
        Script(("-m", "benchmarks.gpu.nccl", "ranks")),
        ("benchmarks/gpu/nccl.py", "benchmarks/gpu/ranks.py"),
        expected=20,
    ),
    Stage(
        "nccl-link",
        "Two jobs over NCCL: every payload and layout arrives exactly, also large pieces and at ranks of padding.",
        **of_link("transport", "link", "layouts", keyword="nccl"),
    ),
    Stage(
        "nccl-kill",
        "A teacher rank dies or stops in the middle of a transfer: the student lives, and its weights stay equal.",
        **of_link("rejoin", keyword="nccl and (any_single or stopped or twenty)"),
    ),
    Stage(
        "nccl-alive",
        "A minute after a teacher rank died while it sent, the student trains on, with torch's monitors set tight.",
        **of_link("long_after", keyword="nccl", expected=120),
        limit=LIMIT_OF_THE_LOOK,
    ),
    Stage(
        "nccl-speed",
        "GB/s of the link beside bare ncclSend and ncclRecv and beside TCP, and what is left of products beside it.",
        Script(("-m", "benchmarks.gpu.nccl", "speed")),
        (*LINK, "benchmarks/gpu/nccl.py", "benchmarks/gpu/ranks.py"),
        expected=60,
        modules=("nccl",),
    ),
    Stage(
        "megatron-sp-cp",
        "Four ranks with sequence parallelism, with context parallelism and with both train as one rank does.",
        Script(("-m", "benchmarks.gpu.parallel")),
        (*MEGATRON, "benchmarks/gpu/parallel.py", "benchmarks/gpu/ranks.py"),
        expected=85,
        modules=("transformer_engine", "megatron.core"),
    ),
    Stage(
        "fp8-micro-batch",
        "A micro-batch through a student and a teacher in FP8, by each recipe, beside bfloat16.",
        Script(("-m", "benchmarks.gpu.fp8")),
        **FP8,
    ),
    Stage(
        "fp8-training",
        "30 steps of training in FP8, by each recipe, beside the same steps in bfloat16.",
        Script(("-m", "benchmarks.gpu.fp8", "--training")),
        **FP8,
    ),
    Stage(
        "sanitizer",
        "compute-sanitizer finds no access of the kernels outside their tensors.",
        sanitizer,
        (*LOSS, "benchmarks/gpu/small_case.py"),
        tool="compute-sanitizer",
    ),
    Stage(
        "profile",
        "What holds up the kernels of the shape that is furthest from the copy's bandwidth, by Nsight Compute.",
        Script(("-m", "benchmarks.gpu.profile")),
        (*BENCHMARK, "benchmarks/gpu/profile.py"),
        tool="ncu",
    ),
    Stage(
        "benchmark-1024",
        "As benchmark-headline, 1024 tokens and larger vocabularies.",
        **benchmark("1024x131072", "1024x152064"),
    ),
    Stage(
        "benchmark-4096",
        "As benchmark-headline, 4096 tokens and other vocabularies.",
        **benchmark("4096x32768", "4096x152064"),
    ),
    Stage(
        "benchmark-16384",
        "As benchmark-headline, 16384 tokens.",
        **benchmark("16384x152064", "16384x131072", "16384x32768"),
    ),
    Stage(
        "benchmark-shards",
        "As benchmark-headline, a shard of eight, 1024 and 4096 tokens.",
        **benchmark(
            *("1024x4096of32768", "1024x16384of131072", "1024x19008of152064"),
            *("4096x4096of32768", "4096x19008of152064"),
        ),
    ),
    Stage(
        "benchmark-shards-16384",
        "As benchmark-headline, a shard of eight, 16384 tokens.",
        **benchmark("16384x19008of152064", "16384x16384of131072", "16384x4096of32768"),
    ),
)
