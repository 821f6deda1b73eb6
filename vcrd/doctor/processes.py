"""The processes of one doctor: the rank of this one among them (`World`), and how they exchange values (`Gathering`).

torch is imported only when processes gather, because the command checks first whether torch can be imported.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from vcrd.doctor.findings import first_line
from vcrd.errors import OptionError, expected

_RANK_0_GRACE = 10.0  # seconds that other ranks wait longer than rank 0 does
_LEAVE_TIMEOUT = (
    5.0  # seconds that rank 0 keeps the store open for ranks that have not read the last gathering
)
_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class World:
    """The rank of this process, as the launcher says.

    rank, size: among all processes. local_rank, local_size: on this node. node: name of this node. host, port: address
    of the store on rank 0 through which processes gather. hosted: torchrun runs that store already. expected: names of
    all nodes, if the launcher says them.
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
    """Reads the variables of torchrun or Slurm. OptionError names a variable that has a wrong value."""
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _of_torchrun(environment, node)
    # Slurm sets a rank for a batch script too, although srun did not start it and it is alone.
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
            raise expected(name, "a value because RANK and WORLD_SIZE are set", "none", OptionError)
    return World(
        rank=rank,
        size=size,
        local_rank=_integer(environment, "LOCAL_RANK", 0),
        local_size=_integer(environment, "LOCAL_WORLD_SIZE", 1, least=1),
        node=node,
        host=environment["MASTER_ADDR"],
        port=_port(environment, "MASTER_PORT"),
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        expected=_nodes(environment),
    )


def _of_slurm(environment: Mapping[str, str], node: str) -> World:
    # The first counts the tasks of this step, the second those of the job.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    rank, size = _rank_and_size(environment, "SLURM_PROCID", tasks)
    if size == 1:
        return World(node=node)
    nodes = _nodes(environment)
    given_port = bool(environment.get("MASTER_PORT"))
    return World(
        rank=rank,
        size=size,
        local_rank=_integer(environment, "SLURM_LOCALID", 0),
        local_size=-(-size // max(1, len(nodes))),
        node=node,
        host=environment.get("MASTER_ADDR") or (nodes[0] if nodes else node),
        port=_port(environment, "MASTER_PORT") if given_port else _port_of_job(environment),
        expected=nodes,
    )


def expand(names: str) -> tuple[str, ...]:
    """The nodes of a Slurm node list: "b[1-3,7],c2" is b1, b2, b3, b7, c2."""
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


def _port_of_job(environment: Mapping[str, str]) -> int:
    """The last of the four ports that examples/slurm/launch.sh assigns to each job."""
    # In a heterogeneous job each component has its own SLURM_JOB_ID.
    name = "SLURM_HET_JOB_ID" if "SLURM_HET_JOB_ID" in environment else "SLURM_JOB_ID"
    return 10000 + _integer(environment, name, 0) % 5000 * 4 + 3


def _rank_and_size(environment: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    size = _integer(environment, size_name, 1, least=1)
    rank = _integer(environment, rank_name, 0)
    if rank >= size:
        raise expected(rank_name, f"an integer below {size_name}={size}", rank, OptionError)
    return rank, size


def _integer(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise expected(name, f"an integer of at least {least}", repr(text), OptionError)
    return int(text)


def _port(environment: Mapping[str, str], name: str) -> int:
    port = _integer(environment, name, 0)
    if not 0 < port < 65536:
        raise expected(name, "a port from 1 to 65535", port, OptionError)
    return port


class Unreachable(RuntimeError):
    """The store cannot be opened or reached, or is closed. The message is one sentence."""


class Gathering:
    """Exchanges values between the processes through a store on rank 0, without waiting forever for any of them.

    The constructor joins the store; `gather` is collective. seconds: how long rank 0 waits for the other ranks at each
    gathering. A rank that misses one gathering takes part in none of the later ones.
    """

    def __init__(self, world: World, seconds: float) -> None:
        import torch.distributed as dist

        self.world = world
        self.present = list(range(world.size))
        self._seconds = seconds
        self._number = 0
        master = world.rank == 0 and not world.hosted
        try:
            store = dist.TCPStore(
                world.host,
                world.port,
                is_master=master,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except (RuntimeError, ValueError) as error:
            if master:
                text = f"rank 0 cannot listen at {world.host}:{world.port}"
            else:
                text = f"{world.node} cannot reach rank 0 at {world.host}:{world.port} within {seconds:g} seconds"
            raise Unreachable(f"{text} ({_reason(error)})") from None
        self._store = dist.PrefixStore("vcrd-doctor", store)

    def gather(self, value: Any, seconds: float = 0.0) -> dict[int, Any]:
        """The JSON value of each rank that takes part, by rank. seconds: extra time that ranks may need.

        Unreachable if rank 0 is gone, or went on without this rank.
        """
        self._number += 1
        timeout = self._seconds + seconds
        try:
            self._store.set(self._key(self.world.rank), json.dumps(value))
            if self.world.rank == 0:
                self._publish(time.monotonic() + timeout)
            self._store.wait([self._key("all")], timedelta(seconds=timeout + _RANK_0_GRACE))
            found = json.loads(self._store.get(self._key("all")))
        except (RuntimeError, ValueError) as error:
            raise Unreachable(f"rank 0 does not answer {self.world.node} ({_reason(error)})") from None
        if str(self.world.rank) not in found:
            raise Unreachable(
                f"rank {self.world.rank} on {self.world.node} came too late: rank 0 went on without it"
            )
        self.present = sorted(map(int, found))
        return {int(rank): value for rank, value in found.items()}

    def leave(self) -> None:
        """Called after the last gathering: rank 0 keeps the store open until all ranks have read it. Never fails."""
        try:
            left = self._store.add("left", 1)
            deadline = time.monotonic() + _LEAVE_TIMEOUT
            while self.world.rank == 0 and left < len(self.present) and time.monotonic() < deadline:
                time.sleep(0.01)
                left = self._store.add("left", 0)
        except RuntimeError:
            pass

    def _publish(self, deadline: float) -> None:
        missing, found = list(self.present), {}
        while missing:
            came = [rank for rank in missing if self._store.check([self._key(rank)])]
            found |= {rank: json.loads(self._store.get(self._key(rank))) for rank in came}
            missing = [rank for rank in missing if rank not in came]
            if missing and time.monotonic() > deadline:
                break
            if missing:
                time.sleep(0.02)
        self._store.set(self._key("all"), json.dumps(found))

    def _key(self, name: int | str) -> str:
        return f"{self._number}/{name}"


def _reason(error: BaseException) -> str:
    """The message of torch without its source location."""
    return first_line(error).partition(". This may")[0].partition(" Exception raised")[0][:200]
