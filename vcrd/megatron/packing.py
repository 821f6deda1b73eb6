"""Sequences packed into one row: their edges in a Megatron batch, and what keeps a model from looking across them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vcrd.link.intake import Request

# The keys of Megatron's packed datasets, the padded edges first: with context parallelism it cuts sequences at these.
_EDGES = ("cu_seqlens_padded", "cu_seqlens")


def packed(batch: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [b, s] of a Megatron micro-batch as they are to be asked for, and the edges of its sequences.

    A batch without edges is asked for as it is. Megatron makes one row of packed samples, b * s tokens long, whose
    edges follow each other; so does this. Edges: int64, ascending from 0 to b * s, empty where nothing is packed.
    """
    edges = None
    if isinstance(batch, dict):
        edges = next((batch[key] for key in _EDGES if batch.get(key) is not None), None)
    if edges is None:
        return tokens, torch.empty(0, dtype=torch.int64)
    size, sequence = tokens.shape
    edges = torch.as_tensor(edges).long().cpu().reshape(size, -1)
    # Rows are padded at their end with the length of the sample, so that samples can be stacked.
    merged = (edges + sequence * torch.arange(size)[:, None]).flatten().unique_consecutive()
    return tokens.reshape(1, size * sequence), merged


class PackedInputs:
    """Positions and masks for a teacher's model.

    Each packed sequence begins at position 0 and sees itself alone: by `PackedSeqParams` where attention is Transformer
    Engine's, elsewhere by an attention mask [1, 1, s, s], true where it may not look.
    """

    def __init__(self, chunk: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        # The configuration's transformer_impl names an intention; the modules are what runs.
        names = {type(module).__name__ for module in chunk.modules()}
        self._by_engine = any(name.startswith("TE") and "Attention" in name for name in names)
        self._ignores_masks = device.type == "cuda" and bool(
            getattr(chunk.config, "masked_softmax_fusion", False)
        )

    def of(self, request: Request) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Positions [b, s], the attention mask or None, further keyword arguments of the model's forward."""
        batch, sequence = request.tokens.shape
        positions = torch.arange(sequence, device=self._device)
        edges = request.boundaries.to(self._device)
        if not len(edges):
            return positions.expand(batch, sequence), None, {}
        which = torch.bucketize(positions, edges[1:], right=True)
        own = (positions - edges[which]).expand(batch, sequence)
        if self._by_engine:
            return own, None, {"packed_seq_params": _parameters(edges)}
        if self._ignores_masks:
            raise ValueError(
                "masked_softmax_fusion: expected False for packed sequences without Transformer Engine, got True, "
                "whose causal kernel reads no mask (--no-masked-softmax-fusion)"
            )
        hidden = (which[:, None] != which[None, :]) | (positions[:, None] < positions[None, :])
        return own, hidden[None, None], {}


def _parameters(edges: Tensor) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    edges = edges.int()
    longest = int(edges.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=edges,
        cu_seqlens_kv=edges,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
