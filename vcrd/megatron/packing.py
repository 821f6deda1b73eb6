"""Sequences packed into one row: their edges in a Megatron batch, and what keeps a model from looking across them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vcrd.link.requests import Request

# Where Megatron-Core, Megatron-Bridge and NeMo keep edges, in a micro-batch and in `PackedSeqParams`. Padded edges come
# first: the tokens lie at these, and context parallelism cuts there. (NeMo's padded ones are its `cu_seqlens`, next
# to `cu_seqlens_unpadded`.)
_EDGES = (
    "cu_seqlens_q_padded",
    "cu_seqlens_kv_padded",
    "cu_seqlens_padded",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "cu_seqlens",
)
# What holds such fields in turn: `PackedSeqParams`, or the arguments of one.
_HOLDERS = ("packed_seq_params", "packing_kwargs")
_ALL_KEYS = "cu_seqlens, cu_seqlens_q, their padded forms, packed_seq_params"


def field(source: Any, key: str) -> Any:
    """What a micro-batch, or the like, has under this name; None where it has nothing.

    source: a mapping, an object with attributes, or a tuple that begins with either, as NeMo's iterators yield.
    """
    if isinstance(source, (tuple, list)) and source:
        source = source[0]
    return source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)


def edges_in(source: Any) -> tuple[str, Any] | None:
    """Name and value of the edges in a micro-batch or among a model's arguments, as they are there; None without.

    ValueError for edges under a name that nobody here knows.
    """
    for holder in (source, *(field(source, name) for name in _HOLDERS)):
        # In other formats than "thd" cu_seqlens are lengths of rows, and nothing is packed.
        if holder is None or field(holder, "qkv_format") not in (None, "thd"):
            continue
        for name in _EDGES:
            if (edges := field(holder, name)) is not None:
                return name, edges
    if isinstance(source, (tuple, list)) and source:
        source = source[0]
    strange = [k for k in source if str(k).startswith("cu_seq")] if isinstance(source, Mapping) else []
    strange = sorted(key for key in strange if source[key] is not None)
    if strange:
        raise ValueError(f"{strange[0]}: expected edges of packed sequences under {_ALL_KEYS}, got {strange}")
    return None


def packed(batch: Any, tokens: Tensor, arguments: Any = None) -> tuple[Tensor, Tensor]:
    """The tokens [b, s] of a Megatron micro-batch as they are to be asked for, and the edges of its sequences.

    A batch without edges is asked for as it is. Megatron makes one row of packed samples, b * s tokens long, whose
    edges follow each other; so does this. Edges: int64, ascending from 0 to b * s, empty where nothing is packed.
    The tokens after the last edge form one more sequence, as in Megatron: they are padding.

    arguments: those of the model's forward, by name; they are looked at where the batch has no edges.
    ValueError for edges that are not ascending integers from 0 to at most the length of what they cut.
    """
    found = edges_in(batch)
    if found is None and arguments is not None:
        found = edges_in(arguments)
    if found is None:
        return tokens, torch.empty(0, dtype=torch.int64)
    return tokens.reshape(1, -1), _merged(*found, *tokens.shape)


def _merged(name: str, given: Any, size: int, sequence: int) -> Tensor:
    """The edges of `size` rows as those of one row that they make together."""
    edges = torch.as_tensor(given).cpu()
    if edges.is_floating_point() or edges.dtype == torch.bool or not edges.numel():
        raise ValueError(f"{name}: expected integer edges, got {edges.dtype} {list(edges.shape)}")
    rows = edges.long().reshape(-1, edges.shape[-1] if edges.dim() else 1)
    if len(rows) not in (1, size):
        raise ValueError(
            f"{name}: expected edges [n] or [{size}, n] for tokens {[size, sequence]}, got {list(edges.shape)}"
        )
    together = len(rows) == 1
    width = size * sequence if together else sequence
    merged = []
    for number, row in enumerate(rows):
        # Rows are filled up so that they can be stacked: with the length of the sample, or with -1.
        row = row[: int((row >= 0).cumprod(0).sum())]
        wrong = not len(row) or row[0] != 0 or row[-1] > width or bool((row.diff() < 0).any())
        wrong = wrong or bool((rows[number][len(row) :] >= 0).any())
        # Edges of several rows at once are told from those of the first row by where they end.
        if wrong or (together and size > 1 and row[-1] != width):
            raise ValueError(
                f"{name}: expected edges that ascend from 0 to {width} for tokens {[size, sequence]}, "
                f"got {rows[number].tolist()[:16]}"
            )
        merged.append(row + width * number)
    return torch.cat([*merged, torch.tensor([size * sequence])]).unique_consecutive()


class PackedInputs:
    """Positions and masks for a teacher's model.

    Each packed sequence begins at position 0 and sees itself alone: by `PackedSeqParams` where attention is Transformer
    Engine's, elsewhere by an attention mask [1, 1, s, s], true where it may not look.
    """

    def __init__(self, chunk: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._by_engine = by_engine(chunk)
        self._ignores_masks = device.type == "cuda" and bool(
            getattr(chunk.config, "masked_softmax_fusion", False)
        )
        self._recurrent = sorted(
            {
                type(module).__name__
                for module in chunk.modules()
                if type(module).__name__ in ("MambaMixer", "GatedDeltaNet")
            }
        )

    def of(self, request: Request) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Positions [b, s], the attention mask or None, further keyword arguments of the model's forward.

        ValueError for a model that cannot keep packed sequences apart.
        """
        batch, sequence = request.tokens.shape
        positions = torch.arange(sequence, device=self._device)
        edges = request.boundaries.to(self._device)
        if not len(edges):
            return positions.expand(batch, sequence), None, {}
        which = torch.bucketize(positions, edges[1:], right=True)
        own = (positions - edges[which]).expand(batch, sequence)
        if self._by_engine:
            return own, None, {"packed_seq_params": self._parameters(edges, sequence)}
        if self._recurrent:
            raise ValueError(
                f"model: expected attention of Transformer Engine beside {self._recurrent[0]} for packed sequences, "
                "whose state a mask does not end, got Megatron's local attention"
            )
        if self._ignores_masks:
            raise ValueError(
                "masked_softmax_fusion: expected False for packed sequences without Transformer Engine, got True, "
                "whose causal kernel reads no mask (--no-masked-softmax-fusion)"
            )
        hidden = (which[:, None] != which[None, :]) | (positions[:, None] < positions[None, :])
        return own, hidden[None, None], {}

    def _parameters(self, edges: Tensor, sequence: int) -> Any:
        from megatron.core.packed_seq_params import PackedSeqParams

        extra = {}
        if "MambaMixer" in self._recurrent and hasattr(PackedSeqParams, "total_tokens"):
            # Where Megatron has this, its Mamba layers end their state at edges with it alone.
            extra["total_tokens"] = sequence
        edges = edges.int()
        longest = int(edges.diff().max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=edges,
            cu_seqlens_kv=edges,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            **extra,
        )


def by_engine(chunk: torch.nn.Module) -> bool:
    """Whether attention is Transformer Engine's, which reads `PackedSeqParams`, and no mask beside its causal one."""
    # The configuration's transformer_impl names an intention; the modules are what runs.
    names = {type(module).__name__ for module in chunk.modules()}
    return any(name.startswith("TE") and "Attention" in name for name in names)
