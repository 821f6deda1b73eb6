"""The plan's context-parallel order against Megatron's own function that splits a batch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vcrd.link.plan import context_rows
from vcrd.megatron import cpu


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_those_that_megatron_leaves_on_each_rank(size):
    with cpu.on_cpu():
        from megatron.core.utils import get_batch_on_this_cp_rank

        known = inspect.signature(get_batch_on_this_cp_rank).parameters
        extra = (
            {"is_hybrid_cp": False} if "is_hybrid_cp" in known else {}
        )  # required since megatron-core 0.19
        for rank in range(size):
            # A group of which this process is one rank, and which exchanges nothing.
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
            try:
                for sequence in (2 * size, 6 * size):
                    tokens = torch.arange(2 * sequence).view(2, sequence)
                    batch = get_batch_on_this_cp_rank({"tokens": tokens}, cp_group=dist.group.WORLD, **extra)
                    spans = context_rows(sequence, rank, size)
                    mine = torch.cat([tokens[:, span.start : span.stop] for span in spans], 1)
                    assert torch.equal(batch["tokens"], mine)
            finally:
                dist.destroy_process_group()
