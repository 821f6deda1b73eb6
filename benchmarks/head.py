"""Times the fused head, forward and backward, beside the path that stores all logits, in one process; and its memory.

    python benchmarks/head.py [--shapes 4096x131072 ...] [--hidden 512] [--teacher dense|hidden] [--json head.json]

stored: logits = hidden @ weight.T, then vcrd.validity_calibrated_kl with its gradient over the logits, the cheaper of
its two ways. fused: vcrd.fused_validity_calibrated_kl; again: the same with gradient_in_forward=False. All from
float32 hidden states and weight to both gradients, for a mean over the tokens. Memory is the growth of the process's
peak (VmHWM) without the two gradients, which each path has to hand over.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import torch

from loss_measure import CpuMeter
from machine import installed, processor

SLOWEST, MOST_MEMORY, LARGEST_ERROR = 1.15, 1 / 8, 1e-5
STORED, FUSED, AGAIN = "stored", "fused", "again"


def methods(tokens: int, vocab: int, size: int, teacher: str) -> dict[str, Callable]:
    """By name, each () -> (loss [tokens], gradient of the hidden states, gradient of the weight)."""
    import vcrd

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, size, generator=generator).requires_grad_()
    weight = (3 / size**0.5 * torch.randn(vocab, size, generator=generator)).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator)
    if teacher == "dense":  # as the link's default payload brings them
        given = torch.empty(tokens, vocab, dtype=torch.float16)
        for rows in given.split(256):
            rows.copy_(3 * torch.randn(rows.shape, generator=generator))
    else:
        given = vcrd.HiddenStates(
            torch.randn(tokens, size, generator=generator),
            3 / size**0.5 * torch.randn(vocab, size, generator=generator),
        )

    def finish(loss: torch.Tensor) -> tuple:
        return (loss.detach(), *torch.autograd.grad(loss.mean(), (hidden, weight)))

    def stored() -> tuple:
        logits = hidden @ weight.T
        return finish(vcrd.validity_calibrated_kl(logits, given, labels, inplace_gradient=True).loss)

    def fused(in_forward: bool = True) -> tuple:
        out = vcrd.fused_validity_calibrated_kl(hidden, weight, given, labels, gradient_in_forward=in_forward)
        return finish(out.loss)

    return {STORED: stored, FUSED: fused, AGAIN: lambda: fused(in_forward=False)}


def measure(case: tuple[int, int, int, str], repeats: int, threads: int, sender) -> None:
    """In a process of its own: seconds of each run, extra bytes at the peak, errors against `stored`."""
    torch.set_num_threads(threads)
    tokens, vocab, size, _ = case
    ready, meter, truth, results = methods(*case), CpuMeter(), None, {}
    for name, run in ready.items():
        meter.start()
        found = run()
        gradients = 4 * size * (tokens + vocab)
        results[name] = {"extra_bytes": meter.extra_bytes() - gradients, "seconds": []}
        truth = truth or found
        pairs = zip(found, truth, strict=True)
        results[name]["error"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        del found, pairs
    del truth
    for _ in range(repeats):  # in turn, so that a slow moment of the machine meets all
        for name, run in ready.items():
            gc.collect()
            start = time.perf_counter()
            run()
            results[name]["seconds"].append(time.perf_counter() - start)
    sender.send(results)


def in_a_process(case: tuple[int, int, int, str], repeats: int, threads: int) -> dict[str, dict]:
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(case, repeats, threads, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"the measurement of {case} failed; its message is above") from error
    finally:
        process.join()


def verdicts(results: dict[str, dict]) -> dict[str, tuple[float, bool]]:
    """What the fused head reached of each bar, and whether that passes."""
    stored, fused = results[STORED], results[FUSED]
    slower = median(fused["seconds"]) / median(stored["seconds"])
    memory = fused["extra_bytes"] / stored["extra_bytes"]
    return {
        f"time <= {SLOWEST} of stored": (slower, slower <= SLOWEST),
        "memory <= 1/8 of stored": (memory, memory <= MOST_MEMORY),
        f"error <= {LARGEST_ERROR}": (fused["error"], fused["error"] <= LARGEST_ERROR),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x131072"], metavar="TOKENSxVOCAB")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--teacher", nargs="+", choices=["dense", "hidden"], default=["dense", "hidden"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}; Python {platform.python_version()}, {installed('torch')}")
    print(
        f"{'shape':>15} {'hidden':>6} {'teacher':>7} {'':>7} {'median s':>9} {'extra MiB':>10} {'error':>8}"
    )
    records, passed = [], True
    for shape in options.shapes:
        tokens, vocab = (int(number) for number in shape.split("x"))
        for teacher in options.teacher:
            results = in_a_process((tokens, vocab, options.hidden, teacher), options.repeats, options.threads)
            for name, result in results.items():
                print(
                    f"{f'[{tokens}, {vocab}]':>15} {options.hidden:>6} {teacher:>7} {name:>7} "
                    f"{median(result['seconds']):>9.2f} {result['extra_bytes'] / 2**20:>10.0f} {result['error']:>8.0e}"
                )
            for bar, (reached, fine) in verdicts(results).items():
                print(f"    {bar}: {reached:.3g} {'pass' if fine else 'FAIL'}", flush=True)
                passed &= fine
            records.append({"shape": shape, "hidden": options.hidden, "teacher": teacher, "results": results})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "cases": records}, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
