"""Compares time and memory of the fused head with stored logits, forward and backward, in one process.

    python benchmarks/loss.py --head [--shapes 4096x131072 ...] [--hidden 512] [--teacher dense hidden] [--json F]

stored: logits = hidden @ weight.T, then vcrd.validity_calibrated_kl with its gradient in place, which is its cheaper
form. fused: vcrd.fused_validity_calibrated_kl. again: the same with upstream="uneven". All go from float32
hidden states and weight to both gradients, for a mean over the tokens. Memory is the growth of the peak of the process
(VmHWM), read by its parent, without the two gradients, which every path returns. With --device cuda: head_device.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from statistics import median

import torch

from loss_measure import CpuMeter, release
from machine import installed, processor
from vcrd.teacher_logits import HiddenStates

SLOWEST, MOST_MEMORY, LARGEST_ERROR = 1.15, 1 / 8, 1e-5
STORED, FUSED, AGAIN = "stored", "fused", "again"
SHAPES = ["4096x131072"]
MARK, READ = "mark", "read"  # requests of the measured process to its parent


@dataclass(frozen=True)
class HeadCase:
    tokens: int
    vocab: int
    hidden: int
    teacher: str  # dense or hidden
    repeats: int
    threads: int
    chunk_bytes: int | None  # None: the default of vcrd


@dataclass(frozen=True)
class Inputs:
    """hidden [tokens, size] and weight [vocab, size] require gradients; given: the teacher for the loss."""

    hidden: torch.Tensor
    weight: torch.Tensor
    given: torch.Tensor | HiddenStates
    labels: torch.Tensor

    @classmethod
    def draw(cls, case: HeadCase, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
        tokens, vocab, size = case.tokens, case.vocab, case.hidden
        generator = torch.Generator(device).manual_seed(1)

        def draw(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator, device=device)

        hidden = draw(tokens, size).to(dtype).requires_grad_()
        weight = (3 / size**0.5 * draw(vocab, size)).to(dtype).requires_grad_()
        labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
        if case.teacher == "dense":  # as in the default payload of the link
            given = torch.empty(tokens, vocab, dtype=torch.float16, device=device)
            for rows in given.split(256):
                rows.copy_(3 * draw(*rows.shape))
        else:
            given = HiddenStates(draw(tokens, size).to(dtype), (3 / size**0.5 * draw(vocab, size)).to(dtype))
        return cls(hidden, weight, given, labels)

    def teacher_logits(self, rows: torch.Tensor, block: int) -> torch.Tensor:
        """The teacher's logits for these tokens in float64, from `block` rows of its output layer at a time."""
        if isinstance(self.given, torch.Tensor):
            return self.given[rows].double()
        states = self.given.states[rows].double()
        return torch.cat([states @ part.double().T for part in self.given.weight.split(block)], -1)


def methods(case: HeadCase, inputs: Inputs) -> dict[str, Callable]:
    """By name, functions (mask) -> (loss [tokens], gradient of the hidden states, gradient of the weight).

    The gradients are for the mean loss over all tokens, or over the tokens of a float mask.
    """
    import vcrd

    hidden, weight, given, labels = inputs.hidden, inputs.weight, inputs.given, inputs.labels
    chunks = {} if case.chunk_bytes is None else {"chunk_bytes": case.chunk_bytes}
    # Checking the upstream gradient waits for the device, so it is promised, as in the plug from its second step on.
    in_forward = "even" if hidden.is_cuda else "look"

    def finish(loss: torch.Tensor, mask: torch.Tensor | None) -> tuple:
        mean = loss.mean() if mask is None else (loss * mask).sum() / mask.sum()
        return (loss.detach(), *torch.autograd.grad(mean, (hidden, weight)))

    def stored(mask: torch.Tensor | None = None) -> tuple:
        logits = hidden @ weight.T
        out = vcrd.validity_calibrated_kl(logits, given, labels, mask=mask, inplace_gradient=True)
        return finish(out.loss, mask)

    def fused(mask: torch.Tensor | None = None, upstream: str = in_forward) -> tuple:
        out = vcrd.fused_validity_calibrated_kl(
            hidden, weight, given, labels, mask=mask, upstream=upstream, **chunks
        )
        return finish(out.loss, mask)

    return {STORED: stored, FUSED: fused, AGAIN: lambda mask=None: fused(mask, upstream="uneven")}


