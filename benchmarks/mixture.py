"""Compares a mixture of teachers with one teacher, forward and backward, in one process: median ms and ratios.

    python benchmarks/mixture.py [--shape 512x49152] [--teachers 2] [--repeats 7] [--device cuda]

one: a single dense teacher. mixture: `vcrd.MixedLogits`. dense first: torch stores the mixture as one float16 tensor of
log-probabilities, by operations on whole tensors, and that is then the single dense teacher. All read float16 logits,
and the student's logits are bfloat16. The methods alternate. Gradients of the last two are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

import vcrd


def methods(teachers: list[Tensor]) -> dict[str, Callable[[], vcrd.TeacherLogits]]:
    count = len(teachers)

    def dense_first() -> vcrd.DenseLogits:
        shares = [one.float().log_softmax(-1) for one in teachers]
        return vcrd.DenseLogits(reduce(torch.logaddexp, shares).half())

    return {
        "one": lambda: vcrd.DenseLogits(teachers[0]),
        "mixture": lambda: vcrd.MixedLogits(tuple(map(vcrd.DenseLogits, teachers)), (1.0,) * count),
        "dense first": dense_first,
    }


def step(student: Tensor, teacher: Callable[[], vcrd.TeacherLogits]) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    wait(student)
    started = time.perf_counter()
    loss = vcrd.validity_calibrated_kl(leaf, teacher(), validity="confidence").loss.sum()
    loss.backward()
    wait(student)
    return time.perf_counter() - started, leaf.grad


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="512x49152")
    parser.add_argument("--teachers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    shape = [int(size) for size in options.shape.split("x")]
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype) -> Tensor:
        return (3 * torch.randn(shape, generator=generator)).to(options.device, dtype)

    student, teachers = draw(torch.bfloat16), [draw(torch.float16) for _ in range(options.teachers)]
    each = methods(teachers)
    seconds: dict[str, list[float]] = {name: [] for name in each}
    gradients = {}
    for repeat in range(options.repeats + 1):
        for name, teacher in each.items():
            taken, gradients[name] = step(student, teacher)
            if repeat:  # the first run allocates memory
                seconds[name].append(taken)
    one = median(seconds["one"])
    print(f"{options.shape}, {options.teachers} teachers, {options.repeats} repeats, {options.device}")
    for name, times in seconds.items():
        print(f"{name:>12} {1e3 * median(times):9.1f} ms   {median(times) / one:5.2f} of one teacher")
    error = (gradients["mixture"].float() - gradients["dense first"].float()).abs().max()
    print(f"largest difference of the gradients of mixture and dense first: {float(error):.1e}")


if __name__ == "__main__":
    main()
