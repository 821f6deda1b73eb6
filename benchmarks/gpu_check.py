"""Everything that needs a GPU, in one command: build, tests on CUDA, benchmark, FP8, compute-sanitizer; one JSON.

    make gpu-check PYTHON=python3 [ARGS="--json gpu-check.json"]

Runs with the interpreter it is started with and needs no network: torch with CUDA, pybind11, ninja, a CUDA toolkit and
pytest must be there; what the benchmark compares with is left out where it is not installed. Ends within 8 minutes;
what does not fit is cut off and said. Exits with 0 when the build, the tests, the sanitizer (where there is one) and
every gradient of the benchmark were right; speeds are reported and decide nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 460  # for everything
# Seconds kept for what comes after a step.
AFTER_BUILD, AFTER_TESTS, AFTER_BENCHMARK, AFTER_FP8 = 240, 160, 100, 60

FACTS = "import json, machine; print(json.dumps(machine.gpu_facts()))"
HAS_KERNELS = """
import torch, vcrd.ops
if not torch._C._dispatch_has_kernel_for_dispatch_key("vcrd::row_statistics", "CUDA"):
    raise SystemExit("vcrd._C was built without its CUDA kernels; its build says why")
"""
# Rows that end within a vector, shards that begin within one, a masked row, each divergence; no torch kernel is judged.
SMALL_CASE = """
import torch, vcrd
def logits(dtype): return torch.randn(5, 1037, device="cuda").to(dtype)[:, 3:]
labels, mask = torch.arange(5, device="cuda"), torch.tensor([1, 1, 0, 1, 1], device="cuda")
for divergence in ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student = logits(dtype).requires_grad_()
        stats = vcrd.vocab_parallel_divergence(
            student, logits(torch.bfloat16), labels, divergence=divergence, mask=mask, temperature=2.0
        )
        torch.autograd.grad((stats.divergence + stats.cross_entropy).sum(), student)
