"""Settings for all tests: the number of hypothesis examples, the files that start first, and which slow tests run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# `make test-all` uses the thorough profile. There is no deadline, because a busy machine must not fail a test.
settings.register_profile("fast", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=150)
settings.load_profile("fast")

# These files take minutes. They start first, so that no worker runs one of them alone at the end.
LONGEST = ("test_slurm.py", "test_long_runs.py", "test_emulated.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-of",
        action="append",
        metavar="PATH",
        help="of the slow tests run only those of this file or folder; may be given several times",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--slow-of")
    if wanted is not None:
        folders = [(config.rootpath / path).resolve() for path in wanted]
        for folder in folders:
            if not folder.exists():
                raise pytest.UsageError(f"--slow-of: expected a file or folder of tests, got {folder}")
        left = [item for item in items if not _runs(item, folders)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if _runs(item, folders)]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def _runs(item: pytest.Item, folders: list[Path]) -> bool:
    if item.get_closest_marker("slow") is None:
        return True
    return any(item.path == folder or folder in item.path.parents for folder in folders)
