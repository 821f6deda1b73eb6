"""Measures every method on one shape, in fresh processes, one per rank: times, memory, gradient error."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

import loss_methods as methods

WARMUPS = 2
CHECKED_ROWS = 16
LIMIT_SECONDS = 600  # for one case, because a method may hang


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    dtype: str
    tp: int
    threads: int  # of each rank
    repeats: int
    loss: str
    device: str


@dataclass(frozen=True)
class Result:
    """One method on one case. Seconds of the slowest rank for each time; bytes of rank 0."""

    times: list[float]
    extra_bytes: int
    gradient_bytes: int
    gradient_error: float


class CpuMeter:
    """Peak memory of a process, from the kernel: pages in RAM of torch and of all other libraries.

    pid: another process of the same user; None for this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._folder = f"/proc/{pid or 'self'}"

    def synchronize(self) -> None:
        pass  # CPU operators have finished when they return

    def start(self) -> None:
        release()
        self.mark()

    def mark(self) -> None:
        """As `start`, after the process itself has called `release`."""
        with open(f"{self._folder}/clear_refs", "w") as control:
            control.write("5")  # resets the peak to the current use
        self._before = self._read("VmRSS")

    def extra_bytes(self) -> int:
        return max(0, self._read("VmHWM") - self._before)

    def _read(self, field: str) -> int:
        with open(f"{self._folder}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def release() -> None:
    """Returns freed memory to the system, so that the next method cannot use it unnoticed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


METERS = {"cpu": CpuMeter}


def measure(case: Case) -> dict[str, Result | str]:
    """Results by name of the method; the reason if a method could not run. RuntimeError if a rank fails."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(case.threads)  # read when the child starts
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (case, os.path.join(folder, "store"), sender)
        ranks = [
            context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(case.tp)
        ]
        for process in ranks:
            process.start()
        sender.close()
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while not receiver.poll(1):
                if any(process.exitcode for process in ranks):
                    raise RuntimeError(f"a rank of {case} failed; its message is above")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{case} gave no result within {LIMIT_SECONDS} s")
            return receiver.recv()
        except EOFError as error:
            raise RuntimeError(f"a rank of {case} failed; its message is above") from error
        finally:
            for process in ranks:
                process.join(timeout=20)
                if process.is_alive():
                    process.kill()
                    process.join()


def _rank(rank: int, case: Case, store: str, sender: Connection) -> None:
    torch.set_num_threads(case.threads)
    warnings.simplefilter("ignore", FutureWarning)  # a warning of torch about names of collectives
    if case.tp > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=case.tp,
            timeout=timedelta(seconds=LIMIT_SECONDS),
        )
    results = _Bench(rank, case).run()
    if rank == 0:
        sender.send(results)
    if case.tp > 1:
        dist.destroy_process_group()


class _Bench:
    def __init__(self, rank: int, case: Case) -> None:
        self.case, self.meter = case, METERS[case.device]()
        shape, dtype = (case.tokens, case.vocab // case.tp), getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(1 + rank)
        # Spread like trained logits: a few tokens hold most of the probability, and the models mostly agree.
        teacher = torch.randn(shape, generator=generator).mul_(4)
        student = torch.randn(shape, generator=generator).add_(teacher)
        self.teacher, self.kept = teacher.to(case.device, dtype), student.to(case.device, dtype)
        self.student = self.kept.clone().requires_grad_()
        labels = torch.randint(case.vocab, (case.tokens,), generator=torch.Generator().manual_seed(0))
        self.labels = labels.to(case.device)
        self.rows = torch.linspace(0, case.tokens - 1, CHECKED_ROWS).long().to(case.device)

    def run(self) -> dict[str, Result | str]:
        case = self.case
        built = {name: methods.build(name, case.loss, case.tp) for name in methods.METHODS}
        ready = {name: method for name, method in built.items() if not isinstance(method, str)}
        errors, extra = {}, {}
        for name, method in ready.items():
            for _ in range(WARMUPS):
                gradient, _ = self.forward_backward(method)
            errors[name] = self.gradient_error(name, gradient)
            del gradient
            self.restore()
            self.meter.start()
            self.forward_backward(method, restored=True)
            extra[name] = self.meter.extra_bytes()
        times = {name: [] for name in ready}
        gc.disable()
        for _ in range(
            case.repeats
        ):  # all methods in each round, so that a slow moment of the machine affects all
            for name, method in ready.items():
                times[name].append(self.forward_backward(method)[1])
        size = self.student.numel() * self.student.element_size()
        out = {name: method for name, method in built.items() if isinstance(method, str)}
        for name in ready:
            out[name] = Result(self.slowest(times[name]), extra[name], size, errors[name])
        return out

    def restore(self) -> None:
        """Restores the logits, which an in-place gradient has overwritten. Touches the same pages for all methods."""
        with torch.no_grad():
            self.student.copy_(self.kept)

    def forward_backward(self, method: methods.Method, restored: bool = False) -> tuple[Tensor, float]:
        """The gradient for the layer below, and its seconds; nothing is accumulated or copied."""
        if not restored:
            self.restore()
        if self.case.tp > 1:
            dist.barrier()
        self.meter.synchronize()
        start = time.perf_counter()
        loss = method(self.student, self.teacher, self.labels)
        (gradient,) = torch.autograd.grad(loss.sum(), self.student)
        self.meter.synchronize()
        return gradient, time.perf_counter() - start

    def slowest(self, times: list[float]) -> list[float]:
        if self.case.tp == 1:
            return times
        together = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return together.tolist()

    def gradient_error(self, name: str, gradient: Tensor) -> float:
        """|gradient - truth| / |truth| over a few rows, whole vocabulary."""
        student, teacher, got = (self.whole(t[self.rows]) for t in (self.kept, self.teacher, gradient))
        truth = methods.true_gradient(name, self.case.loss, student, teacher, self.labels[self.rows].cpu())
        return ((got.double() - truth).norm() / truth.norm()).item()

    def whole(self, shard: Tensor) -> Tensor:
        shard = shard.detach().cpu()
        if self.case.tp == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.case.tp)]
        dist.all_gather(shards, shard)
        return torch.cat(shards, dim=-1)
