"""The micro-batches of a training on megatron.training, without the training: for filling a cache (docs/cache.md)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.training import get_args
from megatron.training.training import build_train_valid_test_data_iterators, update_train_iters

import vcrd.megatron
from vcrd.megatron import DistillSettings


def micro_batches_of(datasets: Callable[..., tuple]) -> Iterator[Any] | None:
    """The micro-batches that this rank's data iterator yields in all iterations of the arguments (--train-iters or
    --train-samples), from the first one on; None on ranks without an iterator. Collective, after `initialize_megatron`.

    datasets: the provider that the script gives to `pretrain`.
    """
    args = get_args()
    if not (args.train_iters or args.train_samples):
        raise ValueError("--train-iters: expected how many iterations draw from the data, got none")
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
    update_train_iters(args)
    iterator, _, _ = build_train_valid_test_data_iterators(datasets)
    return None if iterator is None else _drawn(iterator, args.train_iters)


def _drawn(iterator: Iterator[Any], iterations: int) -> Iterator[Any]:
    consumed = 0
    for _ in range(iterations):
        update_num_microbatches(consumed, consistency_check=False)
        for _ in range(get_num_microbatches()):
            yield next(iterator)
        consumed += get_current_global_batch_size()


def fill_by_link(folder: str, datasets: Callable[..., tuple], settings: DistillSettings) -> None:
    """Asks the served teacher about all micro-batches of the training. The first rank of each data-parallel replica
    draws them and writes; the other ranks have nothing to do."""
    micro_batches = micro_batches_of(datasets)
    draws = mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
    if not (draws and mpu.is_pipeline_first_stage(ignore_virtual=True)):
        return
    if get_args().exit_signal_handler:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the fill writes what has arrived
    filled = vcrd.megatron.fill_cache_by_link(
        micro_batches,
        folder,
        settings.replaced(sequence_length=settings.sequence_length or get_args().max_position_embeddings),
        group=mpu.get_data_parallel_group(),
        report=say,
    )
    if torch.distributed.get_rank() == 0:
        print(f"{folder}: {filled}", flush=True)


def say(filled: Any) -> None:
    """Prints the progress of the first rank."""
    if torch.distributed.get_rank() == 0:
        print(filled, flush=True)
