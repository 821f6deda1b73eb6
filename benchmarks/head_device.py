"""benchmarks/loss.py --head on one GPU: compares the fused head with stored logits on the device.

Hidden states, output layer and stored logits have one 16-bit dtype, as in Megatron. The logits of the fused head are
float32 after the product. A run is forward and backward, to the gradients of hidden states and weight. Every path
returns these gradients, so they do not count as memory. Errors are |difference| / |truth| of the losses and of both
gradients, against float64 from the same inputs, for the mean loss over a few tokens with all others masked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from device_measure import CHECKED_ROWS, CLOCKS, WARMUPS, CudaClock, HostClock
from device_table import LARGEST_ERROR
from head import FUSED, STORED, HeadCase, Inputs, methods
from vcrd.loss import reference

BLOCK = 16384  # rows of the weight at a time in float64

Results = dict[str, "dict | str"]


def errors(inputs: Inputs, rows: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Errors of a path. found: loss [tokens] and both gradients, for the mean over `rows` alone."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    with hidden.device:  # the reference creates tensors without naming a device
        states = hidden[rows].double()
        logits = torch.cat([states @ block.double().T for block in weight.split(BLOCK)], -1).requires_grad_()
        stats = reference.statistics(logits, inputs.teacher_logits(rows, BLOCK), inputs.labels[rows])
        strength, _ = reference.weights(*reference.log_validities(stats, "label"))
        loss = strength * stats["divergence"]
        (slope,) = torch.autograd.grad(loss.mean(), logits)
        loss = loss.detach()
    of_hidden, missed, whole = torch.zeros_like(states), 0.0, 0.0
    blocks = zip(slope.split(BLOCK, -1), weight.split(BLOCK), found[2].split(BLOCK), strict=True)
    for part, block, got in blocks:
        of_hidden += part @ block.double()
        truth = part.T @ states
        missed += float((got.double() - truth).square().sum())
        whole += float(truth.square().sum())

    def apart(got: Tensor, truth: Tensor) -> float:
        return float((got.double() - truth).norm() / truth.norm())

    return {
        "loss": apart(found[0][rows], loss),
        "hidden_gradient": apart(found[1][rows], of_hidden),
        "weight_gradient": (missed / whole) ** 0.5,
    }


def measured(run: Callable, inputs: Inputs, repeats: int, clock: CudaClock | HostClock) -> dict | str:
    """Errors, peak bytes beyond the gradients, and seconds of each run; a message if it does not fit."""
    tokens, device = inputs.hidden.shape[0], inputs.hidden.device
    rows = torch.linspace(0, tokens - 1, min(CHECKED_ROWS, tokens)).long().to(device)
    mask = torch.zeros(tokens, device=device)
    mask[rows] = 1
    try:
        found = errors(inputs, rows, run(mask))
        for _ in range(WARMUPS):
            run()
        clock.clean()
        clock.start_memory()
        run()
        gradients = sum(t.numel() * t.element_size() for t in (inputs.hidden, inputs.weight))
        extra = clock.extra_bytes() - gradients
        seconds = []
        for _ in range(repeats):
            clock.prepare()
            start = clock.mark()
            run()
            seconds.append(clock.seconds(start, clock.mark()))
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        clock.clean()
    return {"seconds": seconds, "extra_bytes": extra, "errors": found, "error": max(found.values())}


def measure(case: HeadCase, device: str, dtype: str) -> Results:
    clock = CLOCKS[device]()
    inputs = Inputs.draw(case, device, getattr(torch, dtype))
    ready = methods(case, inputs)
    return {name: measured(run, inputs, case.repeats, clock) for name, run in ready.items()}


def wrong(results: Results, dtype: str) -> list[str]:
    """Stored 16-bit logits are rounded before the loss, so the limit on the error holds only for the others."""
    out = []
    for name, result in results.items():
        if name == STORED:
            continue
        if isinstance(result, str):
            out.append(f"{name}: {result}")
        elif not result["error"] <= LARGEST_ERROR[dtype]:
            out.append(f"{name}: error {result['error']:.1e}")
    return out


def against_stored(results: Results) -> dict[str, float] | None:
    """Time and memory of the fused head relative to stored logits; None if one of them was not measured."""
    stored, fused = results[STORED], results[FUSED]
    if isinstance(stored, str) or isinstance(fused, str):
        return None
    return {
        "time": median(fused["seconds"]) / median(stored["seconds"]),
        "memory": fused["extra_bytes"] / stored["extra_bytes"],
        "error": fused["error"] / stored["error"],
    }


def lines(case: HeadCase, results: Results) -> str:
    first = f"{f'[{case.tokens}, {case.vocab}]':>17} {case.hidden:>6} {case.teacher:>7}"
    rows = []
    for name, result in results.items():
        if isinstance(result, str):
            rows.append(f"{first} {name:>7} {result}")
            continue
        rows.append(
            f"{first} {name:>7} {1e3 * median(result['seconds']):>9.2f} "
            f"{result['extra_bytes'] / 2**20:>9.0f} {result['error']:>8.1e}"
        )
    ratios = against_stored(results)
    if ratios is not None:
        rows.append(
            "    fused / stored: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        )
    return "\n".join(rows)


def run(cases: list[HeadCase], device: str, dtypes: list[str], machine: dict, path: Path | None) -> int:
    """Prints, and writes after each case. Returns 1 if the fused head is wrong or does not fit into memory."""
    print(
        f"{'shape':>17} {'hidden':>6} {'teacher':>7} {'':>7} {'median ms':>9} {'extra MiB':>9} {'error':>8}"
    )
    records, faults = [], []
    for dtype in dtypes:
        for case in cases:
            results = measure(case, device, dtype)
            print(lines(case, results), flush=True)
            found = wrong(results, dtype)
            faults += [
                f"[{case.tokens}, {case.vocab}] {case.hidden} {case.teacher} {dtype}, {text}"
                for text in found
            ]
            record = {"case": {**asdict(case), "dtype": dtype}, "results": results}
            records.append({**record, "fused_to_stored": against_stored(results)})
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"machine": machine, "cases": records, "wrong": faults}, indent=1))
    if path:
        print(f"written: {path}")
    for text in faults:
        print(f"WRONG RESULT: {text}", file=sys.stderr)
    return 1 if faults else 0
