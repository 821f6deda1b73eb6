"""What a rank's machine does while it trains or serves, joined to what the rank itself counts, at a set interval.

One thread for each process reads NVML and writes the rank's file of records. It calls no CUDA and takes part in no
collective; the thread that trains only adds numbers and puts records in a queue, so no file system can hold it up.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vcrd.monitor.nvml import Gpu, NoGpu
from vcrd.monitor.records import RecordFile

_log = logging.getLogger("vcrd")
_READINGS = 10  # of the GPU in an interval, at most one a
_FASTEST = 0.1  # seconds
_SLOWEST = 1.0  # NVML's own utilisation looks back for no longer
_WAITING = 10_000  # records that wait for a file system which has stopped
_PARTING = 5.0  # seconds that close() gives the last records
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
FIELDS = (
    "gpu_memory_bytes",
    "gpu_utilization",
    "gpu_power_watts",
    "nvlink_sent_bytes_per_second",
    "nvlink_received_bytes_per_second",
    "host_memory_bytes",
)


class Telemetry:
    """Records of one rank, in folder/ROLE-RANK.jsonl. A run that resumes appends.

    role: "student" or "teacher". interval: seconds between two records of kind "rank". uuid: of this rank's GPU, as
    CUDA says it; None where there is none. open_gpu: for tests.

    Each record has time (seconds since 1970), kind, role, rank, host and the iteration of `at`. A record "rank" has
    FIELDS as far as they can be measured (memory and power: the peak; utilisation: the mean; NVLink: bytes a second),
    seconds, the length of its interval, the sums of what was given to `add` in it, how far the counters of `follow`
    went, and the seconds spent in each state of `enter`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        role: str,
        rank: int,
        interval: float,
        uuid: str | None = None,
        open_gpu: Callable[[str], Any] = Gpu,
    ) -> None:
        file = RecordFile(Path(folder) / f"{role}-{rank:05d}.jsonl")
        self._work = _Work(file, {"role": role, "rank": rank, "host": socket.gethostname()}, interval)
        self._thread = threading.Thread(
            target=self._work.run, args=(uuid, open_gpu), name="vcrd-telemetry", daemon=True
        )
        # The thread knows nothing of this object: one that is forgotten, or is there at the interpreter's end, ends it.
        self._finalizer = weakref.finalize(self, _end, self._work, self._thread)
        self._thread.start()

    @property
    def latest(self) -> dict[str, float]:
        """The FIELDS of the last whole interval, as far as they could be measured."""
        return self._work.latest

    def at(self, iteration: int) -> None:
        """The iteration that records belong to from now on."""
        self._work.iteration = iteration

    def add(self, **sums: float) -> None:
        """Adds to this interval's sums."""
        self._work.add(sums)

    def follow(self, name: str, read: Callable[[], float]) -> None:
        """Records how far a counter goes in each interval. read: called by this object's thread; must not block."""
        self._work.follow(name, read)

    def unfollow(self, name: str) -> None:
        """Reads a counter for the last time, before its owner ends."""
        self._work.unfollow(name)

    def enter(self, state: str | None) -> None:
        """What this rank does from now on; None: nothing that is counted."""
        self._work.enter(state)

    def write(self, kind: str, **fields: Any) -> None:
        """A record of the caller's own. Never blocks and never raises."""
        self._work.put(kind, fields)

    def close(self) -> None:
        """Writes what there is and ends the thread. Idempotent, bounded."""
        self._finalizer()


