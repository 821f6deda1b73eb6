"""Compares Megatron with sequence and context parallelism with one rank: losses and gradients of the plug.

    python -m benchmarks.gpu.parallel [--json parallel.json]
    python -m benchmarks.gpu.parallel --device cpu

Four NCCL ranks on one GPU (ranks.py) train a student with Transformer Engine's layers, three steps from the same
weights in each layout of CASES. The teacher is either in the student's ranks, or a separate job of one rank that is
connected by the link. Another process trains the same student alone. The losses, metrics, gradient norms and gradients
of the four ranks must equal those of this process within LIMITS. Otherwise the exit status is 1.

On the CPU the ranks use gloo and float32 parameters. Megatron's local layers are used, with a norm and an attention
that replace those of Transformer Engine (cpu_layers.py). The single rank uses Megatron's own norm and attention.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu.models import Shape, build
from benchmarks.gpu.ranks import run_together

SECONDS = 85  # limit for all processes
RANKS, STEPS, MICRO_BATCHES, ROWS = 4, 3, 4, 2  # MICRO_BATCHES: of a step, over all data ranks
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Case:
    """A layout of the student. Tensor implies sequence parallelism; data parallelism takes the other ranks."""

    name: str
    tensor: int = 1
    context: int = 1
    linked: bool = True
    fused_head: str = "off"


ALONE = Case("one-rank", linked=False)
CASES = (
    Case("tensor-2", tensor=2),
    Case("context-2", context=2),
    Case("tensor-2-context-2-same-ranks", tensor=2, context=2, linked=False),
    Case("tensor-2-context-2-fused-head", tensor=2, context=2, fused_head="on"),
)


@dataclass(frozen=True)
class Trial:
    """Settings of all processes. true_vocab: columns that are no padding. folder: for their files."""

    folder: Path
    student: Shape
    teacher: Shape
    true_vocab: int
    dtype: torch.dtype
    engine: bool  # Transformer Engine's layers


def trial(device: str, folder: Path) -> Trial:
    if device == "cpu":
        student = Shape(2, 32, 64, 4, vocab=96, sequence=16, groups=2)
        return Trial(folder, student, Shape(2, 48, 96, 6, 96, 16), 91, torch.float32, False)
    # Transformer Engine splits attention over context ranks only in 16 bits, in pieces of whole tiles.
    student = Shape(2, 256, 512, 4, vocab=4096, sequence=512, groups=2)
    return Trial(folder, student, Shape(2, 512, 1024, 8, 4096, 512), 4000, torch.bfloat16, True)


# Relative differences: of loss, metrics and gradient norm of each step; and of a gradient, relative to its norm.
# Measured on the CPU: 4e-7 and 2.6e-6; in bfloat16, with the shapes of a GPU, 7e-4 and 0.034, which is rounding.
LIMITS = {torch.float32: (5e-6, 3e-5), torch.bfloat16: (3e-3, 0.1)}


def part_of(whole: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """The part of a tensor rank, if the parameter is sharded along this dimension or not at all."""
    return whole if dim is None else whole.chunk(size, dim)[rank]


def cut_of(parameter: nn.Parameter) -> int | None:
    """The dimension along which Megatron and Transformer Engine shard a parameter over tensor ranks."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


@torch.no_grad()
def fill(model: nn.Module, seed: int, rank: int, size: int) -> None:
    """Sets weights that depend only on their names and the seed; each tensor rank takes its part."""
    for name, parameter in model.named_parameters():
        dim, shape = cut_of(parameter), list(parameter.shape)
        if dim is not None:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        whole = torch.randn(shape, generator=generator)
        whole = 1 + 0.1 * whole if len(shape) == 1 else 1.5 * shape[-1] ** -0.5 * whole
        parameter.copy_(part_of(whole, dim, rank, size))


def model_of(shape: Shape, seed: int, case: Case, trial: Trial) -> nn.Module:
    """The part of the model on this rank. Megatron's parallel state must have the layout of the case."""
    from megatron.core import parallel_state

    settings: dict[str, Any] = dict(
        tensor_model_parallel_size=case.tensor,
        sequence_parallel=case.tensor > 1,
        context_parallel_size=case.context,
        calculate_per_token_loss=True,  # without it Megatron takes a mean of means over the context ranks
    )
    if not trial.engine:
        settings["use_cpu_initialization"] = True
        if case is not ALONE:
            from cpu_layers import standing_in

            settings["layers"] = standing_in(shape.layers)
    model = build(shape, seed, None, trial.engine, trial.dtype, **settings)
    fill(model, seed, parallel_state.get_tensor_model_parallel_rank(), case.tensor)
    return model


