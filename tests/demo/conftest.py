from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """The cache of real weights and text of `make demo`, filled if necessary."""
    from examples.demo import source
    from examples.demo.settings import CACHE

    source.prepare(CACHE)
    return CACHE
