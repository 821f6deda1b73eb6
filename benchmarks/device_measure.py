"""Measures jobs on one device, side by side in this process: forward, forward and backward, memory, error."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from device_methods import Job, true_gradient
from loss_measure import CpuMeter
from loss_methods import Method

WARMUPS = 3
CHECKED_ROWS = 8


@dataclass(frozen=True)
class Case:
    """One shape. `vocab` is the whole vocabulary, `columns` the shard of one of `vocab / columns` ranks."""

    tokens: int
    columns: int
    vocab: int
    dtype: str
    repeats: int


@dataclass(frozen=True)
class Figures:
    """Seconds of each run, and the growth of the device memory to the peak of a run, in bytes."""

    forward: list[float]
    both: list[float]
    extra_bytes: int
    gradient_error: float


class CudaClock:
    """Measures the device, not the host: during a short sleep of the device the host queues the work, as in
    training. If a method makes the host wait, this time counts."""

    SLEEP_CYCLES = 4_000_000  # about 2 ms, longer than a forward and backward takes to queue

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def prepare(self) -> None:
        """Flushes the L2 cache and keeps the device busy for a moment."""
        self._flush.zero_()
        torch.cuda._sleep(self.SLEEP_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def start_memory(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def extra_bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class HostClock:
    """The same on CPU, so that the rest can be tested anywhere."""

    def __init__(self) -> None:
        self._meter = CpuMeter()

    def prepare(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def start_memory(self) -> None:
        self._meter.start()

    def extra_bytes(self) -> int:
        return self._meter.extra_bytes()

    def clean(self) -> None:
        gc.collect()


CLOCKS = {"cuda": CudaClock, "cpu": HostClock}


class DeviceBench:
    def __init__(self, case: Case, device: str, clock: CudaClock | HostClock) -> None:
        self.case, self.clock = case, clock
        dtype, shape = getattr(torch, case.dtype), (case.tokens, case.columns)
        generator = torch.Generator(device).manual_seed(1)
        # Spread like trained logits: a few tokens hold most of the probability, and the models mostly agree.
        self.teacher = torch.empty(shape, dtype=dtype, device=device).normal_(0, 4, generator=generator)
        self.student = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        self.student.add_(self.teacher)
        self.kept = self.student.clone()
        self.student.requires_grad_()
        self.labels = torch.randint(case.columns, (case.tokens,), device=device, generator=generator)
        self.rows = torch.linspace(0, case.tokens - 1, min(CHECKED_ROWS, case.tokens)).long().to(device)
        self._truths: dict[str, Tensor] = {}

    def copy(self) -> list[float]:
        """Seconds to copy as many bytes as both tensors have, which is twice the least time to read them."""
        size = self.student.numel() * (self.student.element_size() + self.teacher.element_size())
        source = torch.empty(size, dtype=torch.uint8, device=self.student.device).fill_(1)
        target = torch.empty_like(source)
        times = []
        for run in range(WARMUPS + self.case.repeats):
            self.clock.prepare()
            start = self.clock.mark()
            target.copy_(source)
            if run >= WARMUPS:
                times.append(self.clock.seconds(start, self.clock.mark()))
        return times

    def measure(self, job: Job) -> Figures | str:
        """The results, or the reason why there are none."""
        if self.case.dtype not in job.dtypes:
            return f"its gradient is always {job.dtypes[0]}"
        try:
            method = job.build()
            return method if isinstance(method, str) else self._figures(job, method)
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:  # a failure of a peer must not end the table
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        finally:
            self.clock.clean()

    def _figures(self, job: Job, method: Method) -> Figures:
        gradient = None
        for _ in range(WARMUPS):
            del gradient  # before the next one is made, because two may not fit
            gradient = self.run(method)[0]
        error = self._gradient_error(job, gradient)
        del gradient
        self._restore()
        self.clock.start_memory()
        self.run(method)
        extra = self.clock.extra_bytes()
        times = [self.run(method)[1:] for _ in range(self.case.repeats)]
        return Figures([forward for forward, _ in times], [both for _, both in times], extra, error)

    def _restore(self) -> None:
        """Restores the logits, which an in-place gradient has overwritten."""
        with torch.no_grad():
            self.student.copy_(self.kept)

    def run(self, method: Method) -> tuple[Tensor, float, float]:
        """The gradient for the layer below, and the seconds of forward and of both passes."""
        self._restore()
        self.clock.prepare()
        start = self.clock.mark()
        loss = method(self.student, self.teacher, self.labels)
        middle = self.clock.mark()
        (gradient,) = torch.autograd.grad(loss, self.student, self._ones(loss))
        end = self.clock.mark()
        return gradient, self.clock.seconds(start, middle), self.clock.seconds(start, end)

    def _ones(self, loss: Tensor) -> Tensor:
        """The gradient of a summed loss, made once, so that no method waits for it."""
        if getattr(self, "_kept_ones", None) is None or self._kept_ones.shape != loss.shape:
            self._kept_ones = torch.ones_like(loss)
        return self._kept_ones.to(loss.dtype)

    def _gradient_error(self, job: Job, gradient: Tensor) -> float:
        """|gradient - truth| / |truth| over a few rows."""
        if job.truth not in self._truths:
            rows = (t[self.rows].cpu() for t in (self.kept, self.teacher, self.labels))
            self._truths[job.truth] = true_gradient(job.truth, *rows)
        truth = self._truths[job.truth]
        got = gradient[self.rows].cpu().double() * (self.case.tokens if job.mean else 1)
        return ((got - truth).norm() / truth.norm()).item()


def measure_case(
    case: Case, device: str, jobs: Sequence[Job], refuse: Callable[[Job], str | None] = lambda job: None
) -> tuple[list[float], dict[str, Figures | str]]:
    """Seconds of the copy, and the results of each job. `refuse` may return why a job is left out."""
    # Functions compiled for other shapes would count towards the limit of recompilations.
    torch._dynamo.reset()
    clock = CLOCKS[device]()
    try:
        bench = DeviceBench(case, device, clock)
        copied = bench.copy()
    except torch.OutOfMemoryError:
        return [], {job.name: "out of memory for the logits alone" for job in jobs}
    clock.clean()
    return copied, {job.name: refuse(job) or bench.measure(job) for job in jobs}
