"""The student job: a shallower SmolLM2 over its tensor ranks, trained with Megatron's schedule and optimizer.

The only line for distillation is `forward_step = distill(forward_step)`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

import vcrd
from vcrd.megatron import distill

from . import data, held_out, source
from .convert import load
from .model import Shape, build, configure, in_its_dtype
from .settings import KEPT_LAYERS, DemoSettings


def run(settings: DemoSettings) -> None:
    """Evaluates, trains and evaluates again. Rank 0 reports to the launcher and writes the results."""
    tell = _teller(settings, speaks=dist.get_rank() == 0)
    model, optimizer, schedule = set_up(settings)
    plug = distill(forward_step, settings.distill(), tokenizer=source.tokenizer(Path(settings.cache)))
    train, held = data.split(source.problems(Path(settings.cache)))
    held = held[:: max(1, len(held) // settings.held_out)][: settings.held_out]
    evaluation = data.held_out_batches(held, settings.micro_batch_size, settings.sequence_length)
    if dist.get_rank() == 0:
        arguments = plug.settings.loss_arguments()
        method = json.dumps(arguments | vcrd.LossConfig(**arguments).weight_map._asdict())
        (settings.folder / "logs" / "method.json").write_text(method)
    tell("measuring", stage="before")
    before = held_out.measure(plug, model, evaluation, run_schedule)
    tell("measured", stage="before", figures=asdict(before.figures))
    steps = list(
        data.training_steps(
            train,
            settings.steps,
            settings.micro_batches,
            settings.micro_batch_size,
            settings.sequence_length,
            settings.seed,
        )
    )
    micro_batches = (batch for step in steps for batch in step)
    for number, step in enumerate(steps):
        begun = time.perf_counter()
        train_step(plug, model, optimizer, schedule, micro_batches, step)
        seconds = time.perf_counter() - begun
        tokens = sum(batch["tokens"].numel() for batch in step)
        figures = plug.report.take()
        if dist.get_rank() == 0:
            plug.record(number + 1, figures)
        tell("step", number=number, seconds=seconds, fed=tokens, figures=asdict(figures))
    tell("measuring", stage="after")
    after = held_out.measure(plug, model, evaluation, run_schedule)
    tell("measured", stage="after", figures=asdict(after.figures))
    plug.close()
    if dist.get_rank() == 0:
        held_out.save(settings.folder / "logs" / "held_out.json", before, after)


def forward_step(data_iterator: Iterator[dict], model: Any) -> tuple[Any, Callable]:
    """The forward step of a Megatron script: draws a batch, calls the model, returns loss_func."""
    batch = {name: tensor.cuda() for name, tensor in next(data_iterator).items()}
    positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device).expand_as(
        batch["tokens"]
    )
    losses = model(batch["tokens"], positions, None, labels=batch["labels"], loss_mask=batch["loss_mask"])

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        mask = batch["loss_mask"]
        return (losses * mask).sum(), mask.sum().int(), {}

    return losses, loss_func


def set_up(settings: DemoSettings) -> tuple[Any, Any, Any]:
    """(model in Megatron's data-parallel wrapper, Megatron optimizer, learning-rate schedule)."""
    cache = Path(settings.cache)
    shape = Shape.load(cache / "shape.json")
    model = build(shape, configure(shape, len(KEPT_LAYERS), settings.dtype), settings.sequence_length)
    with source.weights(cache) as fetch:
        load(model, fetch, shape, KEPT_LAYERS)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), in_its_dtype(model)
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            bf16=settings.bfloat16,
            params_dtype=settings.dtype,
            lr=settings.learning_rate,
            min_lr=0.1 * settings.learning_rate,
            weight_decay=0.0,
            adam_beta2=0.98,
            clip_grad=1.0,
        ),
        [wrapped],
    )
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=0.1 * settings.learning_rate,
        lr_warmup_steps=min(4, settings.steps // 2),
        lr_decay_steps=settings.steps,
        lr_decay_style="cosine",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return wrapped, optimizer, schedule


def train_step(
    plug: Callable, model: Any, optimizer: Any, schedule: Any, micro_batches: Iterator[dict], step: list[dict]
) -> None:
    """Runs one optimizer step over the micro-batches of `step`, drawn from `micro_batches`."""
    model.train()
    model.zero_grad_buffer()
    optimizer.zero_grad()
    schedule.step(increment=1)
    run_schedule(plug, model, micro_batches, len(step), forward_only=False)
    optimizer.step()


def run_schedule(
    plug: Callable, model: Any, micro_batches: Iterator[dict], count: int, forward_only: bool
) -> None:
    """Runs Megatron's forward and backward over `count` micro-batches."""
    get_forward_backward_func()(
        forward_step_func=plug,
        data_iterator=micro_batches,
        model=[model],
        num_microbatches=count,
        # Without pipeline stages no rank receives activations, so their shape may differ per micro-batch.
        seq_length=0,
        micro_batch_size=0,
        forward_only=forward_only,
    )


def _teller(settings: DemoSettings, speaks: bool) -> Callable[..., None]:
    """Writes events as lines of JSON to logs/events.jsonl, which the launcher reads."""

    def tell(event: str, **content: Any) -> None:
        if speaks:
            with open(settings.folder / "logs" / "events.jsonl", "a") as file:
                file.write(json.dumps({"event": event, "time": time.time(), **content}) + "\n")

    return tell
