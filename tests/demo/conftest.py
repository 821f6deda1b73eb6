from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """The demo's cache of real weights and text: the one that `make demo` uses, filled if need be."""
    from examples.demo import source
    from examples.demo.settings import CACHE

    source.prepare(CACHE)
    return CACHE
