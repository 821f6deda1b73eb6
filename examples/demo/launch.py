"""Starts and monitors the two torchrun jobs, and always ends all of their processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .job import LAUNCHER
from .settings import DemoSettings

# Without these, glibc maps and unmaps every large tensor, and the page faults take a sixth of the time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
_ROOT = Path(__file__).parents[2]
_GRACE = 10.0  # seconds for a job to end after a signal
_LAST_WORDS = 3.0  # seconds for the processes of a failing run to write their errors


class DemoFailed(Exception):
    """An error with a message for the user."""


class Interrupted(Exception):
    """A signal asked the demo to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def check_port(port: int) -> None:
    """DemoFailed if the port cannot be used."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise DemoFailed(
                f"port {port} cannot be used ({error.strerror}): choose another with --port"
            ) from None


@contextmanager
def signals_raised() -> Iterator[None]:
    """Makes SIGINT, SIGTERM and SIGHUP raise Interrupted, so that both jobs end."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(number)

    before = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(settings: DemoSettings, settings_file: Path, watch: Callable[[], None]) -> None:
    """Runs both jobs to their end and calls `watch` meanwhile. DemoFailed if one fails; then both are ended."""
    jobs: dict[str, subprocess.Popen] = {}
    try:
        for name, processes in (
            ("student", settings.student_tensor_size),
            ("teacher", settings.teacher_stages),
        ):
            jobs[name] = _start(name, processes, settings, settings_file)
        while any(job.poll() is None for job in jobs.values()):
            watch()
            failed = [name for name, job in jobs.items() if job.poll()]
            reasons = _reasons(settings)
            if failed or reasons:
                raise DemoFailed(_sentence(settings, jobs, failed))
            time.sleep(0.1)
        watch()
        failed = [name for name, job in jobs.items() if job.returncode]
        if failed:
            raise DemoFailed(_sentence(settings, jobs, failed))
    finally:
        _end(jobs)


def run_prepare(settings: DemoSettings) -> None:
    """Fills the cache in a separate process, so that its memory is returned."""
    command = [sys.executable, "-m", "examples.demo.source", settings.cache]
    # Keeps the user's OMP_NUM_THREADS, because nothing else runs now.
    with open(settings.folder / "logs" / "prepare.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            _end({"prepare": process})
    if code:
        lines = Path(log.name).read_text().strip().splitlines()
        raise DemoFailed(f"model and text could not be read: {lines[-1] if lines else f'exit code {code}'}")


def _start(name: str, processes: int, settings: DemoSettings, settings_file: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(processes), "-m", "examples.demo.job", name, str(settings_file)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        LAUNCHER: str(os.getpid()),
        **(_one_gpu(name) if settings.gpu else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"PYTHONWARNINGS": "ignore", **_KEEP_MEMORY}
    if "lo" in {interface for _, interface in socket.if_nameindex()}:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(settings.folder / "logs" / f"{name}.log", "w") as log:
        # A separate session, so that Ctrl-C reaches only the launcher, which then ends both jobs in order.
        return subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _one_gpu(name: str) -> dict[str, str]:
    """NCCL refuses two ranks on one GPU of one host. With these variables each job counts as a separate host."""
    return {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_HOSTID": f"demo-{name}",
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_MNNVL_ENABLE": "0",
    }


def _end(jobs: dict[str, subprocess.Popen]) -> None:
    """Sends SIGTERM to torchrun, then SIGKILL. Workers end by themselves when their torchrun has ended."""
    for job in jobs.values():
        if job.poll() is None:
            job.terminate()
    deadline = time.monotonic() + _GRACE
    for job in jobs.values():
        try:
            job.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()


def _reasons(settings: DemoSettings) -> list[tuple[str, str, str]]:
    """(name of the rank, origin as in `job._kind`, message) of each failed rank, in order of failure."""
    found = sorted((settings.folder / "logs").glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
    return [(path.stem, *path.read_text().split("\n", 1)) for path in found]


def _sentence(settings: DemoSettings, jobs: dict[str, subprocess.Popen], failed: list[str]) -> str:
    """Which job failed and why. Prefers an own error of a rank, because it causes the errors of the others."""
    deadline = time.monotonic() + _LAST_WORDS
    while time.monotonic() < deadline and all(kind != "own" for _, kind, _ in _reasons(settings)):
        time.sleep(0.1)
    reasons = sorted(_reasons(settings), key=lambda reason: ("own", "link", "peer").index(reason[1]))
    logs = settings.folder / "logs"
    if reasons:
        rank, kind, sentence = reasons[0]
        name, _, number = rank.partition("-")
        if kind == "link":
            return f"the link between the two jobs failed: {sentence.strip()} (see {logs})"
        said = sentence.strip() if kind == "own" else "another rank of it ended"
        return f"rank {number} of the {name} job failed: {said} (see {logs / name}.log)"
    name = failed[0] if failed else next(iter(jobs))
    return f"the {name} job ended with exit code {jobs[name].returncode} (see {logs / name}.log)"
