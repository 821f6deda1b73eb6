"""A norm and an attention that replace those of Transformer Engine on the CPU.

Megatron's local norm does not support sequence parallelism, and its local attention does not support context
parallelism. With these two layers, Megatron's own code does the rest: it scatters the sequences, splits them in a
zigzag over the context ranks, gathers the hidden states and reduces the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Norm(nn.RMSNorm):
    """A norm over this rank's part of the sequence. Megatron sums the gradients of weights with this mark."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class Attention(nn.Module):
    """Causal attention from the positions of this context rank to those of all context ranks.

    Two all-gathers in forward and two reduce-scatters in backward, over the context-parallel group.
    """

    def __init__(self, config: Any, *args: Any, **rest: Any) -> None:
        super().__init__()
        self._size = config.context_parallel_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any) -> Tensor:
        """query, key, value [s / context ranks, b, heads or groups, size] -> [s / context ranks, b, heads * size]."""
        group = parallel_state.get_context_parallel_group()
        if self._size > 1:
            key, value = (gather_from_sequence_parallel_region(each, group=group) for each in (key, value))
        positions = [zigzag(len(key), rank, self._size) for rank in range(self._size)]
        seen = torch.cat(positions) <= positions[group.rank()][:, None]
        output = scaled_dot_product_attention(
            *(each.permute(1, 2, 0, 3) for each in (query, key, value)), attn_mask=seen, enable_gqa=True
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def zigzag(sequence: int, rank: int, size: int) -> Tensor:
    """The positions of a context rank: of 2 * size equal pieces, piece `rank` from each end."""
    pieces = torch.arange(sequence).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def standing_in(layers: int) -> TransformerBlockSubmodules:
    """A layer specification: Megatron's local layers with these two replaced."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    parts.self_attention.submodules.core_attention = Attention
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm)
