"""Runs functions in several worlds of processes at once, as two torchrun jobs would be, and leaves none behind."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class World:
    """`run(*arguments)` on size processes with Megatron's parallel state of tensor x pipeline (x data) ranks."""

    run: Callable[..., Any]
    size: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    arguments: tuple = field(default=())


def run_worlds(*worlds: World, seconds: float = 150) -> list[list[Any]]:
    """What each rank of each world returned. AssertionError with the traceback of the first that failed."""
    # Forked from a server that has imported torch and Megatron once and started no thread.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["worlds_preload"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # all that the server knows of where modules are
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number, world in enumerate(worlds):
            for rank in range(world.size):
                arguments = (world, rank, Path(folder), number)
                processes.append(context.Process(target=_process, args=arguments, daemon=True))
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), time.monotonic() + seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [
            [
                torch.load(Path(folder) / f"{n}-{rank}.result", weights_only=False)
                for rank in range(world.size)
            ]
            for n, world in enumerate(worlds)
        ]


def _wait(processes: list, folder: Path, deadline: float) -> None:
    while any(process.is_alive() for process in processes):
        failed = [process for process in processes if process.exitcode not in (None, 0)]
        assert not failed, _error(folder) or f"a process ended with {failed[0].exitcode}"
        assert time.monotonic() < deadline, "the processes did not end in time"
        time.sleep(0.02)
    failed = [process for process in processes if process.exitcode != 0]
    assert not failed, _error(folder) or f"a process ended with {failed[0].exitcode}"


def _error(folder: Path) -> str:
    # The other ranks may fail because one did: the first to write is the cause.
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
    parallel_state.initialize_model_parallel(
        world.tensor, world.pipeline, virtual_pipeline_model_parallel_size=world.virtual
    )
    model_parallel_cuda_manual_seed(1)
    try:
        return world.run(*world.arguments)
    finally:
        dist.destroy_process_group()
