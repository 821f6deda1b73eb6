"""Processes that have imported Megatron-Bridge already. The import takes ten seconds of a core, a fork a tenth."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """`run(*arguments)` on `size` processes with the variables of torchrun; what they print goes to `log`."""

    run: Callable[..., Any]
    arguments: tuple
    log: Path
    size: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def script(path: str, *arguments: Any) -> None:
    """Runs a script of this checkout as the main program."""
    sys.argv = [str(ROOT / path), *map(str, arguments)]
    runpy.run_path(sys.argv[0], run_name="__main__")


class Forks:
    """A process that has imported Bridge, and forks the processes of jobs."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(sys.path)))
        self._process.start()

    def run(self, *jobs: Job, seconds: float = 150) -> list[list[Any]]:
        """What each rank of each job returned. AssertionError with the end of the logs if one has failed."""
        self._pipe.send((jobs, seconds))
        error = self._pipe.recv()
        assert not error, error
        return [[torch.load(_result(job, rank)) for rank in range(job.size)] for job in jobs]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()


def _result(job: Job, rank: int) -> Path:
    return job.log.with_suffix(f".{rank}.result")


def _serve(pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    from vcrd.megatron import cpu

    with cpu.on_cpu():
        import megatron.bridge.data.builders.gpt_sft
        import megatron.bridge.training.gpt_step
        import megatron.bridge.training.model_load_save
        import megatron.bridge.training.pretrain
        import megatron.bridge.training.utils.omegaconf_utils  # noqa: F401
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    context = multiprocessing.get_context("fork")
    while (asked := pipe.recv()) is not None:
        pipe.send(_run(context, *asked))


def _run(context: Any, jobs: Sequence[Job], seconds: float) -> str:
    """The errors; "" without."""
    deadline = time.monotonic() + seconds
    ranks = []
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.unlink(missing_ok=True)
        port = free_port()
        # Not daemonic, because Megatron's checkpoints are written by processes of their own.
        ranks += [context.Process(target=_rank, args=(job, rank, port)) for rank in range(job.size)]
    try:
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    logs = "\n".join(f"{job.log}:\n{job.log.read_text()[-3000:]}" for job in jobs if job.log.exists())
    return f"exit codes {codes}\n{logs}" if any(code != 0 for code in codes) else ""


def _rank(job: Job, rank: int, port: int) -> None:
    file = os.open(job.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for name in [name for name in os.environ if name.startswith("VCRD_")]:
        del os.environ[name]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.size, "LOCAL_WORLD_SIZE": job.size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "USE_LIBUV": 0}
    os.environ.update({name: str(value) for name, value in place.items()}, **job.environment)
    torch.set_num_threads(1)  # as torchrun sets OMP_NUM_THREADS
    try:
        torch.save(job.run(*job.arguments), _result(job, rank))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves these out
        sys.stdout.flush()
        sys.stderr.flush()
