"""Reads the records of all ranks of a run into columns for the charts. A long run takes seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vcrd.monitor.records import read_records

TOKENS = "tokens.json"
_AT_ONCE = 4096  # records that are Python objects at the same time
_REQUIRED = ("time", "role", "rank", "iteration")  # every record has these
FIGURES = (
    "iteration",
    "time",
    "steps",
    "seconds",
    "tokens",
    "loss",
    "divergence",
    "cross_entropy",
    "weight",
    "weight_p10",
    "weight_p90",
    "student_more_valid",
    "agreement",
    "invalid_rows",
    "verifier_time",
    "forward",
    "backward",
    "gradients",
    "between",
)
OF_RANK = (
    "time",
    "seconds",
    "gpu_memory_bytes",
    "gpu_utilization",
    "gpu_power_watts",
    "host_memory_bytes",
    "nvlink_sent_bytes_per_second",
    "nvlink_received_bytes_per_second",
    "link_bytes",
    "bytes_sent",
    "answering",
    "sending",
    "idle",
    "answers",
)


class NoRecords(ValueError):
    """There is nothing to draw. The message is one sentence."""


@dataclass
class Run:
    """The records of a run.

    figures: FIGURES by name, one entry per interval, in the order of iterations. If a resumed run trained an interval
    again, the later entry counts. waits: {(name of the teacher, replica): seconds} of each
    interval; the name of an only teacher is "". weights: histogram of the weights of each
    interval, as (first bin, counts). ranks: OF_RANK by name, for each (role, rank). starts, starved, idle: the records
    of that kind. tokens: the content of tokens.json, or None.
    """

    folder: Path
    figures: dict[str, np.ndarray] = field(default_factory=dict)
    waits: list[dict[tuple[str, int], float]] = field(default_factory=list)
    weights: list[tuple[int, np.ndarray]] = field(default_factory=list)
    ranks: dict[tuple[str, int], dict[str, np.ndarray]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    starved: list[dict[str, Any]] = field(default_factory=list)
    idle: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, Any] | None = None


def load(folder: Path) -> Run:
    """Raises NoRecords if there are none."""
    if not folder.is_dir():
        raise NoRecords(f"expected the folder of a run (telemetry_dir), got {folder}, which is not a folder")
    paths = sorted([*folder.glob("student-*.jsonl"), *folder.glob("teacher-*.jsonl")])
    run = Run(folder)
    drawn = _Figures()
    try:
        for path in paths:
            _read(path, run, drawn)
    except OSError as error:
        raise NoRecords(f"{error.filename} cannot be read: {error.strerror}") from None
    run.figures, run.waits, run.weights = drawn.in_order()
    if not run.starts and not run.ranks and not run.waits:
        text = f"expected records of a run in {folder} (student-*.jsonl, teacher-*.jsonl), got none"
        below = sorted({path.parent for path in folder.glob("*/*-[0-9]*.jsonl")})
        raise NoRecords(text + (f"; {below[0]} has some" if below else ""))
    run.starts.sort(key=lambda record: record["time"])
    # Every rank that takes metrics itself writes this record.
    once = {
        (record["iteration"], record.get("teacher"), record.get("replica")): record for record in run.starved
    }
    run.starved = sorted(once.values(), key=lambda record: record["iteration"])
    run.tokens = _tokens(folder / TOKENS)
    return run


def _read(path: Path, run: Run, drawn: _Figures) -> None:
    table = _Table(OF_RANK)
    who = None
    for record in read_records(path):
        if not all(map(record.__contains__, _REQUIRED)):
            continue
        kind = record["kind"]
        if kind == "rank":
            who = (record["role"], record["rank"])
            table.add(record)
        elif kind == "figures":
            drawn.add(record)
        elif kind == "start":
            run.starts.append(record)
        elif kind in ("starved", "idle"):
            getattr(run, kind).append(record)
    if who is not None:
        run.ranks[who] = table.columns()


class _Table:
    """Some fields of many records as columns, with NaN for missing values."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self._fields = fields
        self._rows: list[tuple] = []
        self._done: list[np.ndarray] = []

    def add(self, record: dict[str, Any]) -> None:
        self._rows.append(tuple(map(record.get, self._fields)))
        if len(self._rows) == _AT_ONCE:
            self._pack()

    def columns(self) -> dict[str, np.ndarray]:
        self._pack()
        whole = np.concatenate(self._done)
        return {name: np.ascontiguousarray(whole[:, place]) for place, name in enumerate(self._fields)}

    def _pack(self) -> None:
        try:
            # numpy reads None as NaN.
            rows = np.array(self._rows, dtype=np.float64)
        except (TypeError, ValueError):  # a value is not a number
            rows = np.array([[_number(value) for value in row] for row in self._rows])
        rows = rows.reshape(-1, len(self._fields))
        self._done.append(rows)
        self._rows = []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _replica(text: str) -> tuple[str, int]:
    """Of "3" or "math/3": the name of the teacher, "" for none, and the replica."""
    teacher, _, replica = text.rpartition("/")
    return teacher, int(replica)


class _Figures:
    """Collects the records of the intervals."""

    def __init__(self) -> None:
        self._table = _Table(FIGURES)
        self._waits: list[dict[tuple[str, int], float]] = []
        self._weights: list[tuple[int, np.ndarray]] = []

    def add(self, record: dict[str, Any]) -> None:
        """Ignores a record whose fields have wrong types."""
        try:
            waits = record.get("teacher_wait_by_replica") or {}
            waits = {_replica(text): float(seconds) for text, seconds in waits.items()}
            first, counts = record.get("weight_histogram") or (0, [])
            weights = int(first), np.asarray(counts, dtype=np.float64).reshape(-1)
            iteration = float(record["iteration"])
        except (AttributeError, TypeError, ValueError):
            return
        self._table.add({**record, "iteration": iteration})
        self._waits.append(waits)
        self._weights.append(weights)

    def in_order(self) -> tuple[dict[str, np.ndarray], list, list]:
        columns = self._table.columns()
        last_of = {iteration: place for place, iteration in enumerate(columns["iteration"])}
        order = [last_of[iteration] for iteration in sorted(last_of)]
        return (
            {name: column[order] for name, column in columns.items()},
            [self._waits[place] for place in order],
            [self._weights[place] for place in order],
        )


def _tokens(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        samples = [
            {
                "name": str(sample.get("name", "")),
                "text": str(sample.get("text", "")),
                "stages": {
                    str(stage): [(str(text), float(weight)) for text, weight in rows]
                    for stage, rows in sample["stages"].items()
                },
            }
            for sample in content["samples"]
        ]
        ends = {name: float(content.get(name, usual)) for name, usual in (("floor", 0.1), ("ceiling", 1.9))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # missing, or in another format
        return None
    return {**ends, "samples": samples} if samples else None
