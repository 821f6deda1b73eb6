"""Runs `python -m vcrd doctor` as a user does: real processes, one or several, as srun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ports import free_port

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


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def findings(self) -> list[dict]:
        return json.loads(self.out)["findings"]

    @property
    def faults(self) -> list[dict]:
        return [finding for finding in self.findings if finding["status"] == "fault"]

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


def ended(process: subprocess.Popen) -> Ended:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    return Ended(process.returncode, out, err)


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
    """A job step of one task on each node. `each` may change a rank's environment, folder or options."""

    def __init__(
        self, nodes: Sequence[str], *options: str, each: Mapping[int, dict] | None = None, absent=()
    ) -> None:
        port = free_port()
        self.processes = {}
        for rank in range(len(nodes)):
            if rank in absent:
                continue
            changes = dict((each or {}).get(rank, {}))
            path = changes.pop("path", ())
            variables = {**slurm(rank, nodes, port), **_NETWORK, **changes.pop("variables", {})}
            variables = environment(path, **variables)
            self.processes[rank] = start([*options, "--json"], variables, **changes)
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
