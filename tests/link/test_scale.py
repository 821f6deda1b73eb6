"""Many ranks on one machine: everyone joins, a lost replica comes back, and no rank grows with the size of the job.

The table of docs/planning.md is scale.py's with 64, 256 and 1024 student ranks.
"""

from __future__ import annotations

import pytest
from link_jobs import Layout
from scale import simulate


def layout(replicas: int) -> Layout:
    """Each replica serves two data ranks of four tensor ranks."""
    return Layout(
        student_tensor=4, student_data=2 * replicas, teacher_tensor=2, replicas=replicas, vocab=32, sequence=4
    )


@pytest.mark.slow
def test_what_a_rank_holds_grows_with_the_ranks_that_it_talks_to_only(tmp_path):
    found = []
    for replicas in (1, 6):
        (folder := tmp_path / str(replicas)).mkdir()
        found.append(simulate(layout(replicas), 2, folder))
    small, large = found
    assert (small["student ranks"], large["student ranks"]) == (8, 48)
    for who in ("student rank 0", "teacher rank"):
        assert large[who]["threads"] == small[who]["threads"], found
        assert large[who]["descriptors"] == small[who]["descriptors"], found
