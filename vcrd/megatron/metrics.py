"""The figures in Megatron's own log, TensorBoard and W&B: sums over tokens, of all ranks and the whole interval."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from vcrd.link.student import Waits
from vcrd.megatron.layout import Layout
from vcrd.megatron.ranks import Row, by_replica, gathered, over_ranks
from vcrd.megatron.report import Figures, Report
from vcrd.megatron.step_clock import Parts, StepClock
from vcrd.monitor.bottleneck import Setup, cause, sentence
from vcrd.monitor.telemetry import Telemetry
from vcrd.settings import DistillSettings

_log = logging.getLogger("vcrd")
QUANTILES = (10, 50, 90)
# Of each step, beside Megatron's own "lm loss": key of its report, and field of the figures.
STEP_KEYS = {
    "vcrd divergence": "divergence",
    "vcrd cross entropy": "cross_entropy",
    "vcrd weight": "weight",
}


def megatron_globals() -> Any:
    """`megatron.training.global_vars` where a script uses it and has set it up, else None."""
    module = sys.modules.get("megatron.training.global_vars")
    return module if module is not None and getattr(module, "_GLOBAL_ARGS", None) is not None else None


def with_step_sums(loss_func: Callable[..., Any], sums: dict[str, Tensor]) -> Callable[..., Any]:
    """A script's `loss_func` whose report has `sums` too, pairs [sum over tokens, tokens].

    Megatron adds up such pairs over micro-batches and over data- and context-parallel ranks before it divides, and
    shows them in its log line, in TensorBoard and in W&B. Returns of (loss, report) and (loss, tokens, report) are
    extended; any other is left alone.
    """

    def reporting(*args: Any, **kwargs: Any) -> Any:
        found = loss_func(*args, **kwargs)
        if isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[-1], dict):
            return (*found[:-1], {**found[-1], **sums})
        return found

    return reporting


class IntervalLog:
    """Every --log-interval iterations the figures of all of them, written by the last rank; of each step its waits.

    teacher: `RemoteTeacher` or `ColocatedTeacher`, what it counts. Collectives, with `megatron.training` only, once per
    interval: `Report.take` over the data-parallel group with context parallelism on ranks of the last stage, and one
    all-gather of one `Row` over the world.
    """

    def __init__(self, settings: DistillSettings, teacher: Any) -> None:
        self._settings = settings
        self._teacher = teacher
        self._layout: Layout | None = None
        self._begun: float | None = None  # the interval
        self._steps = 0  # in it
        self._of_step, self._of_interval = Waits(), Waits()  # of the sums, what earlier ones have
        self._bytes_of_interval = 0
        self.clock = StepClock()
        self._parts_of_step, self._parts_of_interval = Parts(), Parts()  # likewise
        self.telemetry: Telemetry | None = None

    def begin(self, layout: Layout | None) -> None:
        """Before the first step, when the teacher is there. layout: on ranks of the last stage."""
        if self._begun is None or (self._layout is None and layout is not None):
            self._layout = layout
            self._start_anew()

    def end_step(self, report: Report | None) -> None:
        """At the end of a step, on every rank; report: on ranks of the last stage, taken where the interval ends."""
        self._steps += 1
        found = megatron_globals()
        iteration = None if found is None else found.get_args().curr_iteration + 1
        self._tell_step(iteration)
        if found is None or iteration % found.get_args().log_interval:
            return
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        figures = report.take(group) if report is not None else None
        rows = gathered(self._row())
        if (
            dist.get_rank() == dist.get_world_size() - 1
        ):  # Megatron's writers, and its log line, are this rank's
            self._write(found, iteration, figures, rows)
        self._start_anew()

    def record(self, iteration: int, figures: Figures) -> None:
        """Figures that a script took itself, to this rank's records. Not a collective."""
        if self.telemetry is not None:
            self.telemetry.at(iteration)
        rows = [self._row()]
        self._say_starved(iteration, rows)
        self._record(scalars(figures, rows[0].waited, rows[0].received), figures, rows)
        self._start_anew()

    def _tell_step(self, iteration: int | None) -> None:
        if self.telemetry is None:
            return
        if iteration is not None:
            self.telemetry.at(iteration)
        waits = self._teacher.waits
        added = waits.since(self._of_step)
        self.telemetry.add(
            steps=1,
            teacher_wait=added.seconds,
            arriving=added.arriving,
            while_lost=added.while_lost,
            **vars(self.clock.parts.since(self._parts_of_step)),
        )
        self._of_step, self._parts_of_step = waits, self.clock.parts

    def _row(self) -> Row:
        waits = self._teacher.waits.since(self._of_interval)
        replica, replicas = self._teacher.served_by
        return Row(
            waited=waits.seconds,
            arriving=waits.arriving,
            while_lost=waits.while_lost,
            answers=waits.answers,
            late=waits.late,
            received=self._teacher.bytes_received - self._bytes_of_interval,
            replica=math.nan if replica is None else replica,
            replicas=replicas,
            **({} if self.telemetry is None else self.telemetry.latest),
        )

    def _start_anew(self) -> None:
        self._begun, self._steps = time.perf_counter(), 0
        self._of_interval, self._bytes_of_interval = self._teacher.waits, self._teacher.bytes_received
        self._parts_of_interval = self.clock.parts

    def _write(self, found: Any, iteration: int, figures: Figures, rows: list[Row]) -> None:
        args = found.get_args()
        values = scalars(figures, max(row.waited for row in rows), sum(row.received for row in rows))
        if figures.invalid_rows:
            _log.warning(
                "%d tokens up to iteration %d were skipped, for their teacher was no distribution",
                figures.invalid_rows,
                iteration,
            )
        text = " | ".join(f"{name.replace('_', ' ')}: {value:.6g}" for name, value in values.items())
        print(f" [vcrd] iteration {iteration:8d}/{args.train_iters:8d} | {text} |", flush=True)
        self._say_starved(iteration, rows)
        self._record(values, figures, rows)
        writer, wandb = found.get_tensorboard_writer(), found.get_wandb_writer()
        share = values["teacher_wait"] / self._seconds()
        tagged = {**values, "teacher_wait_share": share, **over_ranks(rows)}
        tagged = {f"vcrd/{name}": value for name, value in tagged.items()}
        if writer is not None:
            for name, value in tagged.items():
                writer.add_scalar(name, value, iteration)
        if wandb is not None:
            wandb.log(tagged, iteration)

    def _seconds(self) -> float:
        """Of the interval, up to now."""
        return max(1e-9, time.perf_counter() - self._begun)

    def _record(self, values: dict[str, float], figures: Figures, rows: list[Row]) -> None:
        if self.telemetry is None:
            return
        self.telemetry.write(
            "figures",
            **values,
            steps=self._steps,
            seconds=self._seconds(),
            **vars(self.clock.parts.since(self._parts_of_interval)),
            teacher_wait_by_replica={
                wait.replica: wait.share * self._seconds() for wait in self._waits(rows)
            },
            weight_histogram=_trimmed(figures.weight_histogram),
            validity_histogram=figures.validity_histogram,
        )

    def _waits(self, rows: list[Row]) -> list:
        return by_replica(rows, self._seconds())

    def _say_starved(self, iteration: int, rows: list[Row]) -> None:
        """One line at most: of the replica that was waited for the longest."""
        worst = max(self._waits(rows), key=lambda wait: wait.share, default=None)
        said = None if worst is None else sentence(worst, self._setup(rows))
        if said is None:
            return
        _log.warning("iteration %d: %s", iteration, said)
        if self.telemetry is not None:
            self.telemetry.write(
                "starved", replica=worst.replica, share=worst.share, cause=cause(worst), sentence=said
            )

    def _setup(self, rows: list[Row]) -> Setup:
        link = self._settings.link
        return Setup(
            payload=link.payload,
            columns=self._layout.padded_vocab_size // self._layout.tensor_size,
            top_k=link.top_k,
            temperature=self._settings.temperature,
            credits=link.credits,
            replicas=int(max(row.replicas for row in rows)),
            data_ranks=self._layout.data_size,
        )


def scalars(figures: Figures, wait: float, received: float) -> dict[str, float]:
    """What is written of the figures, by name. wait: seconds, of the rank that waited longest. received: bytes."""
    names = ("tokens", "loss", "divergence", "cross_entropy", "weight")
    values = {name: float(getattr(figures, name)) for name in names}
    for percent in QUANTILES:
        values[f"weight_p{percent}"] = figures.weight_quantile(percent / 100)
    for name in ("student_more_valid", "agreement", "invalid_rows", "verifier_time"):
        values[name] = float(getattr(figures, name))
    return {**values, "teacher_wait": wait, "link_bytes": received}


def _trimmed(counts: tuple[int, ...]) -> list:
    """[number of the first bin, counts from there on], without the empty bins at either end."""
    full = [number for number, count in enumerate(counts) if count]
    return [full[0], counts[full[0] : full[-1] + 1]] if full else [0, []]
