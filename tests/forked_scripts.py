"""A script as the main program of a process from the fork server.

A fresh interpreter needs five seconds of a core to import torch and Megatron's training loop, and torchrun two more for
each job. A fork has both already. Start a fresh one, or torchrun, only to test just that.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fork_server import context


class Script:
    """`python arguments...` with this environment, in the checkout; its output is appended to a file."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        given = list(arguments), dict(environment), str(output), os.getcwd()
        # Not daemonic, because a script may start processes itself.
        self._process = context().Process(target=_run, args=given)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """None while it runs, -N after signal N."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Scripts:
    """A script on several ranks, with what torchrun would set. All end when one fails."""

    def __init__(
        self, size: int, arguments: Sequence[str], environment: Mapping[str, str], output: Path, port: int
    ) -> None:
        self.output = output
        self._ranks = []
        for rank in range(size):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "USE_LIBUV": 0}
            own = {name: str(value) for name, value in place.items()}
            self._ranks.append(Script(arguments, {**environment, **own}, output))

    @property
    def returncode(self) -> int | None:
        """None while a rank runs and none has failed; otherwise the first status that is not 0, or 0."""
        codes = [rank.returncode for rank in self._ranks]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self.returncode is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()


def _run(arguments: list[str], environment: dict[str, str], output: str, folder: str) -> None:
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)  # torch read OMP_NUM_THREADS when the server imported it
    if preloaded := sys.modules.get("preloaded"):
        level, handlers = preloaded.SCRIPT_LOGGING
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers
    sys.argv = arguments
    multiprocessing.set_start_method(None, force=True)  # that of a fresh interpreter
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        # A process of multiprocessing leaves these out.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
