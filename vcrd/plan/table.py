"""The output of a plan: the assumptions, the costs of each payload, and the best payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vcrd.plan.choice import Choice, percent
from vcrd.plan.costs import Cost, colocated_step_seconds, student_seconds
from vcrd.plan.disk import stored
from vcrd.plan.scenario import Gpu, Model, Scenario
from vcrd.plan.traffic import request_bytes

_MOVED = ("payload", "into student", "out of teacher", "step", "once", "network", "busy", "error")
_TAKEN = (
    "payload",
    "student GPU",
    "student host",
    "teacher GPU",
    "teacher host",
    "loss adds",
    "waits",
    "step",
    "GPUs needed",
    "idle",
)
_STORED = (
    "payload",
    "per token",
    "a sequence",
    "in all",
    "files",
    "read per step",
    "disk busy",
    "step",
    "fill",
)


def table(scenario: Scenario, costs: Sequence[Cost], choice: Choice) -> str:
    moved = [_moved(cost) for cost in costs]
    taken = [_taken(cost, scenario) for cost in costs]
    best = next(cost for cost in costs if cost.payload == choice.payload)
    gpus = f"{best.replicas * scenario.replica_gpus} teacher GPUs"
    lines = [
        *_assumed(scenario),
        "",
        "Bytes of a micro-batch into the busiest student rank and out of the busiest teacher rank, of a step, and once",
        "at the start; network time of the busiest rank; error of a logit that is d below the maximum of its row.",
        *_aligned([_MOVED, *moved]),
        "",
        "Memory of one rank; time that the payload adds to the compute of the student; share of time that the student",
        "waits; time of a step; replicas x GPUs with which the student never waits; share of time that the teacher",
        "GPUs do not compute.",
        *_aligned([_TAKEN, *taken]),
        "",
        *_on_disk(scenario),
        f"best: {choice.payload}, {gpus} ({choice.reason})",
        *(f"  not {payload}: {reason}" for payload, reason in choice.against.items()),
    ]
    if best.waiting > 0:
        lines.append(
            f"  the student still waits {percent(best.waiting)} of its time: {_remedy(scenario, best)}"
        )
    lines += _without_a_link(scenario, best)
    return "\n".join(lines)


def _on_disk(run: Scenario) -> list[str]:
    if run.cache_tokens is None:
        return []
    rows = [
        (
            each.payload,
            f"{each.token_bytes:,}",
            f"{each.sequence_bytes:,}",
            _bytes(each.total_bytes),
            f"{each.files:,}",
            _bytes(each.step_bytes),
            percent(each.disk_share),
            _seconds(max(each.step_seconds, each.read_seconds)),
            f"{each.fill_gpu_seconds / 3600:,.3g} GPU h",
        )
        for each in stored(run)
    ]
    return [
        f"A cache of the answers about {run.cache_tokens:,} tokens: bytes per token, of a sequence, and of all files;",
        f"what a step reads, and the share of its time for this at {run.disk / 1e9:g} GB/s for all ranks; time of a",
        "step from the cache; time of the teacher for all answers.",
        *_aligned([_STORED, *rows]),
        "",
    ]


def _without_a_link(run: Scenario, best: Cost) -> list[str]:
    """What the GPUs of a step cost, and what they would cost with the teacher in the student's ranks."""
    teacher = best.replicas * run.replica_gpus
    linked = (run.student_gpus + teacher) * best.step_seconds
    inside = colocated_step_seconds(run)
    together = run.student_gpus * inside
    return [
        f"GPU seconds of a step: {linked:.3g} ({run.student_gpus} student GPUs, {teacher} teacher GPUs, idle "
        f"{percent(best.idle)} of the time)",
        f"  teacher in the student's ranks: {together:.3g} ({run.student_gpus} GPUs, steps of {_seconds(inside)})",
    ]


def _remedy(run: Scenario, best: Cost) -> str:
    if best.gpus_needed is not None:
        return f"it needs replicas={best.replicas_needed}"
    if best.network_share > 0.999:
        return "the network is too slow"
    return (
        f"replicas must be larger than tp {run.teacher_tensor} x pp {run.teacher_pipeline}; "
        f"the teacher's FLOPs alone take {best.least_gpus} GPUs"
    )


