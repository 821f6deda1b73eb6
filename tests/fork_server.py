"""The server that processes of tests are forked from: it has imported once what all of them need."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from unittest import mock


def context() -> BaseContext:
    """The context of multiprocessing whose processes come from the server, which is started unless it runs.

    There is one server in a process, so all tests share one list of what it imports.
    """
    multiprocessing.set_forkserver_preload(["preloaded"])
    # The server looks for modules where this process does, and torch reads its log level once, when it is imported.
    # Other children must not inherit either.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), TORCH_CPP_LOG_LEVEL="FATAL"):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")
