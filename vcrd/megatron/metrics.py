"""The figures in Megatron's own log, TensorBoard and W&B: sums over tokens, of all ranks and the whole interval."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from vcrd.megatron.report import Figures, Report

_log = logging.getLogger("vcrd")
QUANTILES = (10, 50, 90)
# Of each step, beside Megatron's own "lm loss": key of its report, and field of the figures.
STEP_KEYS = {
    "vcrd divergence": "divergence",
    "vcrd cross entropy": "cross_entropy",
    "vcrd weight": "weight",
}


def megatron_globals() -> Any:
    """`megatron.training.global_vars` where a script uses it and has set it up, else None."""
    module = sys.modules.get("megatron.training.global_vars")
    return module if module is not None and getattr(module, "_GLOBAL_ARGS", None) is not None else None


def with_step_sums(loss_func: Callable[..., Any], sums: dict[str, Tensor]) -> Callable[..., Any]:
    """A script's `loss_func` whose report has `sums` too, pairs [sum over tokens, tokens].

    Megatron adds up such pairs over micro-batches and over data- and context-parallel ranks before it divides, and
    shows them in its log line, in TensorBoard and in W&B. Returns of (loss, report) and (loss, tokens, report) are
    extended; any other is left alone.
    """

    def reporting(*args: Any, **kwargs: Any) -> Any:
        found = loss_func(*args, **kwargs)
        if isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[-1], dict):
            return (*found[:-1], {**found[-1], **sums})
        return found

    return reporting


class IntervalLog:
    """Every --log-interval iterations the figures of all of them, on ranks of the last stage.

    Does nothing without `megatron.training`. Collectives, once per interval: `Report.take` over the data-parallel group
    with context parallelism, and two all-reduces of one number over this group and over the tensor group.
    """

    def write(self, report: Report) -> None:
        """At the end of a step, on every rank of the last stage; takes the report where the interval ends here."""
        found = megatron_globals()
        if found is None:
            return
        args = found.get_args()
        iteration = args.curr_iteration + 1
        if iteration % args.log_interval:
            return
        data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        figures = report.take(data_group)
        values = scalars(figures, *_over_last_stage(figures, data_group))
        if dist.get_rank() != dist.get_world_size() - 1:
            return  # Megatron's writers, and its log line, are the last rank's
        if figures.bad_rows:
            _log.warning(
                "%d tokens up to iteration %d were skipped, for their teacher was no distribution",
                figures.bad_rows,
                iteration,
            )
        text = " | ".join(f"{name.replace('_', ' ')}: {value:.6g}" for name, value in values.items())
        print(f" [vcrd] iteration {iteration:8d}/{args.train_iters:8d} | {text} |", flush=True)
        writer, wandb = found.get_tensorboard_writer(), found.get_wandb_writer()
        tagged = {f"vcrd/{name}": value for name, value in values.items()}
        if writer is not None:
            for name, value in tagged.items():
                writer.add_scalar(name, value, iteration)
        if wandb is not None:
            wandb.log(tagged, iteration)


def scalars(figures: Figures, wait: float, received: float) -> dict[str, float]:
    """What is written of the figures, by name. wait: seconds, of the rank that waited longest. received: bytes."""
    names = ("tokens", "loss", "divergence", "cross_entropy", "weight")
    values = {name: float(getattr(figures, name)) for name in names}
    for percent in QUANTILES:
        values[f"weight_p{percent}"] = figures.weight_quantile(percent / 100)
    for name in ("student_more_valid", "agreement", "bad_rows", "verifier_time"):
        values[name] = float(getattr(figures, name))
    return {**values, "teacher_wait": wait, "link_bytes": received}


def _over_last_stage(figures: Figures, data_group: dist.ProcessGroup) -> tuple[float, float]:
    """The longest wait of a rank, in seconds, and the payload bytes that reached all of them."""
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    device = "cuda" if "nccl" in dist.get_backend(data_group) else "cpu"
    wait = torch.tensor([figures.teacher_wait], dtype=torch.float64, device=device)
    received = torch.tensor([figures.link_bytes], dtype=torch.float64, device=device)
    for group in (data_group, tensor_group):
        dist.all_reduce(wait, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(received, group=group)
    return float(wait), float(received)
