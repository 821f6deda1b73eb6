"""Converts weights between Hugging Face Llama and Megatron shards with tensor and pipeline parallelism.

Megatron-Bridge could do this too (examples/bridge), but it needs Python 3.12, and the demo runs on 3.10 and newer.

The differences, besides names:
- Megatron has query, key and value in one matrix, group after group, each group with its query, key and value;
- gate and up projection are one matrix; each tensor shard has its part of the gate above its part of the up;
- rows of linear_qkv, linear_fc1 and the embedding are split over tensor ranks, columns of linear_proj and linear_fc2;
- with tied embeddings, a last stage that is not the first stage has its own copy of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Shape

Fetch = Callable[[str], Tensor]

_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"


@dataclass(frozen=True)
class Place:
    """The place of a shard: tensor rank of tensor size, pipeline stage of stages."""

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    stages: int = 1

    def check(self, shape: Shape, layers: int) -> None:
        """ValueError if the model cannot be split in this way."""
        for name, value in (
            ("heads", shape.heads),
            ("groups", shape.groups),
            ("vocab_size", shape.vocab_size),
        ):
            if value % self.tensor_size:
                raise ValueError(
                    f"{name}: expected a multiple of the tensor size {self.tensor_size}, got {value}"
                )
        if layers % self.stages:
            raise ValueError(
                f"layers: expected a multiple of the {self.stages} pipeline stages, got {layers}"
            )


def to_megatron(fetch: Fetch, shape: Shape, kept: Sequence[int], place: Place) -> dict[str, Tensor]:
    """The state of one Megatron shard; each tensor is a separate copy.

    fetch: a Hugging Face tensor by its name. kept: the layers that become Megatron's layers 0, 1, 2 ..
    """
    place.check(shape, len(kept))
    per_stage = len(kept) // place.stages
    state: dict[str, Tensor] = {}
    for local, source in enumerate(kept[place.stage * per_stage : (place.stage + 1) * per_stage]):
        hugging_face, megatron = f"model.layers.{source}.", f"decoder.layers.{local}."
        for name, tensor in _layer_to_megatron(lambda n, p=hugging_face: fetch(p + n), shape, place).items():
            state[megatron + name] = tensor
    first, last = place.stage == 0, place.stage == place.stages - 1
    if first:
        state["embedding.word_embeddings.weight"] = _rows(fetch(_EMBEDDING), place)
    if last:
        state["decoder.final_layernorm.weight"] = fetch(_NORM).clone()
        if not first:
            state["output_layer.weight"] = _rows(fetch(_EMBEDDING), place)
    return state


def to_hugging_face(
    shards: Mapping[Place, Mapping[str, Tensor]], shape: Shape, layers: int
) -> dict[str, Tensor]:
    """The whole model from all its Megatron shards, under Hugging Face names; the inverse of `to_megatron`."""
    tensor_size = next(iter(shards)).tensor_size
    stages = next(iter(shards)).stages

    def join(name: str, stage: int, axis: int) -> list[Tensor]:
        return [shards[Place(rank, tensor_size, stage, stages)][name] for rank in range(tensor_size)]

    def cat(name: str, stage: int, axis: int) -> Tensor:
        return torch.cat(join(name, stage, axis), dim=axis)

    state = {_EMBEDDING: cat("embedding.word_embeddings.weight", 0, 0)}
    state[_NORM] = join("decoder.final_layernorm.weight", stages - 1, 0)[0].clone()
    per_stage = layers // stages
    for layer in range(layers):
        stage, prefix = layer // per_stage, f"decoder.layers.{layer % per_stage}."
        to = f"model.layers.{layer}."
        query, key, value = _split_groups(cat(prefix + "self_attention.linear_qkv.weight", stage, 0), shape)
        gates = [part.chunk(2) for part in join(prefix + "mlp.linear_fc1.weight", stage, 0)]
        state |= {
            to + "self_attn.q_proj.weight": query,
            to + "self_attn.k_proj.weight": key,
            to + "self_attn.v_proj.weight": value,
            to + "self_attn.o_proj.weight": cat(prefix + "self_attention.linear_proj.weight", stage, 1),
            to + "mlp.gate_proj.weight": torch.cat([gate for gate, _ in gates]),
            to + "mlp.up_proj.weight": torch.cat([up for _, up in gates]),
            to + "mlp.down_proj.weight": cat(prefix + "mlp.linear_fc2.weight", stage, 1),
            to + "input_layernorm.weight": join(prefix + "input_layernorm.weight", stage, 0)[0].clone(),
            to + "post_attention_layernorm.weight": join(prefix + "pre_mlp_layernorm.weight", stage, 0)[
                0
            ].clone(),
        }
    return state


def load(model: torch.nn.Module, fetch: Fetch, shape: Shape, kept: Sequence[int]) -> None:
    """Loads this rank's part of a Megatron model, according to Megatron's parallel state."""
    from megatron.core import parallel_state

    place = Place(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    state = to_megatron(fetch, shape, kept, place)
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Extra states hold scaling factors of Transformer Engine, no weights.
    left = [name for name in (*missing, *unexpected) if not name.endswith("_extra_state")]
    if left:
        raise ValueError(f"model: expected exactly the converted weights, but {left} do not match")


def _layer_to_megatron(fetch: Fetch, shape: Shape, place: Place) -> dict[str, Tensor]:
    query, key, value = (fetch(f"self_attn.{name}_proj.weight") for name in "qkv")
    gate, up = (_rows(fetch(f"mlp.{name}_proj.weight"), place) for name in ("gate", "up"))
    return {
        "input_layernorm.weight": fetch("input_layernorm.weight").clone(),
        "self_attention.linear_qkv.weight": _rows(_join_groups(query, key, value, shape), place),
        "self_attention.linear_proj.weight": _columns(fetch("self_attn.o_proj.weight"), place),
        "pre_mlp_layernorm.weight": fetch("post_attention_layernorm.weight").clone(),
        "mlp.linear_fc1.weight": torch.cat([gate, up]),
        "mlp.linear_fc2.weight": _columns(fetch("mlp.down_proj.weight"), place),
    }


def _join_groups(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    """[heads hd, h], [groups hd, h] twice -> [groups (queries + key + value) hd, h]."""
    parts = [part.view(shape.groups, -1, part.shape[-1]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _split_groups(joined: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    queries = shape.heads // shape.groups * shape.head_size
    parts = joined.view(shape.groups, -1, joined.shape[-1])
    split = parts.split([queries, shape.head_size, shape.head_size], dim=1)
    return tuple(part.flatten(0, 1) for part in split)


def _rows(tensor: Tensor, place: Place) -> Tensor:
    return tensor.chunk(place.tensor_size, dim=0)[place.tensor_rank].clone()


def _columns(tensor: Tensor, place: Place) -> Tensor:
    return tensor.chunk(place.tensor_size, dim=1)[place.tensor_rank].clone()
