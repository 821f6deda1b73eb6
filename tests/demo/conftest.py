from __future__ import annotations

import sys
from pathlib import Path

# At the end: a folder of tests must not come before the package of the same name.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """The demo's cache of real weights and text: the one that `make demo` uses, filled if need be."""
    from examples.demo import source
    from examples.demo.settings import CACHE

    source.prepare(CACHE)
    return CACHE
