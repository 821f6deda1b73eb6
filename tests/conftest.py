"""Settings for all tests: the number of hypothesis examples, and the files that start first."""

from __future__ import annotations

import pytest
from hypothesis import settings

# `make test-all` uses the thorough profile. There is no deadline, because a busy machine must not fail a test.
settings.register_profile("fast", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=150)
settings.load_profile("fast")

# These files take minutes. They start first, so that no worker runs one of them alone at the end.
LONGEST = ("test_slurm.py", "test_long_runs.py", "test_emulated.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