def micro_batches(trial: Trial, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of all data ranks, tensors [b, s], with different numbers of tokens that count."""
    generator = torch.Generator().manual_seed(step)
    size = (ROWS, trial.student.sequence)
    return [
        {
            "tokens": torch.randint(trial.true_vocab, size, generator=generator).cuda(),
            "labels": torch.randint(trial.true_vocab, size, generator=generator).cuda(),
            "loss_mask": (torch.rand(size, generator=generator) < 0.3 + 0.15 * number).float().cuda(),
        }
        for number in range(MICRO_BATCHES)
    ]


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple:
    """As in Megatron's script: draws whole sequences and keeps the part of this context rank."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    given: dict[str, Any] = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in known:  # megatron-core 0.19 requires this argument
        given["is_hybrid_cp"] = False
    batch = dict(next(data_iterator))
    batch["positions"] = torch.arange(batch["tokens"].shape[1]).cuda().expand_as(batch["tokens"])
    batch = get_batch_on_this_cp_rank(batch, **given)
    mask = batch["loss_mask"]
    losses = model(batch["tokens"], batch["positions"], None, labels=batch["labels"], loss_mask=mask)

    def loss_func(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (losses.float() * mask).sum()
        return total, mask.sum().int(), {"loss": torch.stack([total.detach(), mask.sum()])}

    return losses, loss_func


def settings_of(case: Case, trial: Trial) -> Any:
    from vcrd.megatron import DistillSettings

    return DistillSettings(vocab_size=trial.true_vocab, fused_head=case.fused_head).replaced(
        address=f"file:{trial.folder}/{case.name}.address",
        name=case.name,
        payload="float32",
        timeout=60,
        connect_timeout=SECONDS,
    )


def train(case: Case, trial: Trial) -> None:
    """Trains three steps and writes the results to the folder. The default group must exist."""
    from megatron.core import parallel_state

    from vcrd.megatron import distill

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        case.tensor, context_parallel_size=case.context, create_gloo_process_groups=False
    )
    teacher = None if case.linked else model_of(trial.teacher, 2, case, trial)
    student = Student(model_of(trial.student, 1, case, trial), trial)
    plug = distill(forward_step, settings_of(case, trial), teacher=teacher)
    try:
        steps = [student.step(plug, number) for number in range(STEPS)]
    finally:
        plug.close()
    rank = parallel_state.get_tensor_model_parallel_rank()
    found = {"steps": steps, "cuts": student.cuts, "tensor_rank": rank}
    path = trial.folder / f"{case.name}.{dist.get_rank()}.found"
    torch.save(found, path.with_suffix(".draft"))
    path.with_suffix(".draft").rename(path)  # an atomic rename, because the process may be killed


class Student:
    """A model with Megatron's data-parallel wrapper and optimizer."""

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        half = trial.dtype == torch.bfloat16
        inner = model.module if half else model
        inner.config.finalize_model_grads_func = finalize_model_grads
        self._trial = trial
        self._parameters = dict(inner.named_parameters())
        self.cuts = {name: cut_of(parameter) for name, parameter in self._parameters.items()}
        self._model = DistributedDataParallel(
            inner.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
        )
        # Not Adam: it turns a gradient of only rounding errors into a step of full size.
        options = OptimizerConfig(
            optimizer="sgd",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            clip_grad=1e6,
            bf16=half,
            params_dtype=trial.dtype,
        )
        self._optimizer = get_megatron_optimizer(options, [self._model], use_gloo_process_groups=False)
        self._data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._model.train()

    def step(self, plug: Any, number: int) -> dict:
        """The loss of the script's loss_func, the metrics of the plug, the norm, and all gradients."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        rank, size = self._data
        mine = micro_batches(self._trial, number)[rank::size]
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iter(mine),
            model=self._model,
            num_microbatches=len(mine),
            seq_length=self._trial.student.sequence,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        total = torch.stack([report["loss"] for report in reports]).sum(0)
        dist.all_reduce(total, group=self._group)
        gradients = {name: p.main_grad.float().cpu() for name, p in self._parameters.items()}
        _, norm, _ = self._optimizer.step()
        return {
            "loss": float(total[0] / total[1]),
            "figure": plug.report.take(self._group).loss,
            "norm": float(norm),
            "gradients": gradients,
        }


def students(trial: Trial) -> None:
    for case in CASES:
        begun = time.monotonic()
        train(case, trial)
        if dist.get_rank() == 0:
            print(f"{case.name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)


def alone(trial: Trial) -> None:
    train(ALONE, trial)


def serve_all(trial: Trial) -> None:
    """The teacher job: one rank that serves the student of each layout, one after the other."""
    from megatron.core import parallel_state

    from vcrd.megatron import serve

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model = model_of(trial.teacher, 2, ALONE, trial)
    for case in CASES:
        if case.linked:
            serve(model, settings_of(case, trial))


def differences(case: Case, trial: Trial) -> dict:
    """The largest relative differences of any rank and step; "error" if the case did not end."""
    paths = [trial.folder / f"{case.name}.{rank}.found" for rank in range(RANKS)]
    if not all(path.exists() for path in paths):
        return {"passed": False, "error": "did not end"}
    of_sums, of_gradients = LIMITS[trial.dtype]
    expected = torch.load(trial.folder / f"{ALONE.name}.0.found", weights_only=True)["steps"]
    apart, worst = dict.fromkeys(("loss", "figure", "norm"), 0.0), (0.0, "")

    def larger(difference: float, before: float) -> float:
        return max(before, difference) if math.isfinite(difference) else math.inf

    for path in paths:
        found = torch.load(path, weights_only=True)
        for number, (got, wanted) in enumerate(zip(found["steps"], expected, strict=True)):
            for key, before in apart.items():
                apart[key] = larger(abs(got[key] / wanted[key] - 1), before)
            for name, gradient in got["gradients"].items():
                whole = wanted["gradients"][name]
                mine = part_of(whole, found["cuts"][name], found["tensor_rank"], case.tensor)
                difference = larger(float((gradient - mine).norm() / mine.norm()), 0.0)
                worst = max(worst, (difference, f"{name}, step {number}"))
    return {
        "passed": max(apart.values()) <= of_sums and worst[0] <= of_gradients,
        "losses": [step["loss"] for step in found["steps"]],
        **apart,
        "gradient": worst[0],
        "of the gradient of": worst[1],
    }


def compared(trial: Trial) -> dict:
    """Compares each case with one rank."""
    path = trial.folder / f"{ALONE.name}.0.found"
    if not path.exists():
        return {"passed": False, "error": "one rank did not end"}
    expected = torch.load(path, weights_only=True)["steps"]
    cases = {case.name: differences(case, trial) for case in CASES}
    return {
        "passed": all(found["passed"] for found in cases.values()),
        "limits": dict(zip(("losses, figures and norms", "gradients"), LIMITS[trial.dtype], strict=True)),
        "one rank": {key: [step[key] for step in expected] for key in ("loss", "norm")},
        "cases": cases,
    }


JOBS = {"alone": (alone, 1), "teacher": (serve_all, 1), "student": (students, RANKS)}


def be(job: str, rank: int, trial: Trial, device: str) -> None:
    """Runs this rank of a job."""
    # Megatron requires this with tensor parallelism.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    work, size = JOBS[job]
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            from vcrd.megatron.cpu import on_cpu

            torch.set_num_threads(1)
            stack.enter_context(on_cpu())
        else:
            torch.cuda.set_device(0)
        backend = "gloo" if device == "cpu" else "nccl"
        store = f"file://{trial.folder}/{job}.store"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
        stack.callback(dist.destroy_process_group)
        work(trial)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--job", choices=list(JOBS), help="this is one of the processes")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for the files of all processes")
    given = parser.parse_args()
    if given.job is not None:
        be(given.job, given.rank, trial(given.device, given.folder), given.device)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        common = ["-m", "benchmarks.gpu.parallel", "--device", given.device, "--folder", folder]
        error = run_together(
            {
                f"{job}{rank}": [*common, "--job", job, "--rank", str(rank)]
                for job, (_, size) in JOBS.items()
                for rank in range(size)
            },
            SECONDS,
        )
        result = compared(trial(given.device, Path(folder)))
    if error:
        result |= {"passed": False, "how": error}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
