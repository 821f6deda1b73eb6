"""Runs functions in several worlds of processes at once, like two torchrun jobs, and ends all processes."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fork_server import context


@dataclass(frozen=True)
class World:
    """`run(*arguments)` on size processes with Megatron's parallel state of tensor x pipeline (x data) ranks.

    tensor 0: without that state, for a script that initializes it.
    """

    run: Callable[..., Any]
    size: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    arguments: tuple = field(default=())


class Started:
    """A running world."""

    def __init__(self, world: World, folder: Path, number: int, context: Any) -> None:
        self._folder = folder
        self._number = number
        self.processes = [
            context.Process(target=_process, args=(world, rank, folder, number), daemon=True)
            for rank in range(world.size)
        ]
        for process in self.processes:
            process.start()

    def kill(self, *ranks: int) -> None:
        """Sends SIGKILL to these ranks, by default to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
            self.processes[rank].join()

    def check(self) -> None:
        """AssertionError with the traceback of the first rank that failed, if one has."""
        failed = [process for process in self.processes if process.exitcode not in (None, 0)]
        assert not failed, _error(self._folder) or f"a process ended with {failed[0].exitcode}"

    def results(self) -> list[Any]:
        """The return value of each rank, when all have ended."""
        return [
            torch.load(self._folder / f"{self._number}-{rank}.result", weights_only=False)
            for rank in range(len(self.processes))
        ]


class Worlds:
    """Starts worlds one after another, and ends them with the block."""

    def __init__(self, processes: Any = None) -> None:
        """processes: a multiprocessing context; default: that of the fork server."""
        self._context = context() if processes is None else processes
        self._started: list[Started] = []

    def __enter__(self) -> Worlds:
        self._temporary = tempfile.TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        return self

    def __exit__(self, *_: object) -> None:
        for started in self._started:
            started.kill()
        self._temporary.cleanup()

    def start(self, world: World) -> Started:
        started = Started(world, self._folder, len(self._started), self._context)
        self._started.append(started)
        return started

    def wait(self, *worlds: Started, seconds: float = 150) -> list[list[Any]]:
        """The return value of each rank. AssertionError with the traceback of the first rank that failed."""
        deadline = time.monotonic() + seconds
        processes = [process for world in worlds for process in world.processes]
        while True:
            alive = any(process.is_alive() for process in processes)
            for world in worlds:
                world.check()
            if not alive:
                return [world.results() for world in worlds]
            assert time.monotonic() < deadline, "the processes did not end in time"
            time.sleep(0.02)


def run_worlds(*worlds: World, seconds: float = 150) -> list[list[Any]]:
    """The return value of each rank of each world. AssertionError with the traceback of the first failure."""
    with Worlds() as under_way:
        return under_way.wait(*[under_way.start(world) for world in worlds], seconds=seconds)


def _error(folder: Path) -> str:
    # Other ranks may fail as a consequence, so the first error is the cause.
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    return errors[0].read_text() if errors else ""


def _process(world: World, rank: int, folder: Path, number: int) -> None:
    try:
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world.size), USE_LIBUV="0")
        torch.set_num_threads(1)
        from vcrd.megatron import cpu

        with cpu.on_cpu():
            result = _in_world(world, rank, folder / f"{number}.store")
        torch.save(result, folder / f"{number}-{rank}.result")
    except BaseException:
        (folder / f"{number}-{rank}.error").write_text(
            f"world {number}, rank {rank}\n{traceback.format_exc()}"
        )
        raise


def _in_world(world: World, rank: int, store: Path) -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world.size)
    if world.tensor:
        parallel_state.initialize_model_parallel(
            world.tensor, world.pipeline, virtual_pipeline_model_parallel_size=world.virtual
        )
        model_parallel_cuda_manual_seed(1)
    try:
        return world.run(*world.arguments)
    finally:
        dist.destroy_process_group()
