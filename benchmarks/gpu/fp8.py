"""Compares FP8 through Transformer Engine with bfloat16, for a small teacher and student on one GPU.

    python -m benchmarks.gpu.fp8 [--training] [--json fp8.json]

Both models have the same bfloat16 parameters in all runs. In an FP8 run their linear layers multiply in FP8
(`fp8="hybrid"`) with one recipe; the output layer and the loss stay in bfloat16. Without --training the parameters do
not change, so that the runs differ only by FP8. With it the student learns for 30 steps, from the same micro-batches in
every run. The exit status is 1 if a recipe does not run, a loss or a gradient is not finite, or training does not
lower the loss. The difference between the losses is reported and does not change the exit status.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.models import Batch, Shape, build, forward_backward, forward_step, one_rank

# FP8 products need multiples of 16 in each dimension, tokens included; blocks have 128.
VOCAB, SEQUENCE, BATCH = 4096, 128, 2
STUDENT = Shape(2, 256, 512, 4, VOCAB, SEQUENCE, init_std=0.1)
TEACHER = Shape(2, 512, 1024, 8, VOCAB, SEQUENCE, init_std=0.1)
STEPS = 4  # delayed scaling has no maxima in its first step
STEPS_OF_TRAINING, MICRO_BATCHES, LEARNING_RATE = 30, 4, 1e-3
RECIPES = ("tensorwise", "blockwise", "delayed")  # of the student


def reason_to_skip() -> str | None:
    """Why FP8 cannot run on this machine; None if it can."""
    for module, name in (
        ("transformer_engine", "Transformer Engine"),
        ("megatron", "megatron-core"),
    ):
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable GPU"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return f"FP8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return None


def of_teacher(recipe: str | None) -> str | None:
    """The student's recipe, except for delayed scaling, which no teacher may have."""
    return "tensorwise" if recipe == "delayed" else recipe


class Masters:
    """Adam on float32 copies of the parameters: the change in one step is often too small for bfloat16."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._copies = [p.detach().float().clone() for p in self._parameters]
        self._optimizer = torch.optim.Adam(self._copies, lr=LEARNING_RATE)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        self._optimizer.step()
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            parameter.copy_(copy)


def measure(recipe: str | None, engine: bool = True, steps: int = STEPS, learn: bool = False) -> dict:
    """The loss per token of each step and the norm of the last gradient; the weights change only if `learn`.

    The parallel state of one process must exist. The teacher is in the same rank: `distill(forward_step, teacher=...)`.
    """
    from vcrd.megatron import DistillSettings, distill

    on_cpu = {} if engine else {"use_cpu_initialization": True}
    student = build(STUDENT, 1, recipe, engine, **on_cpu)
    teacher = build(TEACHER, 2, of_teacher(recipe), engine, **on_cpu)
    generator = torch.Generator().manual_seed(3)
    batches = [Batch.draw(STUDENT, BATCH, generator) for _ in range(MICRO_BATCHES if learn else 1)]
    plug = distill(forward_step, DistillSettings(), teacher=teacher)
    masters = Masters(student) if learn else None
    student.train()
    losses = []
    try:
        for number in range(steps):
            student.zero_grad(set_to_none=True)
            forward_backward(plug, student, batches[number % len(batches)])
            losses.append(plug.report.take().loss)
            if masters is not None:
                masters.step()
    finally:
        plug.close()
    norms = [p.grad.float().norm() for p in student.parameters() if p.grad is not None]
    return {"losses": losses, "gradient_norm": float(torch.stack(norms).norm())}


def train(recipe: str | None, engine: bool = True, steps: int = STEPS_OF_TRAINING) -> dict:
    return measure(recipe, engine, steps, learn=True)


def lowered(run: dict) -> bool:
    """Whether the loss fell: compares the first and last loss of each micro-batch."""
    losses = run["losses"]
    return sum(losses[-MICRO_BATCHES:]) < sum(losses[:MICRO_BATCHES])


def summary(bf16: dict, fp8: dict[str, dict | str]) -> dict:
    """The runs, their differences, and whether all values are finite. fp8: by recipe, a run or the error."""
    numbers, found = [*bf16["losses"], bf16["gradient_norm"]], {}
    for recipe, run in fp8.items():
        if isinstance(run, str):
            found[recipe] = {"error": run}
            continue
        first, second = bf16["losses"][-1], run["losses"][-1]
        numbers += [*run["losses"], run["gradient_norm"]]
        apart = {"loss_difference": second - first, "relative_difference": (second - first) / first}
        found[recipe] = {**run, **apart}
    ran = not any("error" in run for run in found.values())
    return {"passed": ran and all(map(math.isfinite, numbers)), "bf16": bf16, "fp8": found}


def lines(result: dict) -> str:
    """The printed lines."""
    if result["passed"] is None:
        return result["how"]

    def line(name: str, run: dict) -> str:
        if "error" in run:
            return f"{name}: {run['error']}"
        text = f"{name}: loss {run['losses'][-1]:.5f} nat per token, gradient norm {run['gradient_norm']:.4g}"
        apart = run.get("loss_difference")
        return text + (
            f", {apart:+.5f} nat, {100 * run['relative_difference']:+.2f} %" if apart is not None else ""
        )

    rows = [line("bf16", result["bf16"]), *(line(f"fp8 {name}", run) for name, run in result["fp8"].items())]
    if not result["passed"]:
        rows.append("a recipe did not run, gave a number that is not finite, or did not learn")
    return "\n".join(rows)


def tried(work: Callable[[str], dict], recipe: str) -> dict | str:
    """The result of `step`, or its error in one line: an unsupported recipe must not hide the others."""
    try:
        return work(recipe)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def run(training: bool = False) -> dict:
    """All runs on this GPU, or the reason why there are none."""
    reason = reason_to_skip()
    if reason is not None:
        return {"passed": None, "how": reason}
    work = train if training else measure
    with one_rank():
        result = summary(work(None), {recipe: tried(work, recipe) for recipe in RECIPES})
    if training:
        runs = [result["bf16"], *(run for run in result["fp8"].values() if "error" not in run)]
        result["passed"] = result["passed"] and all(map(lowered, runs))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--training", action="store_true", help=f"{STEPS_OF_TRAINING} steps that learn")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    result = run(options.training)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(lines(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
