"""Loads what may take its process down, in a child that may go."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import warnings
from functools import cache

_SECONDS = 30.0  # then it is not the loading that fails, and the child is ended


@cache
def killed_by(module: str) -> str:
    """The signal that ends a process which imports it; empty where none does, or where it is imported already.

    Forked, so that what is imported here already need not be once more. No CUDA context may be open.
    """
    if module in sys.modules:
        return ""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which the child uses none
        child = os.fork()
    if child == 0:
        _import_and_exit(module)
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ""


def _import_and_exit(module: str) -> None:
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        importlib.import_module(module)
    finally:
        os._exit(0)
