"""Figures in Megatron's own log, TensorBoard and W&B, over all ranks and a whole interval; telemetry of each rank."""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import sub
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.link.student import Waits
from vcrd.loss.config import LossConfig
from vcrd.megatron.layout import Groups, Layout
from vcrd.megatron.report import Figures, Report
from vcrd.megatron.training_loop import TrainingLoop
from vcrd.monitor.bottleneck import Setup, Wait, cause, sentence
from vcrd.monitor.telemetry import FIELDS, Telemetry
from vcrd.settings import DistillSettings, of_teacher

_log = logging.getLogger("vcrd")
QUANTILES = (10, 50, 90)
_SHOWN = 64  # the most ranks that have a curve each in TensorBoard and W&B
# Reported for each step beside Megatron's "lm loss": the key in its report, and the field of the figures.
STEP_KEYS = {
    "vcrd divergence": "divergence",
    "vcrd cross entropy": "cross_entropy",
    "vcrd weight": "weight",
}


def with_step_sums(
    loss_func: Callable[..., Any], sums: Callable[[], dict[str, Tensor]]
) -> Callable[..., Any]:
    """The script's `loss_func`, with `sums()`, pairs [sum over tokens, tokens], added to its report.

    Megatron adds up such pairs over micro-batches and over data- and context-parallel ranks before it divides, and
    shows them in its log line, in TensorBoard and in W&B. A return of (loss, report) or (loss, tokens, report) is
    extended; any other is left alone.
    """

    def reporting(*args: Any, **kwargs: Any) -> Any:
        found = loss_func(*args, **kwargs)
        if isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[-1], dict):
            return (*found[:-1], {**found[-1], **sums()})
        return found

    return reporting


