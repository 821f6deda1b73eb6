"""SmolLM2 as a Megatron-Core GPT model: shape, configuration and parallel construction."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import silu

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class Shape:
    """The shape of a model, from a Hugging Face Llama configuration."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    head_size: int
    vocab_size: int
    norm_epsilon: float
    rope_base: float

    @classmethod
    def of(cls, config) -> Shape:
        """The shape of a transformers LlamaConfig with tied embeddings and no biases; otherwise ValueError."""
        if not config.tie_word_embeddings or config.attention_bias or config.mlp_bias:
            raise ValueError("config: expected tied embeddings and no biases, as SmolLM2 has them")
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            feed_forward=config.intermediate_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_size=config.head_dim,
            vocab_size=config.vocab_size,
            norm_epsilon=config.rms_norm_eps,
            rope_base=config.rope_parameters["rope_theta"],
        )

    @classmethod
    def load(cls, path: Path) -> Shape:
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def configure(shape: Shape, layers: int, dtype: torch.dtype = torch.float32) -> TransformerConfig:
    """Megatron's configuration for `layers` layers in float32 or bfloat16. Megatron's parallel state must exist."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.feed_forward,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        # These need a GPU or its compiler.
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def build(shape: Shape, config: TransformerConfig, sequence_length: int, **stage: Any) -> GPTModel:
    """This rank's part of a GPT model. stage: pre_process, post_process and so on; default: from the rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    own = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=sequence_length,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_base),
        **{**own, **stage},
    )


def in_its_dtype(model: GPTModel) -> torch.nn.Module:
    """The model on its device, wrapped as Megatron's scripts wrap a model in bfloat16."""
    from megatron.core.transformer.module import Float16Module

    model = model.cuda()
    return Float16Module(model.config, model) if model.config.bf16 else model
