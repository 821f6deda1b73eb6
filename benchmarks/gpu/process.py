"""Runs one command of `make gpu-check` with a time limit, and ends all of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.results import ROOT


@dataclass(frozen=True)
class Outcome:
    returncode: int | None  # None: cut off
    seconds: float
    output: str  # of both streams

    @property
    def ended_well(self) -> bool:
        return self.returncode == 0

    @property
    def how(self) -> str:
        if self.returncode is None:
            return f"cut off after {self.seconds:.0f} s"
        return f"exit status {self.returncode}"

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.output.strip().splitlines()[-lines:])


def run(command: list[str], seconds: float, show: bool = False, **environment: str) -> Outcome:
    """Runs the command in the checkout. show: print its lines as they come.

    Kills the whole process group at the limit, after the command ends, and if this process is interrupted.
    """
    # torch looks for ninja on the PATH, and the environment may not be activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PATH": path, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        process, shown, returncode = None, 0, None
        # A signal while the command starts would leave its processes behind, so it waits until `process` is known.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **ours, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, before),
            )
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            while returncode is None and time.monotonic() - started < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    returncode = process.wait(
                        timeout=max(0.01, min(0.2, seconds - (time.monotonic() - started)))
                    )
                if show:
                    text = (Path(folder) / "output").read_text(errors="replace")
                    print(text[shown:], end="", flush=True)
                    shown = len(text)
        finally:
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # A process that hangs in the driver does not die. The other stages must still run.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        text = (Path(folder) / "output").read_text(errors="replace")
        return Outcome(returncode, time.monotonic() - started, text)
