"""Where this process stands among those that were started together: by srun, by torchrun, or alone. No torch."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from vcrd.plan.options import OptionError

_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class World:
    """rank, size: among all processes. local_rank, local_size: on this node.

    node: its name. host, port: where rank 0 gathers what the others found. hosted: torchrun listens there already.
    expected: names of all nodes, where the launcher says them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: str = ""
    host: str = ""
    port: int = 0
    hosted: bool = False
    expected: tuple[str, ...] = ()


def world_of(environment: Mapping[str, str]) -> World:
    """OptionError that names the variable for what no launcher sets so."""
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torchrun(environment, node)
    # A batch script has a rank, too, although it was not started by srun and is alone.
    step = any(name in environment for name in _STEP) or environment.get("ENVIRONMENT") != "BATCH"
    if "SLURM_PROCID" in environment and step:
        return _of_slurm(environment, node)
    return World(node=node)


def _of_torchrun(environment: Mapping[str, str], node: str) -> World:
    rank, size = _rank_and_size(environment, "RANK", "WORLD_SIZE")
    if size == 1:
        return World(node=node)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise OptionError(f"{name}: must be set where RANK and WORLD_SIZE are, got nothing")
    return World(
        rank=rank,
        size=size,
        local_rank=_whole(environment, "LOCAL_RANK", 0),
        local_size=_whole(environment, "LOCAL_WORLD_SIZE", 1, least=1),
        node=node,
        host=environment["MASTER_ADDR"],
        port=_port(environment, "MASTER_PORT"),
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        expected=_nodes(environment),
    )


def _of_slurm(environment: Mapping[str, str], node: str) -> World:
    # That of this step; the other is the job's.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    rank, size = _rank_and_size(environment, "SLURM_PROCID", tasks)
    if size == 1:
        return World(node=node)
    nodes = _nodes(environment)
    return World(
        rank=rank,
        size=size,
        local_rank=_whole(environment, "SLURM_LOCALID", 0),
        local_size=-(-size // max(1, len(nodes))),
        node=node,
        host=environment.get("MASTER_ADDR") or (nodes[0] if nodes else node),
        port=_port(environment, "MASTER_PORT")
        if environment.get("MASTER_PORT")
        else _spare_port(environment),
        expected=nodes,
    )


def expand(names: str) -> tuple[str, ...]:
    """The nodes of Slurm's short form: "b[1-3,7],c2" is b1, b2, b3, b7, c2."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", names):
        found += _expanded(part)
    return tuple(found)


def _expanded(part: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if not match:
        return [part]
    numbers: list[str] = []
    for piece in match[1].split(","):
        first, dash, last = piece.partition("-")
        if dash and first.isdigit() and last.isdigit():
            numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        else:
            numbers.append(piece)
    return [name for n in numbers for name in _expanded(part[: match.start()] + n + part[match.end() :])]


def _nodes(environment: Mapping[str, str]) -> tuple[str, ...]:
    return expand(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))


def _spare_port(environment: Mapping[str, str]) -> int:
    """The last of the four that examples/slurm/launch.sh gives to each job."""
    # Each component of a heterogeneous job has a number of its own.
    name = "SLURM_HET_JOB_ID" if "SLURM_HET_JOB_ID" in environment else "SLURM_JOB_ID"
    return 10000 + _whole(environment, name, 0) % 5000 * 4 + 3


def _rank_and_size(environment: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    size = _whole(environment, size_name, 1, least=1)
    rank = _whole(environment, rank_name, 0)
    if rank >= size:
        raise OptionError(f"{rank_name}: must be below {size_name}, {size}, got {rank}")
    return rank, size


def _whole(environment: Mapping[str, str], name: str, otherwise: int, least: int = 0) -> int:
    text = environment.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise OptionError(f"{name}: must be an integer of at least {least}, got {text!r}")
    return int(text)


def _port(environment: Mapping[str, str], name: str) -> int:
    port = _whole(environment, name, 0)
    if not 0 < port < 65536:
        raise OptionError(f"{name}: must be a port from 1 to 65535, got {port}")
    return port
