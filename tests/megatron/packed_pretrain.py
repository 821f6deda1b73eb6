"""The pretraining script on documents of a few tokens, packed, with an attention that a CPU can run for them.

Megatron's own attention for packed sequences is Transformer Engine's. Here its local one takes them as a mask.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vcrd.megatron import cpu  # noqa: E402

DOCUMENTS, LONGEST, END = 200, 9, 126


def write_documents(prefix: str) -> None:
    """Of 2 to LONGEST random tokens each, in Megatron's format."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(DOCUMENTS):
        length = int(torch.randint(1, LONGEST, (), generator=generator))
        tokens = torch.randint(END, (length,), generator=generator).tolist()
        builder.add_document(torch.tensor([*tokens, END]), [length + 1])
    builder.finalize(f"{prefix}.idx")


def attend_within_documents() -> None:
    """Megatron's local attention reads the edges of packed sequences, [t, heads, size] in and [t, heads * size] out."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    whole = DotProductAttention.forward

    def forward(
        self: Any, query: Any, key: Any, value: Any, mask: Any, packed_seq_params: Any = None, **rest: Any
    ) -> Any:
        if packed_seq_params is None:
            return whole(self, query, key, value, mask, **rest)
        edges = packed_seq_params.cu_seqlens_q_padded
        edges = packed_seq_params.cu_seqlens_q if edges is None else edges
        position = torch.arange(len(query))
        which = torch.bucketize(position, edges[1:], right=True)
        hidden = (which[:, None] != which) | (position[:, None] < position)
        if not hasattr(self, "seen"):
            self.seen = print("documents in a row:", len(edges) - 1, flush=True)
        rows = (each.unsqueeze(1) for each in (query, key, value))
        return whole(self, *rows, hidden[None, None], **rest).squeeze(1)

    DotProductAttention.forward = forward


if __name__ == "__main__":
    cpu.enable()
    write_documents(sys.argv[sys.argv.index("--data-path") + 1])
    attend_within_documents()
    from examples import pretrain_vcrd

    pretrain_vcrd.main()
