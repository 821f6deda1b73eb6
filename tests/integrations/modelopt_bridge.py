"""A rank that trains twice in Megatron-Bridge: by its `distill()` with `attach`, and by vcrd's plug.

    python modelopt_bridge.py FOLDER RANK SIZE PORT [PORT]

Writes what each way has logged and the student's weights to FOLDER/WAY-RANK.pt. Each way runs in a fork, because the
import takes ten seconds and Bridge keeps state of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcrd import LossConfig
from vcrd.megatron import cpu

COLUMNS, TRUE_VOCAB, SEQUENCE, STEPS = 128, 127, 16, 3
OPTIONS = {"divergence": "jsd", "ce_weight": 0.1, "vocab_size": TRUE_VOCAB}
WAYS = ("distill", "plug")


class Samples(torch.utils.data.Dataset):
    """Random tokens, half of which do not count."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(TRUE_VOCAB, (SEQUENCE + 1,), generator=generator)
        mask = (torch.rand(SEQUENCE, generator=generator) < 0.5).float()
        positions = torch.arange(SEQUENCE)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": positions}


def provider(hidden_size: int, tensor_size: int) -> Any:
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    found = GPTModelProvider(
        num_layers=2,
        hidden_size=hidden_size,
        num_attention_heads=4,
        # Bridge would compute these for the student alone, and give the teacher the same values.
        num_query_groups=4,
        kv_channels=8,
        ffn_hidden_size=32,
        seq_length=SEQUENCE,
        vocab_size=COLUMNS,
        should_pad_vocab=False,
        tensor_model_parallel_size=tensor_size,
        transformer_layer_spec=local_layer_spec,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        position_embedding_type="rope",
        normalization="RMSNorm",
        add_bias_linear=False,
        calculate_per_token_loss=True,
    )
    found.register_pre_wrap_hook(functools.partial(fill, hidden_size))
    return found


def fill(seed: int, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The same weights whichever way the model is made."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in chunks[0].named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.1 * drawn if "norm" in name else 0.3 * drawn)
    return chunks


def configuration(student: Any) -> Any:
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.training import config as bridge

    @dataclass
    class Data(DatasetProvider):
        seq_length: int = SEQUENCE

        def build_datasets(self, context: Any) -> tuple:
            counts = (context.train_samples, context.valid_samples, context.test_samples)
            return tuple(Samples(count) for count in counts)

    return bridge.ConfigContainer(
        model=student,
        train=bridge.TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=2),
        validation=bridge.ValidationConfig(eval_interval=0, eval_iters=0),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=3e-3, min_lr=3e-3, use_distributed_optimizer=False
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=0, start_weight_decay=0.0, end_weight_decay=0.0
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=False, average_in_collective=False
        ),
        dataset=Data(dataloader_type="single", num_workers=0, persistent_workers=False),
        logger=bridge.LoggerConfig(log_interval=1, tensorboard_dir=None),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=TRUE_VOCAB),
        checkpoint=bridge.CheckpointConfig(save=None, async_save=False),
        rng=bridge.RNGConfig(seed=1),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
    )


def train(way: str, folder: Path, rank: int, size: int, port: int) -> None:
    from megatron.bridge.models.distillation_provider import convert_to_distillation_provider
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step, forward_step_modelopt
    from megatron.bridge.training.post_training.distillation import ModelOptDistillConfig
    from megatron.bridge.training.pretrain import pretrain

    from vcrd.integrations.modelopt import attach
    from vcrd.megatron import DistillSettings, distill

    os.environ.update(
        RANK=f"{rank}",
        WORLD_SIZE=f"{size}",
        LOCAL_RANK=f"{rank}",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=f"{port}",
    )
    steps: list[dict[str, float]] = []
    models: list[torch.nn.Module] = []

    class Watch(Callback):
        def on_train_step_end(self, context: Any) -> None:
            losses = {name: float(value) for name, value in context.loss_dict.items()}
            steps.append({**losses, "grad norm": float(context.grad_norm)})

    def hold(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        models.extend(chunks)
        return chunks

    student, teacher = provider(16, size), provider(32, size)
    student.register_pre_wrap_hook(hold)
    if way == "distill":
        student = convert_to_distillation_provider(student, teacher, ModelOptDistillConfig())
        student.register_pre_wrap_hook(functools.partial(attach, config=LossConfig(**OPTIONS)))
        # What Bridge's distill() calls, with callbacks.
        pretrain(configuration(student), forward_step_modelopt, callbacks=[Watch()])
    else:

        def beside() -> torch.nn.Module:
            teacher.finalize()
            return teacher.provide_distributed_model(wrap_with_ddp=False, mixed_precision_wrapper=None)[0]

        plug = distill(forward_step, DistillSettings(**OPTIONS), teacher=beside)
        pretrain(configuration(student), plug, callbacks=[Watch()])
        plug.close()
    weights = {
        name: value.detach() for name, value in models[0].named_parameters() if not name.startswith("_")
    }
    torch.save({"steps": steps, "weights": weights}, folder / f"{way}-{rank}.pt")


def main(folder: str, rank: str, size: str, *ports: str) -> None:
    torch.set_num_threads(1)
    with cpu.on_cpu():
        import megatron.bridge.models.distillation_provider
        import megatron.bridge.training.pretrain  # noqa: F401

        fork = multiprocessing.get_context("fork")
        for way, port in zip(WAYS, ports, strict=True):
            process = fork.Process(target=train, args=(way, Path(folder), int(rank), int(size), int(port)))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{way}: exit code {process.exitcode}")


if __name__ == "__main__":
    main(*sys.argv[1:])
