"""A tiny pretraining script on megatron.training, as a user's: run by test_long_runs.py in processes of its own.

Appends a line of JSON per micro-batch to $LONG_RUN_RECORD, with the loss to the last bit, and one with the digest of
the weights at the end. $LONG_RUN_REJECT: the iteration whose losses the first run rejects, so that Megatron runs it
again; with $LONG_RUN_FATAL it then saves and exits, to run it once more when resumed. $LONG_RUN_TERMINATE: the
iteration in which the process sends itself SIGTERM. $LONG_RUN_NAN: that in which the student's loss becomes NaN.
$LONG_RUN_WANDB: a file for what a stand-in for W&B's writer is given. $LONG_RUN_DRAWS: generators that each sample is
drawn from. $LONG_RUN_LOADER: a folder where an external loader saves its own state.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy
import torch
from torch import Tensor

SEQUENCE, VOCAB = 12, 45


class Samples(torch.utils.data.Dataset):
    """Sample n is a function of n alone; about a third of its tokens is masked, so that counts differ."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self._seed + int(index))
        row = (torch.randint(VOCAB, (SEQUENCE + 1,), generator=generator) + drawn()) % VOCAB
        mask = (torch.rand(SEQUENCE, generator=generator) < torch.rand((), generator=generator)).float()
        mask[0] = 1.0
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(SEQUENCE),
        }


def drawn() -> int:
    """A number from the random state of the process, which a checkpoint saves."""
    draw = {
        "torch": lambda: int(torch.randint(VOCAB, ())),
        "numpy": lambda: int(numpy.random.randint(VOCAB)),
        "random": lambda: random.randrange(VOCAB),
    }
    return sum(draw[name]() for name in os.environ.get("LONG_RUN_DRAWS", "").split())


class Loader:
    """Micro-batches of two samples; as Energon's, in Megatron's examples, it saves its own state and restores it."""

    def __init__(self, samples: Samples, size: int) -> None:
        self._samples, self._state = samples, {"next": 0}
        self._size = size

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Tensor]:
        first, self._state["next"] = self._state["next"], self._state["next"] + self._size
        return torch.utils.data.default_collate([self._samples[first + n] for n in range(self._size)])

    def save_state(self) -> dict[str, int]:
        return self._state

    def restore(self, path: str) -> None:
        self._state = torch.load(path)["dataloader_state_dict"]


def datasets(counts: list[int], vp_stage: int | None = None) -> tuple:
    samples = tuple(Samples(count or 1, seed) for seed, count in enumerate(counts))
    if "LONG_RUN_LOADER" not in os.environ:
        return samples
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    args = get_args()
    loaders = tuple(Loader(each, args.micro_batch_size) for each in samples)
    name = "train_dataloader_dprank000.pt"
    path = get_checkpoint_name(args.dataloader_save, args.iteration, False, 0, 0, False, 0, basename=name)
    if args.iteration:
        loaders[0].restore(path)
    return loaders


datasets.is_distributed = True


def at(variable: str) -> bool:
    """Whether the iteration under way, counted from 1, is among those that the variable names."""
    from megatron.training import get_args

    return str(get_args().curr_iteration + 1) in os.environ.get(variable, "").split(",")


def loss_of(model: torch.nn.Module, mask: Tensor, losses: Tensor):
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    total, tokens = (losses.float() * mask).sum(), mask.sum().int()
    if model.training and at("LONG_RUN_NAN"):
        total = total * torch.nan
    machine = get_rerun_state_machine()
    if model.training and get_args().check_for_nan_in_loss_and_grad:
        machine.validate_result(
            result=total, rejection_func=torch.isnan, message="NaN in the loss", tolerance=0.0, fatal=True
        )
    if model.training:
        again = machine.state.name.startswith("RERUNNING")
        if os.environ.get("LONG_RUN_REJECT"):
            reject = at("LONG_RUN_REJECT")
            machine.validate_result(
                result=total,
                rejection_func=lambda _: reject,
                message="drill",
                tolerance=0.0,
                fatal="LONG_RUN_FATAL" in os.environ,
            )
        record(
            iteration=get_args().curr_iteration + 1, loss=float(total).hex(), tokens=int(tokens), again=again
        )
        if at("LONG_RUN_TERMINATE"):
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        record(evaluated=float(total).hex())
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def record(**line) -> None:
    with open(f"{os.environ['LONG_RUN_RECORD']}.{os.environ['RANK']}", "a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parents[2])]
    from vcrd.megatron import cpu

    stack = cpu.enable()  # held: it is undone when it is collected
    from megatron.core.datasets import utils
    from megatron.core.enums import ModelType
    from megatron.training import global_vars, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    import vcrd.megatron

    torch.set_num_threads(1)
    utils.compile_helpers = lambda: None  # of Megatron's own datasets, with a Makefile that the wheel lacks
    models = []

    def forward_step(data_iterator, model):
        models[:] = [model]
        batch = next(data_iterator)
        mask = batch["loss_mask"]
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask)
        return output, partial(loss_of, model, mask)

    if path := os.environ.get("LONG_RUN_WANDB"):
        writer = MagicMock()
        writer.log.side_effect = partial(keep, path)
        global_vars._set_wandb_writer = lambda args: setattr(global_vars, "_GLOBAL_WANDB_WRITER", writer)
    args = parse_and_validate_args()
    # Megatron's own arguments lack it, and its examples add it.
    args.dataloader_save = os.environ.get("LONG_RUN_LOADER")
    plug = vcrd.megatron.distill(forward_step)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        plug,
    )
    weights = hashlib.sha256()
    for name, tensor in sorted(vcrd.megatron.layout.unwrap(models[0]).named_parameters()):
        weights.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    record(weights=weights.hexdigest())
    plug.close()
    stack.close()


def keep(path: str, values: dict, step: int) -> None:
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **{key: float(value) for key, value in values.items()}}) + "\n")


if __name__ == "__main__":
    main()
