"""Megatron GPT models for the training stages of `make gpu-check`, most of them for one rank in bfloat16."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. groups: key-value groups, None for one per head. gated: SwiGLU. tied: tied embeddings."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    vocab: int
    sequence: int
    groups: int | None = None
    gated: bool = False
    tied: bool = False
    init_std: float = 0.02


def build(
    shape: Shape,
    seed: int,
    recipe: str | None,
    engine: bool,
    dtype: torch.dtype = torch.bfloat16,
    layers: Any = None,
    **settings: Any,
) -> torch.nn.Module:
    """recipe: FP8 recipe. engine: use Transformer Engine's layers. dtype: of the parameters, bfloat16 or float32.
    layers: a Megatron layer specification, None for the default. settings: further fields of the configuration."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    quantised = {"fp8": "hybrid", "fp8_recipe": recipe} if recipe else {}
    if recipe == "delayed":
        quantised |= {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    activation = {"gated_linear_unit": True, "activation_func": silu} if shape.gated else {}
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.feed_forward,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        init_method_std=shape.init_std,
        # The norm of the local layers is a torch norm, which does not support it.
        **({} if engine else {"persist_layer_norm": False}),
        **activation,
        **quantised,
        **settings,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    if layers is None:
        layers = (
            get_gpt_layer_with_transformer_engine_spec()
            if engine
            else get_gpt_layer_local_spec(normalization="RMSNorm")
        )
    model = GPTModel(
        config,
        layers,
        shape.vocab,
        shape.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
    )
    model = model.cuda()
    return Float16Module(config, model) if config.bf16 else model


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A parallel state of this process alone, on the first GPU."""
    from megatron.core import parallel_state

    # Megatron requires this with tensor parallelism and allows it without.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(0)
    with TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            # gloo groups would need a network, which the machine may not have.
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@dataclass(frozen=True)
class Batch:
    """Random tokens and labels [b, s] on the device, with positions for Megatron."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor

    @classmethod
    def draw(cls, shape: Shape, size: int, generator: torch.Generator) -> Batch:
        tokens, labels = (
            torch.randint(shape.vocab, (size, shape.sequence), generator=generator).cuda() for _ in range(2)
        )
        return cls(tokens, labels, torch.arange(shape.sequence).cuda().expand(size, shape.sequence))


def forward_step(data_iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable]:
    """The forward step of a Megatron script: draw a batch, call the model, return loss_func."""
    batch = next(data_iterator)
    every = torch.ones_like(batch.labels)
    losses = model(batch.tokens, batch.positions, None, labels=batch.labels, loss_mask=every)
    return losses, lambda losses: (losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {})


def forward_backward(step: Callable, model: torch.nn.Module, batch: Batch) -> Any:
    """Runs one micro-batch through Megatron's schedule and returns the report of loss_func."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=model,
        num_microbatches=1,
        seq_length=batch.tokens.shape[1],
        micro_batch_size=batch.tokens.shape[0],
        forward_only=False,
    )
