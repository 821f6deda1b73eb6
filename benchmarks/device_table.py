"""benchmarks/loss.py on one GPU: the shapes, the table, the limits, the record.

The table has one line for each shape and method:

- milliseconds of forward, and of forward and backward,
- the bytes that the loss must move divided by these times, in GB/s and as a share of the bandwidth of a copy on the
  device. Forward reads both logits; backward reads both and writes the gradient: 10 bytes for a pair of bfloat16,
- peak memory beyond the logits, in gradients,
- the error of the gradient against float64,
- the time relative to the loss of vcrd that does the same, forward and backward.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch.distributed as dist

from device_measure import Case, Figures, measure_case
from device_methods import INPLACE, JOBS, JSD, KL, MODELOPT, Job

TOKENS, VOCABULARIES, SHARDS = (1024, 4096, 16384), (32768, 131072, 152064), (1, 8)
ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
# The shape for the limits on bandwidth and on the ratio to ModelOpt.
HEADLINE = (4096, 131072, 131072, "bfloat16")
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 4e-3}
LARGEST_ERROR_OF_PEERS = {**LARGEST_ERROR, "float32": 1e-4}

Results = dict[str, Figures | str]


def default_cases(dtypes: Sequence[str], repeats: int) -> list[Case]:
    """Whole vocabularies first, then the shard of one of eight ranks."""
    return [
        Case(tokens, vocab // shards, vocab, dtype, repeats)
        for dtype in dtypes
        for shards in SHARDS
        for tokens in TOKENS
        for vocab in VOCABULARIES
    ]


def parse_shape(text: str) -> tuple[int, int, int]:
    """4096x16384of131072 -> tokens, columns, vocabulary."""
    tokens, _, rest = text.partition("x")
    columns, _, vocab = rest.partition("of")
    return int(tokens), int(columns), int(vocab or columns)


def counted_bytes(case: Case) -> tuple[int, int]:
    """The least bytes that forward, and forward and backward, must move."""
    pairs, element = case.tokens * case.columns, ELEMENT[case.dtype]
    return pairs * 2 * element, pairs * 5 * element


def bandwidths(case: Case, figures: Figures) -> tuple[float, float]:
    """Bytes a second of forward, and of forward and backward, over the counted bytes."""
    forward, both = counted_bytes(case)
    return forward / median(figures.forward), both / median(figures.both)


def copy_bandwidth(case: Case, copied: list[float]) -> float:
    # The bytes of both logits, each read once and written once.
    return 2 * counted_bytes(case)[0] / median(copied)


def extra_gradients(case: Case, figures: Figures) -> float:
    return figures.extra_bytes / (case.tokens * case.columns * ELEMENT[case.dtype])


def ratio(results: Results, peer: str, mine: str) -> float | None:
    """How many times longer the peer takes, forward and backward."""
    slow, fast = results.get(peer), results.get(mine)
    if not isinstance(slow, Figures) or not isinstance(fast, Figures):
        return None
    return median(slow.both) / median(fast.both)


def verdicts(case: Case, copied: list[float], results: Results, jobs: Sequence[Job] = JOBS) -> list[dict]:
    """Each limit with the measured value; `passed` None if there is no value."""
    out = []

    def limit(text: str, reached: float | None, passes) -> None:
        out.append(
            {"limit": text, "reached": reached, "passed": None if reached is None else bool(passes(reached))}
        )

    def figures(name: str) -> Figures | None:
        return results[name] if isinstance(results.get(name), Figures) else None

    headline = (case.tokens, case.columns, case.vocab, case.dtype) == HEADLINE
    if headline and copied:
        ceiling = copy_bandwidth(case, copied)
        for name, part, least in ((KL, 0, 0.90), (KL, 1, 0.85), (INPLACE, 1, 0.85)):
            what = ("forward", "forward + backward")[part]
            share = bandwidths(case, figures(name))[part] / ceiling if figures(name) else None
            limit(
                f"{name}, {what} >= {least:.0%} of the bandwidth of a copy", share, lambda x, y=least: x >= y
            )
    for job in jobs:
        for mine in job.beside:
            least = 10.0 if headline and job.name == MODELOPT else 1.0
            text = f"{job.name} / {mine} {'>=' if least > 1 else '>'} {least:g}"
            reached = ratio(results, job.name, mine)
            limit(text, reached, lambda x, y=least: x >= y if y > 1 else x > y)
    for name, most in ((INPLACE, 0.01 if headline else 0.1), (KL, 1.1), (JSD, 1.1)):
        reached = extra_gradients(case, figures(name)) if figures(name) else None
        limit(f"extra memory of {name} <= {most:g} gradients", reached, lambda x, y=most: x <= y)
    return out


def wrong_results(case: Case, results: Results, jobs: Sequence[Job] = JOBS) -> list[str]:
    out = []
    for job in jobs:
        most = (LARGEST_ERROR_OF_PEERS if job.beside else LARGEST_ERROR)[case.dtype]
        figures = results.get(job.name)
        if isinstance(figures, Figures) and not figures.gradient_error <= most:
            out.append(f"{job.name} {shape(case)} {case.dtype}: gradient error {figures.gradient_error:.1e}")
        if not job.beside and isinstance(figures, str):
            out.append(f"{job.name} {shape(case)} {case.dtype}: {figures}")
    return out


def shape(case: Case) -> str:
    part = f" (1/{case.vocab // case.columns})" if case.columns != case.vocab else ""
    return f"[{case.tokens}, {case.columns}]{part}"


HEADER = (
    f"{'':38} | {'milliseconds':^15} | {'GB/s':^15} | {'of the copy':^13} | {'extra /':>8} | {'gradient':>8} | times\n"
    f"{'shape':>20} {'method':>17} | {'fwd':>7} {'f + b':>7} | {'fwd':>7} {'f + b':>7} | {'fwd':>6} {'f + b':>6} | "
    f"{'gradient':>8} | {'error':>8} | vcrd's"
)


def lines(case: Case, copied: list[float], results: Results, jobs: Sequence[Job] = JOBS) -> str:
    ceiling = copy_bandwidth(case, copied) if copied else 0.0
    first = f"{shape(case):>20} {'copy':>17} | "
    out = [first + (f"{median(copied) * 1e3:7.3f} {'':7} | {ceiling / 1e9:7.0f}" if copied else f"{'-':>7}")]
    for job in jobs:
        figures = results[job.name]
        if isinstance(figures, str):
            out.append(f"{'':20} {job.name:>17} | {'-':>7} {'-':>7} |")
            continue
        forward, both = bandwidths(case, figures)
        ratios = [f"{value:.2f} {mine}" for mine in job.beside if (value := ratio(results, job.name, mine))]
        out.append(
            f"{'':20} {job.name:>17} | {median(figures.forward) * 1e3:7.3f} {median(figures.both) * 1e3:7.3f} | "
            f"{forward / 1e9:7.0f} {both / 1e9:7.0f} | {forward / ceiling:6.1%} {both / ceiling:6.1%} | "
            f"{extra_gradients(case, figures):8.2f} | {figures.gradient_error:8.1e} | {', '.join(ratios)}"
        )
    return "\n".join(out)


def record(case: Case, copied: list[float], results: Results) -> dict:
    figures = {name: r if isinstance(r, str) else asdict(r) for name, r in results.items()}
    derived = {}
    if copied:
        ceiling = copy_bandwidth(case, copied)
        for name, r in results.items():
            if isinstance(r, Figures):
                forward, both = bandwidths(case, r)
                derived[name] = {
                    "forward_ms": median(r.forward) * 1e3,
                    "forward_backward_ms": median(r.both) * 1e3,
                    "forward_gb_per_s": forward / 1e9,
                    "forward_backward_gb_per_s": both / 1e9,
                    "forward_share_of_copy": forward / ceiling,
                    "forward_backward_share_of_copy": both / ceiling,
                    "extra_gradients": extra_gradients(case, r),
                }
    return {
        "case": asdict(case),
        "copy_seconds": copied,
        "copy_gb_per_s": copy_bandwidth(case, copied) / 1e9 if copied else None,
        "derived": derived,
        "results": figures,
        "limits": verdicts(case, copied, results),
    }


def run(
    cases: Sequence[Case],
    device: str,
    machine: dict,
    path: Path | None,
    limit_seconds: float,
    jobs: Sequence[Job] = JOBS,
) -> int:
    """Measures, prints and writes. Returns 1 if a gradient is wrong or a loss of vcrd did not run. After the time
    limit it measures only the losses of vcrd. It writes the record after each shape, so that a crash loses only one."""
    started, records, reasons, wrong = time.monotonic(), [], {}, []
    print(HEADER, flush=True)

    def refuse(job: Job) -> str | None:
        late = job.beside and time.monotonic() - started > limit_seconds
        return f"the time limit of {limit_seconds:.0f} s was reached" if late else None

    for case in cases:
        copied, results = measure_case(case, device, jobs, refuse)
        print(lines(case, copied, results, jobs), flush=True)
        wrong += wrong_results(case, results, jobs)
        for name, result in results.items():
            if isinstance(result, str):
                reasons.setdefault((name, result), []).append(shape(case))
        records.append(record(case, copied, results))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            seconds = time.monotonic() - started
            whole = {"machine": machine, "seconds": seconds, "cases": records, "wrong": wrong}
            path.write_text(json.dumps(whole, indent=1))
    limits = [(case, limit) for case, r in zip(cases, records, strict=True) for limit in r["limits"]]
    passed = [limit["passed"] for _, limit in limits]
    print(
        f"limits: {passed.count(True)} passed, {passed.count(False)} failed, {passed.count(None)} not measured"
    )
    for case, limit in limits:
        if limit["passed"] is False:
            print(f"FAILED {shape(case)} {case.dtype}: {limit['limit']}; reached {limit['reached']:.3g}")
    for (name, reason), shapes in reasons.items():
        where = "" if len(shapes) == len(cases) else f" at {', '.join(shapes)}"
        print(f"{name} was not measured{where}: {reason}")
    if path:
        print(f"written: {path}")
    for text in wrong:
        print(f"WRONG RESULT: {text}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if wrong else 0
