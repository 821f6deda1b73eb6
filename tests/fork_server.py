"""The server that worlds of processes are forked from."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from unittest import mock


def start_server(preload: Sequence[str]) -> None:
    """Starts it, unless it runs: it imports these modules once, and looks for modules where this process does."""
    multiprocessing.set_forkserver_preload(list(preload))
    # All that it is told of where modules are. What this process starts otherwise must not inherit that.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
