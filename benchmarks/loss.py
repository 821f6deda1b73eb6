"""Compares the loss with its alternatives for a Megatron user, forward and backward; one line per shape.

    python benchmarks/loss.py [--shapes 512x32768 ...] [--repeats 7] [--json results.json]

vcrd, in place: vcrd.validity_calibrated_kl with labels; its gradient in a new buffer, or over the student's logits.
ModelOpt: NVIDIA's LogitsKLLoss. compile: the textbook KL in float32 under torch.compile. The methods alternate in the
same processes. The logits are restored outside the measured part, and each gradient is compared with float64.

    python benchmarks/loss.py --head [--shapes 4096x131072 ...] [--hidden 512] [--teacher dense hidden] [--json F]

Compares the fused head with stored logits, from hidden states to both gradients: see head.py, on a GPU head_device.py.

    python benchmarks/loss.py --device cuda [--shapes 4096x131072 4096x16384of131072 ...]

The same on one GPU, with more peers and a copy as the upper limit. device_table.py explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import head
from loss_measure import Case, Result, measure
from loss_methods import COMPILED, METHODS, MODELOPT, OURS, OURS_INPLACE
from machine import gpu_facts, installed, processor

SHAPES = ["512x32768", "512x131072"]
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
REPEATS = {"cpu": 7, "cuda": 15}
# A method with a larger error does not compute the same loss. A peer may lose a digit of float32 in sums over a large
# vocabulary; 16-bit dtypes round each element of the gradient.
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 4e-3}
LARGEST_ERROR_OF_PEERS = {**LARGEST_ERROR, "float32": 1e-4}
# Extra memory in gradients: one, or none. The rest is for statistics per token and pages of the allocator.
LARGEST_EXTRA = {OURS: 1.1, OURS_INPLACE: 0.1}

Results = dict[str, "Result | str"]


def limits(case: Case) -> dict[tuple[str, str], float]:
    """The least ratio of times for a pass: (peer, ours) -> ratio."""
    easy = case.dtype == "float32" and case.tp == 1
    return {
        (MODELOPT, OURS): 6.0 if easy else 10.0,
        (MODELOPT, OURS_INPLACE): 12.0,
        (COMPILED, OURS): 1.8,
        (COMPILED, OURS_INPLACE): 3.0,
    }


def largest_error(name: str, dtype: str) -> float:
    return (LARGEST_ERROR if name in (OURS, OURS_INPLACE) else LARGEST_ERROR_OF_PEERS)[dtype]


def milliseconds(result: Result | str) -> float | None:
    return None if isinstance(result, str) else median(result.times) * 1e3


def verdicts(case: Case, results: Results) -> list[dict]:
    """Each limit with the measured value; `passed` None if the peer could not run."""
    out = []
    for (peer, mine), least in limits(case).items():
        slow, fast = milliseconds(results[peer]), milliseconds(results[mine])
        ratio = None if slow is None or fast is None else slow / fast
        out.append(
            {
                "limit": f"{peer} / {mine} >= {least:g}",
                "reached": ratio,
                "passed": None if ratio is None else ratio >= least,
            }
        )
    for mine, most in LARGEST_EXTRA.items():
        extra = results[mine].extra_bytes / results[mine].gradient_bytes
        out.append({"limit": f"extra memory {mine} <= {most:g}", "reached": extra, "passed": extra <= most})
    return out


HEADER = (
    f"{'':28} | {'median ms, forward + backward':^35} | {'peer / vcrd, peer / in place':^45} | "
    f"{'peak RSS growth / gradient':^35} | {'gradient error against float64':^35}\n"
    f"{'shape':>13} {'dtype':>9} {'tp':>3}  | "
    + " ".join(f"{name:>8}" for name in METHODS)
    + f" | {'ModelOpt':^22} {'compile':^22} | "
    + " ".join(f"{name:>8}" for name in METHODS)
    + " | "
    + " ".join(f"{name:>8}" for name in METHODS)
)


def line(case: Case, results: Results) -> str:
    def cells(width: int, text) -> str:
        values = (results[name] for name in METHODS)
        return " ".join(f"{'-' if isinstance(value, str) else text(value):>{width}}" for value in values)

    def mark(verdict: dict) -> str:
        if verdict["reached"] is None:
            return f"{'-':>10}"
        return f"{verdict['reached']:5.1f} {'pass' if verdict['passed'] else 'FAIL'}"

    checked = verdicts(case, results)
    return (
        f"{f'[{case.tokens}, {case.vocab}]':>13} {case.dtype:>9} {case.tp:>3}  | "
        + cells(8, lambda r: f"{milliseconds(r):.1f}")
        + f" | {mark(checked[0]):>10} {mark(checked[1]):>11} {mark(checked[2]):>10} {mark(checked[3]):>11} | "
        + cells(8, lambda r: f"{r.extra_bytes / r.gradient_bytes:.2f}")
        + " | "
        + cells(8, lambda r: f"{r.gradient_error:.1e}")
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="TOKENSxVOCAB", help="cuda: also TOKENSxSHARDofVOCAB")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, help="timed runs of each method")
    parser.add_argument("--json", type=Path, help="file for all times")
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2], help="cpu: tensor-parallel sizes")
    parser.add_argument("--threads", type=int, default=2, help="cpu: threads, divided among the ranks")
    parser.add_argument(
        "--loss", choices=["calibrated", "divergence"], default="calibrated", help="cpu: which of ours"
    )
    parser.add_argument(
        "--limit", type=float, default=240, help="cuda: seconds after which peers are left out"
    )
    parser.add_argument("--head", action="store_true", help="the fused head beside stored logits")
    head.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.dtypes = options.dtypes or DTYPES[options.device]
    options.repeats = options.repeats or REPEATS[options.device]
    return options


def on_cuda(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("loss.py: --device cuda needs a GPU that torch can use", file=sys.stderr)
        return 2
    import device_table
    import head_device

    machine = {**gpu_facts(), "command": " ".join(["python", *sys.argv])}
    print(f"{machine['device']}, driver {machine['driver_version']}; {', '.join(machine['packages'])}")
    if options.head:
        return head_device.run(head.cases(options), "cuda", options.dtypes, machine, options.json)
    cases = device_table.default_cases(options.dtypes, options.repeats)
    if options.shapes:
        wanted = [device_table.parse_shape(text) for text in options.shapes]
        cases = [device_table.Case(*s, d, options.repeats) for d in options.dtypes for s in wanted]
    return device_table.run(cases, "cuda", machine, options.json, options.limit)


def main() -> int:
    options = parse()
    if options.device == "cuda":
        return on_cuda(options)
    return head.run(options) if options.head else on_cpu(options)


def on_cpu(options: argparse.Namespace) -> int:
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": [installed(name) for name in ("torch", "megatron-core", "nvidia-modelopt")],
    }
    print(
        f"{machine['processor']}, {machine['cores']} cores, {options.threads} threads; "
        f"{', '.join(machine['packages'])}; load {machine['load_before']:.1f}"
    )
    if machine["load_before"] > 0.5:
        print("Other processes use this machine: ratios may hold, milliseconds will not.")
    print(HEADER, flush=True)
    records, reasons, wrong = [], {}, []
    for shape, dtype, tp in product(options.shapes or SHAPES, options.dtypes, options.tp):
        tokens, vocab = (int(size) for size in shape.split("x"))
        threads = max(1, options.threads // tp)
        case = Case(tokens, vocab, dtype, tp, threads, options.repeats, options.loss, options.device)
        results = measure(case)
        print(line(case, results), flush=True)
        for name, result in results.items():
            if isinstance(result, str):
                reasons.setdefault((name, result), tp)
            elif result.gradient_error > largest_error(name, dtype):
                wrong.append(f"{name} {shape} {dtype} tp {tp}: gradient error {result.gradient_error:.1e}")
        figures = {name: r if isinstance(r, str) else asdict(r) for name, r in results.items()}
        records.append({"case": asdict(case), "results": figures, "limits": verdicts(case, results)})
    verdict = [limit["passed"] for record in records for limit in record["limits"]]
    print(
        f"limits: {verdict.count(True)} passed, {verdict.count(False)} failed, {verdict.count(None)} without a peer"
    )
    for (name, reason), tp in reasons.items():
        print(f"{name} was not measured at tp {tp}: {reason}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": machine, "torch": torch.__version__, "cases": records}, indent=1)
        )
        print(f"written: {options.json}")
    for text in wrong:
        print(f"WRONG RESULT: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
