"""Context parallelism at the level of the loss, beside tensor parallelism; on a GPU the ranks share it."""

from __future__ import annotations

import context_jobs
import sharded_jobs


def test_context_parallel_ranks_have_the_losses_and_gradients_of_whole_rows(device, tmp_path):
    sharded_jobs.spawn(context_jobs.split, 4, tmp_path, device)
