"""What all tests share: how many examples hypothesis draws, and which files begin first."""

from __future__ import annotations

import pytest
from hypothesis import settings

# `make test-all` asks for the thorough profile. No deadline: a property is true or not, however busy the machine is.
settings.register_profile("fast", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=150)
settings.load_profile("fast")

# These take minutes, and no worker should be left with one of them when the others have nothing more to do.
LONGEST = ("test_slurm.py", "test_long_runs.py", "test_emulated.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