torch.cuda.synchronize()
"""


@dataclass
class Outcome:
    returncode: int | None  # None: cut off
    seconds: float
    output: str

    @property
    def ended_well(self) -> bool:
        return self.returncode == 0

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.output.strip().splitlines()[-lines:])

    def summary(self) -> dict:
        how = "cut off by the time limit" if self.returncode is None else f"exit status {self.returncode}"
        return {"passed": self.ended_well, "seconds": round(self.seconds, 1), "how": how}


def run(command: list[str], seconds: float, show: bool = False, **environment: str) -> Outcome:
    """Runs it in the checkout, prints its lines as they come if `show`, and ends it with its children at the limit."""
    # torch looks for ninja on the PATH, also where the environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    pythonpath = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    started = time.monotonic()
    with TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": path,
                "PYTHONPATH": pythonpath,
                "PYTHONUNBUFFERED": "1",
                **environment,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        shown = 0
        while True:
            try:
                returncode = process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                returncode = None
            text = (Path(folder) / "output").read_text(errors="replace")
            if show:
                print(text[shown:], end="", flush=True)
                shown = len(text)
            if returncode is not None:
                return Outcome(returncode, time.monotonic() - started, text)
            if time.monotonic() - started > seconds:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Outcome(None, time.monotonic() - started, text)


def build(seconds: float) -> tuple[dict, str]:
    outcome = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds)
    if not outcome.ended_well:
        return outcome.summary(), outcome.tail()
    built = outcome.output[outcome.output.rfind("vcrd._C built") :].strip()
    usable = run([sys.executable, "-c", HAS_KERNELS], 60)
    return {**outcome.summary(), "passed": usable.ended_well, "built": built}, usable.tail() or built


def tests(seconds: float) -> tuple[dict, str]:
    if not run([sys.executable, "-c", "import pytest"], 60).ended_well:
        return {"passed": False, "how": "not run: pytest is not installed"}, "pytest is not installed"
    # What CPU tensors give is known from elsewhere, and takes most of the time.
    where = ["tests/loss", "tests/link/test_cuda_link.py", "tests/link/test_cuda_pairs.py"]
    command = [sys.executable, "-m", "pytest", *where, "-v", "-k", "not cpu", "-p", "no:cacheprovider"]
    if run([sys.executable, "-c", "import xdist"], 60).ended_well:
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))]
    outcome = run(command, seconds)
    counts = count_tests(outcome.output)
    passed = outcome.ended_well and counts["passed_on_cuda"] > 0
    failed = "".join(f"failed: {name}\n" for name in counts["failed"])
    text = outcome.tail(1) if passed else failed + outcome.tail()
    return {**outcome.summary(), "passed": passed, **counts, "last_line": outcome.tail(1)}, text


# A line of `pytest -v`: the test and how it ended, or with workers how it ended and the test.
_ENDED = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<how>[A-Z]+) (?P<name>tests/.+?)"
    r"|(?P<its_name>tests/.+?) (?P<its_how>PASSED|FAILED|ERROR|SKIPPED)\b.*)$",
    re.MULTILINE,
)


def count_tests(output: str) -> dict:
    """How many ended and how, and the names of what failed; also of a run that was cut off."""
    found = [
        (match["name"] or match["its_name"], match["how"] or match["its_how"])
        for match in _ENDED.finditer(output)
    ]
    passed = [name for name, how in found if how == "PASSED"]
    return {
        "passed_tests": len(passed),
        "passed_on_cuda": sum("[cuda" in name for name in passed),
        "skipped": sum(how == "SKIPPED" for _, how in found),
        "failed": [name.rstrip() for name, how in found if how in ("FAILED", "ERROR")],
    }


def benchmark(seconds: float) -> tuple[dict, str]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "loss.json"
        limit = max(20.0, min(240.0, seconds - 40))
        command = [sys.executable, "benchmarks/loss.py", "--device", "cuda", "--json", str(path)]
        outcome = run([*command, "--limit", f"{limit:.0f}"], seconds, show=True)
        figures = json.loads(path.read_text()) if path.exists() else {}
    return {**outcome.summary(), **figures}, "" if outcome.ended_well else outcome.tail(5)


def fp8(seconds: float) -> tuple[dict, str]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fp8.json"
        outcome = run([sys.executable, "benchmarks/gpu_fp8.py", "--json", str(path)], seconds)
        figures = json.loads(path.read_text()) if path.exists() else {}
    return {**outcome.summary(), **figures}, outcome.tail() if not figures else outcome.tail(4)


def sanitizer(seconds: float) -> tuple[dict, str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"passed": None, "how": "compute-sanitizer is not on the PATH"}, "it is not on the PATH"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SMALL_CASE]
    # Without torch's pool, so that reading past a tensor is reading past an allocation.
    outcome = run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {**outcome.summary(), "last_line": outcome.tail(1)}, outcome.tail(1 if outcome.ended_well else 25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--json", type=Path, default=ROOT / "gpu-check.json", help="where everything is written"
    )
    options = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        return _stop(f"{sys.executable} cannot import torch: {error}")
    if not torch.cuda.is_available():
        return _stop(f"torch {torch.__version__} of {sys.executable} finds no GPU that it can use")
    started = time.monotonic()
    facts = run([sys.executable, "-c", FACTS], 60)
    result: dict = {"machine": json.loads(facts.tail(1)) if facts.ended_well else {"unknown": facts.tail()}}

    def step(name: str, work, kept: float) -> bool:
        print(f"==> {name}", flush=True)
        result[name], text = work(max(10.0, SECONDS - kept - (time.monotonic() - started)))
        result["seconds"] = round(time.monotonic() - started, 1)
        result["passed"] = all(r["passed"] is not False for r in result.values() if "passed" in _dict(r))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
        state = {True: "passed", False: "FAILED", None: "not run"}[result[name]["passed"]]
        took = f" in {result[name]['seconds']:.0f} s" if "seconds" in result[name] else ""
        print(f"{text}\n{name} {state}{took}", flush=True)
        return result[name]["passed"] is not False

    if step("build", build, AFTER_BUILD):
        step("tests", tests, AFTER_TESTS)
        step("benchmark", benchmark, AFTER_BENCHMARK)
        step("fp8", fp8, AFTER_FP8)
        step("sanitizer", sanitizer, 0)
    print(f"{'all passed' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s; {options.json}")
    return 0 if result["passed"] else 1


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _stop(sentence: str) -> int:
    print(f"gpu-check: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