def json_values(scenario: Scenario, costs: Sequence[Cost], choice: Choice) -> dict[str, Any]:
    """The values for JSON. Bytes, seconds, FLOP/s; shares from 0 to 1."""
    cache = {} if scenario.cache_tokens is None else {each.payload: asdict(each) for each in stored(scenario)}
    return {
        "scenario": asdict(scenario)
        | {"teacher_padded": scenario.teacher_padded, "student_padded": scenario.student_padded},
        "request_bytes": _request_bytes(scenario),
        "student_compute_seconds": student_seconds(scenario),
        "payloads": {
            cost.payload: asdict(cost) | {"network_share": cost.network_share, "loss_share": cost.loss_share}
            for cost in costs
        },
        "best": choice._asdict(),
        "colocated_step_seconds": colocated_step_seconds(scenario),
        "cache": cache,
    }


def _assumed(run: Scenario) -> list[str]:
    steps = run.student_data * run.micro_batches
    compute = student_seconds(run)
    recompute = ", activations recomputed" if run.recompute else ""
    return [
        f"teacher  {_model(run.teacher)}, padded to {run.teacher_padded}",
        f"         tp {run.teacher_tensor} x pp {run.teacher_pipeline}, "
        f"{run.replicas or 'as many as needed'} x {run.replica_gpus} GPUs",
        f"student  {_model(run.student)}, padded to {run.student_padded}",
        f"         tp {run.student_tensor} x pp {run.student_pipeline} x cp {run.student_context} "
        f"x dp {run.student_data}: {run.student_gpus} GPUs",
        f"step     {steps} micro-batches of {run.batch} x {run.sequence} tokens; {run.credits} credits; "
        f"top {run.top_k}",
        *_context(run),
        f"assumed  student: {_gpu(run.student_gpu, run.student_fp8)}, MFU {run.student_mfu:g}{recompute}: "
        f"{_seconds(compute)} per micro-batch",
        f"         teacher: {_gpu(run.teacher_gpu, run.teacher_fp8)}, MFU {run.teacher_mfu:g}, forward only",
        f"         network: {run.network / 1e9:g} GB/s of each rank in each direction, over "
        f"{'NCCL' if run.over_nccl else 'TCP'}",
    ]


def _context(run: Scenario) -> list[str]:
    if not run.teacher_context:
        return []
    each, size = run.teacher_context, _request_bytes(run)
    return [f"context  {each} tokens per sequence that only the teacher sees; a request takes {size:,} bytes"]


def _request_bytes(run: Scenario) -> int:
    return request_bytes((run.sequence, run.batch), context=run.batch * run.teacher_context)


def _model(model: Model) -> str:
    active = f", {model.active / 1e9:.4g} B active" if model.active < model.params else ""
    name = f"{model.name}: " if model.name else ""
    return (
        f"{name}{model.params / 1e9:.4g} B parameters{active}, hidden {model.hidden}, {model.layers} layers, "
        f"vocabulary {model.vocab}"
    )


def _gpu(gpu: Gpu, fp8: bool) -> str:
    peak = gpu.fp8 if fp8 else gpu.bf16
    return f"{gpu.name}, {peak / 1e12:g} TFLOP/s in {'FP8' if fp8 else 'BF16'}"


def _moved(cost: Cost) -> tuple[str, ...]:
    return (
        cost.payload,
        f"{cost.received:,}",
        f"{cost.sent:,}",
        _bytes(cost.step_bytes),
        _bytes(cost.once_bytes) if cost.once_bytes else "-",
        _seconds(cost.network_seconds),
        percent(cost.network_share),
        cost.error,
    )


def _taken(cost: Cost, run: Scenario) -> tuple[str, ...]:
    if cost.gpus_needed is None:
        needed = f"> {run.student_data} x {run.replica_gpus}"
    else:
        needed = f"{cost.replicas_needed} x {run.replica_gpus}"
    return (
        cost.payload,
        _bytes(cost.student_gpu_bytes),
        _bytes(cost.student_host_bytes),
        _bytes(cost.teacher_gpu_bytes),
        _bytes(cost.teacher_host_bytes),
        percent(cost.loss_share),
        percent(cost.waiting) if cost.waiting > 0 else "-",
        _seconds(cost.step_seconds),
        needed,
        percent(cost.idle),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column is aligned left, all others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _bytes(count: float) -> str:
    """In decimal units, with three digits."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _seconds(seconds: float) -> str:
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"