class IntervalLog:
    """Writes the figures of every --log-interval iterations, on the last rank, and records the waits of each step.

    teacher: `RemoteTeacher` or `ColocatedTeacher`, whose waits and bytes are written. Collectives, where the training
    loop is known, once per interval: `Report.take` over the data-parallel group with context parallelism on ranks of
    the last stage, and one all-gather of one `Row` per teacher over the world.
    """

    def __init__(self, settings: DistillSettings, teacher: Any) -> None:
        self._settings = settings
        self._teacher = teacher
        self._layout: Layout | None = None
        self._begun: float | None = None  # when the interval began
        self._steps = 0  # in the interval
        # The running sums when the last step ended, and when the interval began.
        self._of_step = Waits()
        self._of_interval = teacher.each()
        self._parts_of_step, self._parts_of_interval = Parts(), Parts()
        self.clock = StepClock()
        self.telemetry: Telemetry | None = None

    def begin(self, layout: Layout | None) -> None:
        """Before the first step, after the teacher has come. layout: on ranks of the last stage, else None."""
        if self._begun is None or (self._layout is None and layout is not None):
            self._layout = layout
            self._start_anew()

    def end_step(self, report: Report | None, loop: TrainingLoop | None) -> None:
        """At the end of a step, on every rank. report: on ranks of the last stage; taken when the interval ends.

        loop: None if the script trains by a loop of its own; it takes the report itself.
        """
        self._steps += 1
        iteration = None if loop is None else loop.iteration
        self._tell_step(iteration)
        if loop is None or iteration % loop.log_interval:
            return
        figures = None if report is None else report.take(self._layout.groups.data_context)
        rows = gathered(self._rows())
        # The writers and the log line belong to the last rank, in both loops.
        if dist.get_rank() == dist.get_world_size() - 1:
            self._write(loop, iteration, figures, rows)
        self._start_anew()

    def record(self, iteration: int, figures: Figures) -> None:
        """Writes figures that a script took itself to this rank's records. Not a collective."""
        if self.telemetry is not None:
            self.telemetry.at(iteration)
        rows = [[row] for row in self._rows()]
        self._warn_if_starved(iteration, rows)
        self._record(_written(figures, rows), figures, rows)
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

    def _rows(self) -> list[Row]:
        """What this rank measured in the interval, for each teacher."""
        latest = {} if self.telemetry is None else self.telemetry.latest
        rows = []
        for now, before in zip(self._teacher.each(), self._of_interval, strict=True):
            waits, (replica, replicas) = now.waits.since(before.waits), now.served_by
            rows.append(
                Row(
                    waited=waits.seconds,
                    arriving=waits.arriving,
                    while_lost=waits.while_lost,
                    answers=waits.answers,
                    late=waits.late,
                    received=now.received - before.received,
                    replica=math.nan if replica is None else replica,
                    replicas=replicas,
                    **latest,
                )
            )
        return rows

    def _start_anew(self) -> None:
        self._begun, self._steps = time.perf_counter(), 0
        self._of_interval = self._teacher.each()
        self._parts_of_interval = self.clock.parts

    def _write(self, loop: TrainingLoop, iteration: int, figures: Figures, rows: list[list[Row]]) -> None:
        values = _written(figures, rows)
        if figures.invalid_rows:
            wrong = [f"{each.name} ({each.invalid_rows})" for each in figures.teachers if each.invalid_rows]
            _log.warning(
                "%d tokens up to iteration %d were skipped, because the teacher's logits were no distribution%s",
                figures.invalid_rows,
                iteration,
                f": {', '.join(wrong)}" if wrong else "",
            )
        text = " | ".join(f"{name.replace('_', ' ')}: {value:.6g}" for name, value in values.items())
        print(f" [vcrd] iteration {iteration:8d}/{loop.iterations:8d} | {text} |", flush=True)
        self._warn_if_starved(iteration, rows)
        self._record(values, figures, rows)
        writer, wandb = loop.tensorboard, loop.wandb
        share = values["teacher_wait"] / self._seconds()
        tagged = {**values, "teacher_wait_share": share, **over_ranks(rows[0])}
        tagged = {f"vcrd/{name}": value for name, value in tagged.items()}
        if writer is not None:
            for name, value in tagged.items():
                writer.add_scalar(name, value, iteration)
        if wandb is not None:
            wandb.log(tagged, iteration)

    def _seconds(self) -> float:
        """Seconds since the interval began."""
        return max(1e-9, time.perf_counter() - self._begun)

    def _record(self, values: dict[str, float], figures: Figures, rows: list[list[Row]]) -> None:
        if self.telemetry is None:
            return
        self.telemetry.write(
            "figures",
            **values,
            steps=self._steps,
            seconds=self._seconds(),
            **vars(self.clock.parts.since(self._parts_of_interval)),
            teacher_wait_by_replica={
                f"{wait.teacher}/{wait.replica}" if wait.teacher else wait.replica: wait.share
                * self._seconds()
                for wait in self._waits(rows)
            },
            weight_histogram=_trimmed(figures.weight_histogram),
            validity_histogram=figures.validity_histogram,
        )

    def _waits(self, rows: list[list[Row]]) -> list[Wait]:
        found = []
        for name, of_one in zip(self._teacher.names, rows, strict=True):
            found += by_replica(of_one, self._seconds(), name)
        return found

    def _warn_if_starved(self, iteration: int, rows: list[list[Row]]) -> None:
        """Warns, in one line at most, of the teacher replica with the longest wait."""
        worst = max(self._waits(rows), key=lambda wait: wait.share, default=None)
        said = None if worst is None else sentence(worst, self._setup(worst.teacher, rows))
        if said is None:
            return
        _log.warning("iteration %d: %s", iteration, said)
        if self.telemetry is not None:
            self.telemetry.write(
                "starved",
                **({"teacher": worst.teacher} if worst.teacher else {}),
                replica=worst.replica,
                share=worst.share,
                cause=cause(worst),
                sentence=said,
            )

    def _setup(self, teacher: str, rows: list[list[Row]]) -> Setup:
        link = self._settings.link
        own = rows[self._teacher.names.index(teacher)]
        return Setup(
            payload=of_teacher("payload", link.payload, teacher),
            columns=self._layout.padded_vocab_size // self._layout.tensor_size,
            top_k=of_teacher("top_k", link.top_k, teacher),
            temperature=self._settings.temperature,
            credits=link.credits,
            replicas=int(max(row.replicas for row in own)),
            data_ranks=self._layout.data_size,
        )


