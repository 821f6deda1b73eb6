"""A Megatron GPT model with its optimizer, updated by Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from examples.demo.model import Shape, build, configure
from examples.on_policy.problems import LENGTH
from examples.verified.arithmetic import SYMBOLS

VOCAB = len(SYMBOLS)


def shape(layers: int, hidden: int, heads: int) -> Shape:
    padded = -(-VOCAB // 4) * 4  # for up to four tensor ranks
    return Shape(layers, hidden, 4 * hidden, heads, heads, hidden // heads, padded, 1e-5, 1e4)


class Learner:
    """This rank's part of a model with random weights, in Megatron's data-parallel wrapper, and its optimizer.

    The learning rate rises to `rate` over the first tenth of the updates, then falls to a tenth of it along a cosine.
    longest: tokens of the longest row.
    """

    def __init__(self, shape: Shape, seed: int, rate: float, updates: int, longest: int = LENGTH) -> None:
        # Weights of a tensor shard are cut from the whole, so the ranks of a stage share a seed, and stages do not.
        torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        config = replace(configure(shape, shape.layers), perform_initialization=True)
        config.calculate_per_token_loss = True  # samples differ in length, and each token counts the same
        # The teacher's hidden states travel between the stages beside the student's (vcrd.megatron.ColocatedTeacher).
        config.variable_seq_lengths = True
        config.finalize_model_grads_func = finalize_model_grads
        part = build(shape, config, longest + 1)
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(), part)
        options = OptimizerConfig(
            optimizer="adam",
            lr=rate,
            min_lr=0.1 * rate,
            weight_decay=0.0,
            adam_beta2=0.98,
            clip_grad=1.0,
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=rate,
            min_lr=0.1 * rate,
            lr_warmup_steps=updates // 10,
            lr_decay_steps=updates,
            lr_decay_style="cosine",
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def update(self, forward_step: Callable, micro_batches: Iterator[dict], count: int) -> None:
        """One update from `count` micro-batches, by Megatron's schedule."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule.step(increment=1)
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=micro_batches,
            model=[self.model],
            num_microbatches=count,
            seq_length=LENGTH,
            micro_batch_size=1,  # not read: with variable_seq_lengths the stages tell each other the shape
            forward_only=False,
        )
        self.optimizer.step()


def forward_step(data_iterator: Iterator[dict], model: Any) -> tuple[Any, Callable]:
    """The forward step of a Megatron script: draws a micro-batch, calls the model, returns loss_func."""
    batch = next(data_iterator)
    mask = batch["loss_mask"]
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    losses = model(batch["tokens"], positions, None, labels=batch["labels"], loss_mask=mask)

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        return (losses * mask).sum(), mask.sum().int(), {}

    return losses, loss_func