def measure(case: HeadCase, pipe: Connection) -> None:
    """In a separate process: seconds of each run, extra bytes at the peak, errors against `stored`."""
    torch.set_num_threads(case.threads)

    def ask(what: str) -> int | None:
        pipe.send(what)
        return pipe.recv()

    small = replace(case, tokens=16, vocab=256)
    for run in methods(small, Inputs.draw(small)).values():
        run()  # the set-up of libraries does not count
    ready, truth, results = methods(case, Inputs.draw(case)), None, {}
    for name, run in ready.items():
        release()
        ask(MARK)
        found = run()
        gradients = 4 * case.hidden * (case.tokens + case.vocab)
        results[name] = {"extra_bytes": ask(READ) - gradients, "seconds": []}
        truth = truth or found
        pairs = zip(found, truth, strict=True)
        results[name]["error"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        del found, pairs
    del truth
    for _ in range(case.repeats):  # alternating, so that a slow moment of the machine affects all
        for name, run in ready.items():
            gc.collect()
            start = time.perf_counter()
            run()
            results[name]["seconds"].append(time.perf_counter() - start)
    pipe.send(results)


def in_a_process(case: HeadCase) -> dict[str, dict]:
    """The results that `measure` sends. This process reads the memory of the measured process."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(case.threads)  # read when the child starts
    pipe, end = context.Pipe()
    process = context.Process(target=measure, args=(case, end), daemon=True)
    process.start()
    end.close()
    meter = CpuMeter(process.pid)
    try:
        while (message := pipe.recv()) in (MARK, READ):
            pipe.send(meter.mark() if message == MARK else meter.extra_bytes())
        return message
    except EOFError as error:
        raise RuntimeError(f"the measurement of {case} failed; its message is above") from error
    finally:
        pipe.close()
        process.join()


def verdicts(results: dict[str, dict]) -> dict[str, tuple[float, bool]]:
    """For each limit the value of the fused head, and whether it passes."""
    stored, fused = results[STORED], results[FUSED]
    slower = median(fused["seconds"]) / median(stored["seconds"])
    memory = fused["extra_bytes"] / stored["extra_bytes"]
    return {
        f"time <= {SLOWEST} of stored": (slower, slower <= SLOWEST),
        "memory <= 1/8 of stored": (memory, memory <= MOST_MEMORY),
        f"error <= {LARGEST_ERROR}": (fused["error"], fused["error"] <= LARGEST_ERROR),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of --head")
    group.add_argument("--hidden", nargs="+", type=int, default=[512], help="hidden sizes")
    group.add_argument("--teacher", nargs="+", choices=["dense", "hidden"], default=["dense", "hidden"])
    group.add_argument(
        "--chunk-mib", type=float, help="size of a chunk of float32 logits; default: that of vcrd"
    )


def cases(options: argparse.Namespace) -> list[HeadCase]:
    """The cases for the options of `loss.py`."""
    chunk_bytes = None if options.chunk_mib is None else int(options.chunk_mib * 2**20)
    return [
        HeadCase(
            *(int(number) for number in shape.split("x")),
            *(hidden, teacher, options.repeats, options.threads, chunk_bytes),
        )
        for shape, hidden, teacher in product(options.shapes or SHAPES, options.hidden, options.teacher)
    ]


def run(options: argparse.Namespace) -> int:
    """Prints a table and the limits, writes `options.json`; returns 0 if all limits hold. options: of `loss.py`."""
    machine = (
        f"{processor()}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{machine}; Python {platform.python_version()}, {installed('torch')}")
    print(
        f"{'shape':>15} {'hidden':>6} {'teacher':>7} {'':>7} {'median s':>9} {'extra MiB':>10} {'error':>8}"
    )
    records, passed = [], True
    for case in cases(options):
        results = in_a_process(case)
        for name, result in results.items():
            print(
                f"{f'[{case.tokens}, {case.vocab}]':>15} {case.hidden:>6} {case.teacher:>7} {name:>7} "
                f"{median(result['seconds']):>9.2f} {result['extra_bytes'] / 2**20:>10.0f} {result['error']:>8.0e}"
            )
        reached = verdicts(results)
        for limit, (figure, fine) in reached.items():
            print(f"    {limit}: {figure:.3g} {'pass' if fine else 'FAIL'}", flush=True)
            passed &= fine
        records.append({"case": asdict(case), "results": results, "limits": reached})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "cases": records}, indent=1))
        print(f"written: {options.json}")
    return 0 if passed else 1
