"""Runs `python -m vcrd doctor` in one or several new processes, as srun starts them.

`start` begins a fresh interpreter, as a user does. `Forked` is the same command in a process that has imported torch
and Megatron already, which is most of the time that a fresh one takes.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fork_server import context
from ports import free_port

from vcrd.doctor.checks import Job, Options
from vcrd.doctor.environment import link_settings
from vcrd.doctor.processes import World
from vcrd.settings import LinkSettings

ROOT = Path(__file__).parents[2]
SECONDS = 200
_LAUNCHERS = (
    "SLURM",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "TORCHELASTIC",
    "ENVIRONMENT",
    "VCRD_",
    "NCCL_",
)


def make_job(
    world: World | None = None,
    variables: Mapping[str, str] | None = None,
    link: LinkSettings | None = None,
    **options,
) -> Job:
    variables = variables or {}
    return Job(world or World(), variables, link or link_settings(variables), Options(**options))


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def findings(self) -> list[dict]:
        return json.loads(self.out)["findings"]

    @property
    def problems(self) -> list[dict]:
        return [finding for finding in self.findings if finding["status"] == "problem"]

    def line(self, name: str) -> dict:
        (found,) = [finding for finding in self.findings if finding["name"] == name]
        return found


def environment(path: Sequence[Path] = (), **variables: str) -> dict[str, str]:
    """This process's, without what a launcher or a user has set. path: folders with packages, before all others."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(_LAUNCHERS)}
    folders = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"} | variables


def start(options: Sequence[str], variables: Mapping[str, str], **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "vcrd", "doctor", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=dict(variables), **{"cwd": ROOT, **pipes, **more})


def _nothing() -> None:
    pass


class Forked:
    """The command in a process from the fork server: as much of a Popen as `ended` needs."""

    def __init__(
        self,
        options: Sequence[str],
        variables: Mapping[str, str],
        cwd: Path = ROOT,
        path: Sequence[Path] = (),
        before: Callable[[], None] = _nothing,
    ) -> None:
        """path: folders with packages, before all others. before: a module's function that the process calls first."""
        self._output = tempfile.TemporaryDirectory()
        arguments = (list(options), dict(variables), str(cwd), [*map(str, path)], before, self._output.name)
        self._process = context().Process(target=_run_command, args=arguments, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("vcrd doctor", timeout)
        out, err = ((Path(self._output.name) / name).read_text() for name in ("out", "err"))
        return out, err

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()
        self._output.cleanup()


def _run_command(
    options: list[str],
    variables: dict[str, str],
    cwd: str,
    path: list[str],
    before: Callable[[], None],
    folder: str,
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.path[:0] = path
    importlib.invalidate_caches()
    import torch

    torch.set_num_threads(1)
    before()
    from vcrd.__main__ import main

    status = main(["doctor", *options])
    sys.stdout.flush()
    sys.exit(status)


def ended(process: subprocess.Popen | Forked) -> Ended:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    return Ended(process.returncode, out, err)


def forked(*options: str, variables: Mapping[str, str] | None = None, **more) -> Ended:
    return ended(Forked(options, environment() if variables is None else variables, **more))


def run(*options: str, variables: Mapping[str, str] | None = None, **more) -> Ended:
    return ended(start(options, environment() if variables is None else variables, **more))


def slurm(rank: int, nodes: Sequence[str], port: int) -> dict[str, str]:
    """What srun sets for one task on each of these nodes; all of them are this machine."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": str(len(nodes)),
        "SLURM_NTASKS": str(len(nodes)),
        "SLURM_NNODES": str(len(nodes)),
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURMD_NODENAME": nodes[rank],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Step:
    """A job step of one task on each node. `each` may change what a rank's `Forked` is given."""

    def __init__(
        self, nodes: Sequence[str], *options: str, each: Mapping[int, dict] | None = None, absent=()
    ) -> None:
        port = free_port()
        self.processes = {}
        for rank in range(len(nodes)):
            if rank in absent:
                continue
            changes = dict((each or {}).get(rank, {}))
            variables = {**slurm(rank, nodes, port), **_NETWORK, **changes.pop("variables", {})}
            self.processes[rank] = Forked([*options, "--json"], environment(**variables), **changes)
        self.port = port

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def ended(self) -> dict[int, Ended]:
        with self:
            return {rank: ended(process) for rank, process in self.processes.items()}


# This machine's own name may be known to itself alone.
_NETWORK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "VCRD_INTERFACE": "127.0.0.1",
    "VCRD_ADDRESS": "file:/nowhere/vcrd-address",
}