def _written(figures: Figures, rows: list[list[Row]]) -> dict[str, float]:
    """The written figures. rows: of each teacher, those of the ranks."""
    waited = [sum(row.waited for row in of_rank) for of_rank in zip(*rows, strict=True)]
    received = sum(row.received for of_one in rows for row in of_one)
    waits = [max(row.waited for row in of_one) for of_one in rows]
    return scalars(figures, max(waited), received, waits)


def scalars(figures: Figures, wait: float, received: float, waits: Sequence[float] = ()) -> dict[str, float]:
    """The written figures by name. wait: seconds of the rank that waited longest. received: bytes. waits: for each
    teacher, the seconds of the rank that waited longest for it.

    The figures of a teacher that has a name are "name/tokens" and so on. Means over no token are left out.
    """
    names = ("tokens", "loss", "divergence", "cross_entropy", "weight")
    values = {name: float(getattr(figures, name)) for name in names}
    for percent in QUANTILES:
        values[f"weight_p{percent}"] = figures.weight_quantile(percent / 100)
    for name in ("student_more_valid", "agreement", "invalid_rows", "verifier_time"):
        values[name] = float(getattr(figures, name))
    values = {**values, "teacher_wait": wait, "link_bytes": received}
    for each, waited in zip(figures.teachers, waits, strict=False):
        means = ("divergence", "weight", "agreement") if each.tokens else ()
        for name in ("tokens", *means, "invalid_rows"):
            values[f"{each.name}/{name}"] = float(getattr(each, name))
        values[f"{each.name}/teacher_wait"] = waited
    return values


def _trimmed(counts: tuple[int, ...]) -> list:
    """[number of the first bin, counts from there on], without the empty bins at both ends."""
    full = [number for number, count in enumerate(counts) if count]
    return [full[0], counts[full[0] : full[-1] + 1]] if full else [0, []]


class Row(NamedTuple):
    """What one rank measured in one interval.

    waited, arriving, while_lost: seconds, see `Waits`. received: bytes. replica: the teacher replica that serves this
    rank, NaN if none does. The fields after `replicas` are `vcrd.monitor.telemetry.FIELDS`, NaN if not measured.
    """

    waited: float
    arriving: float
    while_lost: float
    answers: float
    late: float
    received: float
    replica: float
    replicas: float
    gpu_memory_bytes: float = math.nan
    gpu_utilization: float = math.nan
    gpu_power_watts: float = math.nan
    nvlink_sent_bytes_per_second: float = math.nan
    nvlink_received_bytes_per_second: float = math.nan
    host_memory_bytes: float = math.nan


