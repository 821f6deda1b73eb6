"""The fork server for processes of tests. It has already imported the packages that they need."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from unittest import mock


def context() -> BaseContext:
    """The multiprocessing context with processes from the server. Starts the server if necessary.

    A process has one server, so all tests share one list of imports.
    """
    multiprocessing.set_forkserver_preload(["preloaded"])
    # The server has the module path of this process, and torch reads its log level once, at import. Other children
    # must not inherit these variables.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), TORCH_CPP_LOG_LEVEL="FATAL"):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")
