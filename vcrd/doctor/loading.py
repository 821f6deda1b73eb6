"""Loads what may take its process down or hold it for ever, in a child that may go."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import warnings

_SECONDS = 30.0
_lock = threading.Lock()
_known: dict[str, str] = {}


def cannot_bear(module: str, seconds: float = _SECONDS) -> str:
    """What becomes of a process that imports it: "is killed by SIGSEGV", "has not finished ..."; empty where it lives.

    Forked, so that what is imported here already need not be once more. No CUDA context may be open. That an import
    raises is not asked here: it can be tried after this.
    """
    with _lock:
        if module not in _known:
            _known[module] = "" if module in sys.modules else _tried(module, min(seconds, _SECONDS))
        return _known[module]


def _tried(module: str, seconds: float) -> str:
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, of which the child uses none
        child = os.fork()
    if child == 0:
        _import_and_exit(module, seconds)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return (
                f"is killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else ""
            )
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"has not finished within {seconds:g} seconds"


def _import_and_exit(module: str, seconds: float) -> None:
    try:
        # The parent may be gone by then, and what hangs here may never come back to Python.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(seconds) + 5)
        faulthandler.disable()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        importlib.import_module(module)
    finally:
        os._exit(0)