def gathered(rows: list[Row]) -> list[list[Row]]:
    """The rows of each teacher, those of all ranks in rank order: one all-gather of 14 float64 per teacher over the
    world, one wait for the device. rows: this rank's, one for each teacher."""
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    mine = torch.tensor(rows, dtype=torch.float64, device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [[Row(*values) for values in of_one] for of_one in torch.stack(found, 1).tolist()]


def by_replica(rows: Sequence[Row], seconds: float, teacher: str = "") -> list[Wait]:
    """For each replica of a teacher, the longest wait of a rank for it, in an interval of that many seconds."""
    worst: dict[int, Row] = {}
    for row in rows:
        if not math.isnan(row.replica):
            other = worst.setdefault(int(row.replica), row)
            worst[int(row.replica)] = max(row, other, key=lambda each: each.waited)
    return [
        Wait(
            replica=replica,
            share=min(1.0, row.waited / seconds),
            arriving=row.arriving / row.waited if row.waited else 0.0,
            while_lost=row.while_lost / row.waited if row.waited else 0.0,
            late=row.late / row.answers if row.answers else 0.0,
            bytes_per_second=row.received / seconds,
            teacher=teacher,
        )
        for replica, row in sorted(worst.items())
    ]


def over_ranks(rows: Sequence[Row]) -> dict[str, float]:
    """Minimum, mean and maximum of each measured field over ranks; with few ranks also the value of each rank."""
    found = {}
    for field in FIELDS:
        values = {n: getattr(row, field) for n, row in enumerate(rows) if not math.isnan(getattr(row, field))}
        if not values:
            continue
        found[f"{field}_min"] = min(values.values())
        found[f"{field}_mean"] = sum(values.values()) / len(values)
        found[f"{field}_max"] = max(values.values())
        if len(rows) <= _SHOWN:
            found.update({f"{field}/rank_{number}": value for number, value in values.items()})
    return found


@dataclass
class Parts:
    """Seconds of the host in each part of a step. On the CPU they are the device's too.

    forward: the script's forward step, with the waits for teacher and verifier. backward: the rest of the schedule,
    with the time that pipeline stages wait for each other. gradients: `finalize_model_grads_func`, where data-parallel
    ranks reduce them. between: from there to the first forward of the next step: optimizer, logging, checkpoints.

    On a GPU the host runs ahead of the device. A part then includes the time that the host waits for the device in it;
    `gpu_utilization` and a profiler tell more.
    """

    forward: float = 0.0
    backward: float = 0.0
    gradients: float = 0.0
    between: float = 0.0

    def since(self, before: Parts) -> Parts:
        return Parts(*map(sub, vars(self).values(), vars(before).values()))


class StepClock:
    """Where the time of the steps goes on this rank: running sums since the first step. `parts` is a copy."""

    def __init__(self) -> None:
        self._sums = Parts()
        self._mark: float | None = None
        self._in_schedule = False

    @property
    def parts(self) -> Parts:
        return replace(self._sums)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the script's forward step, in training."""
        self._lap("backward" if self._in_schedule else "between")
        self._in_schedule = True
        try:
            yield
        finally:
            self._lap("forward")

    def end_backward(self) -> None:
        self._lap("backward")

    def end_step(self) -> None:
        self._lap("gradients")
        self._in_schedule = False

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        if self._mark is not None:  # the time before the first step belongs to no part
            setattr(self._sums, part, getattr(self._sums, part) + now - self._mark)
        self._mark = now


def start_telemetry(
    chunk: torch.nn.Module, settings: DistillSettings, role: str, teacher: Any = None
) -> Telemetry | None:
    """This rank's telemetry, with its record "start"; None if the settings name no folder. Not a collective.

    teacher: a student's `RemoteTeacher` or `ColocatedTeacher`, whose received bytes are recorded.
    """
    if settings.telemetry_dir is None:
        return None
    device = next((parameter.device for parameter in chunk.parameters()), torch.device("cpu"))
    uuid, name = None, platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        uuid, name = str(properties.uuid), properties.name
    found = Telemetry(settings.telemetry_dir, role, dist.get_rank(), uuid=uuid)
    found.write("start", device=name, **_facts(settings, Groups.of(chunk)))
    if teacher is not None:
        found.follow("link_bytes", lambda: teacher.bytes_received)
    return found


def _facts(settings: DistillSettings, groups: Groups) -> dict[str, Any]:
    """The run and this rank's place in it, as `python -m vcrd report` shows them."""
    names = (
        "divergence",
        "temperature",
        "weighting",
        "normalization",
        "ce_weight",
        "teacher_weights",
        "teacher_mixture",
    )
    made_with = LossConfig(**settings.loss_arguments()).weight_map._asdict()
    link = ("payload", "transport", "credits")
    return {
        "world": dist.get_world_size(),
        "tensor_rank": groups.tensor.rank(),
        "tensor_size": groups.tensor.size(),
        "pipeline_rank": groups.pipeline.rank(),
        "pipeline_size": groups.pipeline.size(),
        "context_size": groups.context.size(),
        "data_rank": groups.data.rank(),
        "data_size": groups.data.size(),
        "torch": torch.__version__,
        "validity": settings.validity if isinstance(settings.validity, str) else "a function",
        "settings": {name: getattr(settings, name) for name in names}
        | made_with
        | {name: getattr(settings.link, name) for name in link},
    }
