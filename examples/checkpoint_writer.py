"""For scripts whose training spawns a process that writes checkpoints, which imports the script as `__mp_main__`."""

from __future__ import annotations

import os
import signal
import threading
import time


def ignore_signals() -> None:
    """In that process: ignores SIGTERM, and ends with the parent.

    Slurm signals every process of a job before the last checkpoint is written.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