class _Work:
    """What the thread does, and what it shares with those who give it something."""

    def __init__(self, file: RecordFile, who: dict[str, Any], interval: float) -> None:
        self.iteration = 0
        self.latest: dict[str, float] = {}
        self._file = file
        self._who = who
        self._interval = interval
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}
        self._counters: dict[str, tuple[Callable[[], float], float]] = {}
        self._state: str | None = None
        self._ending = False
        self._entered = 0.0
        self._queue: queue.SimpleQueue = queue.SimpleQueue()

    def add(self, sums: dict[str, float]) -> None:
        with self._lock:
            for name, value in sums.items():
                self._sums[name] = self._sums.get(name, 0) + value

    def follow(self, name: str, read: Callable[[], float]) -> None:
        with self._lock:
            self._counters[name] = (read, read())

    def unfollow(self, name: str) -> None:
        with self._lock:
            self._count(name)
            self._counters.pop(name, None)

    def enter(self, state: str | None) -> None:
        with self._lock:
            self._count_state()
            self._state = state

    def put(self, kind: str, fields: dict[str, Any]) -> None:
        if self._queue.qsize() < _WAITING:
            first = {"time": round(time.time(), 3), "kind": kind, **self._who, "iteration": self.iteration}
            self._queue.put({**first, **fields})

    def end(self) -> None:
        self._ending = True
        self._queue.put(None)  # wakes the thread

    def run(self, uuid: str | None, open_gpu: Callable[[str], Any]) -> None:
        gpu = _opened(uuid, open_gpu)
        pause = min(_SLOWEST, max(_FASTEST, self._interval / _READINGS), self._interval)
        readings = _Readings(gpu)
        begun = time.monotonic()
        due = begun
        running = True
        while running:
            due = max(due + pause, time.monotonic())
            running = self._write_until(due)
            readings.take()
            seconds = time.monotonic() - begun
            if seconds >= self._interval or not running:
                begun += seconds
                self._write_interval(readings.summary(seconds), seconds)
        self._file.close()
        if gpu:
            gpu.close()

    def _write_until(self, due: float) -> bool:
        """Writes what comes meanwhile; whether to go on."""
        while not self._ending:
            try:
                record = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                return True
            if record is not None:
                self._file.write(record)
        return False

    def _write_interval(self, measured: dict[str, float], seconds: float) -> None:
        self.latest = measured
        with self._lock:
            self._count_state()
            for name in self._counters:
                self._count(name)
            sums, self._sums = self._sums, {}
        self.put("rank", {"seconds": seconds, **measured, **sums})
        while not self._queue.empty():
            record = self._queue.get()
            if record is not None:
                self._file.write(record)

    def _count(self, name: str) -> None:
        if name in self._counters:
            read, before = self._counters[name]
            value = read()
            # Less than before: its owner began anew.
            self._sums[name] = self._sums.get(name, 0) + (value - before if value >= before else value)
            self._counters[name] = (read, value)

    def _count_state(self) -> None:
        """A state that lasts is counted in each interval that it touches."""
        now = time.monotonic()
        if self._state is not None:
            self._sums[self._state] = self._sums.get(self._state, 0.0) + now - self._entered
        self._entered = now


class _Readings:
    """The readings of one interval."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._rows: list[dict[str, float]] = []
        self._counters: dict[str, float] = {}  # at the interval's beginning

    def take(self) -> None:
        row = {} if self._gpu is None else self._gpu.read()
        resident = _resident_bytes()
        if resident is not None:
            row["host_memory_bytes"] = resident
        if not self._rows and not self._counters:
            self._counters = _counters(row)
        self._rows.append(row)

    def summary(self, seconds: float) -> dict[str, float]:
        """FIELDS of the interval; begins the next."""
        rows, self._rows = self._rows, []
        found = {}
        for field, name, of in (
            ("gpu_memory_bytes", "memory_bytes", max),
            ("gpu_utilization", "utilization", _mean),
            ("gpu_power_watts", "power_watts", max),
            ("host_memory_bytes", "host_memory_bytes", max),
        ):
            values = [row[name] for row in rows if name in row]
            if values:
                found[field] = of(values)
        counters = _counters(rows[-1]) if rows else {}
        for name, value in counters.items():
            grown = value - self._counters.get(name, value)
            if grown >= 0 and seconds > 0:  # less: the driver was loaded anew
                found[f"{name}_per_second"] = grown / seconds
        self._counters = counters
        return found


def _opened(uuid: str | None, open_gpu: Callable[[str], Any]) -> Gpu | None:
    """The GPU, or None with a line in the log that says why; another where it does not tell all."""
    try:
        if uuid is None:
            raise NoGpu("this rank has none")
        gpu = open_gpu(uuid)
        gpu.read()
    except NoGpu as error:
        _log.info("telemetry has nothing about a GPU: %s", error)
        return None
    if gpu.missing:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in gpu.missing.items())
        _log.info("telemetry of this GPU lacks %s", reasons)
    return gpu


def _end(work: _Work, thread: threading.Thread) -> None:
    work.end()
    if thread is not threading.current_thread():
        thread.join(_PARTING)


def _counters(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in ("nvlink_sent_bytes", "nvlink_received_bytes") if name in row}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _resident_bytes() -> int | None:
    """Memory of this process in RAM; None where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None
