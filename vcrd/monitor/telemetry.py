"""Telemetry of one rank: readings of its GPU and process, together with what the rank counts, once per interval.

One thread per process reads NVML and writes the rank's file of records. It calls no CUDA and joins no collective. The
thread that trains only adds numbers and puts records in a queue, so a slow file system cannot block it.
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
_INTERVAL = 10.0  # seconds between two records of kind "rank"
_FIRST_INTERVAL = 1.0  # at the start, so that a short run has several
_GROWTH = 10  # an interval is at most the time since the start, divided by this
_READINGS = 10  # GPU samples per interval
_LEAST_PAUSE = 0.1  # seconds between two GPU samples
_MOST_PAUSE = 1.0  # NVML's utilisation is a mean over at most so long
_MOST_QUEUED = 10_000  # records that wait while the file system is stuck
_LAST_WRITES = 5.0  # seconds that close() gives the thread for the last records
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
    """Records of one rank, in folder/ROLE-RANK.jsonl. A run that resumes appends to the file.

    role: "student" or "teacher". interval: the most seconds between two records of kind "rank"; at the start of a run
    it is 1 second, and it grows for the first 100. uuid: the UUID of this rank's GPU, as CUDA names it; None without a
    GPU. open_gpu: for tests.

    Each record has time (seconds since 1970), kind, role, rank, host and the iteration of `at`. A record "rank" has
    those FIELDS that can be measured (memory and power: the peak; utilisation: the mean; NVLink: bytes per second) and
    seconds, the length of its interval. It also has the sums of the numbers that `add` was given in the interval, how
    far the counters of `follow` went, and the seconds spent in each state of `enter`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        role: str,
        rank: int,
        interval: float = _INTERVAL,
        uuid: str | None = None,
        open_gpu: Callable[[str], Any] = Gpu,
    ) -> None:
        file = RecordFile(Path(folder) / f"{role}-{rank:05d}.jsonl")
        self._work = _Work(file, {"role": role, "rank": rank, "host": socket.gethostname()}, interval)
        self._thread = threading.Thread(
            target=self._work.run, args=(uuid, open_gpu), name="vcrd-telemetry", daemon=True
        )
        # The thread does not refer to this object. So it ends when this object is collected, or the interpreter exits.
        self._finalizer = weakref.finalize(self, _end, self._work, self._thread)
        self._thread.start()

    @property
    def latest(self) -> dict[str, float]:
        """Those FIELDS of the last complete interval that could be measured; before its end, the first reading."""
        return self._work.latest

    def at(self, iteration: int) -> None:
        """Sets the iteration that records belong to from now on."""
        self._work.iteration = iteration

    def add(self, **sums: float) -> None:
        """Adds to the sums of this interval."""
        self._work.add(sums)

    def follow(self, name: str, read: Callable[[], float]) -> None:
        """Records how far a counter goes in each interval. read: called by the telemetry thread; it must not block."""
        self._work.follow(name, read)

    def unfollow(self, name: str) -> None:
        """Reads a counter for the last time, before its owner ends."""
        self._work.unfollow(name)

    def enter(self, state: str | None) -> None:
        """Begins a state whose seconds are counted; None: none of them is."""
        self._work.enter(state)

    def write(self, kind: str, **fields: Any) -> None:
        """Writes a record of another kind. Never blocks and never raises."""
        self._work.put(kind, fields)

    def close(self) -> None:
        """Writes the last records and ends the thread. Idempotent. It takes a few seconds at most."""
        self._finalizer()


class _Work:
    """What the thread does, and the state that it shares with the threads that call `Telemetry`."""

    def __init__(self, file: RecordFile, who: dict[str, Any], interval: float) -> None:
        self.iteration = 0
        # The first reading of the host is taken here, so that a step that ends at once has one to report.
        self.latest: dict[str, float] = _Readings(None).first()
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
        if self._queue.qsize() < _MOST_QUEUED:
            first = {"time": round(time.time(), 3), "kind": kind, **self._who, "iteration": self.iteration}
            self._queue.put({**first, **fields})

    def end(self) -> None:
        self._ending = True
        self._queue.put(None)  # wakes the thread

    def run(self, uuid: str | None, open_gpu: Callable[[str], Any]) -> None:
        gpu = _opened(uuid, open_gpu)
        readings = _Readings(gpu)
        self.latest = readings.first()
        start = begun = due = time.monotonic()
        running = True
        while running:
            interval = min(self._interval, max(_FIRST_INTERVAL, (begun - start) / _GROWTH))
            pause = min(_MOST_PAUSE, max(_LEAST_PAUSE, interval / _READINGS), interval)
            due = max(due + pause, time.monotonic())
            running = self._write_until(due)
            readings.take()
            seconds = time.monotonic() - begun
            if seconds >= interval or not running:
                begun += seconds
                self._write_interval(readings.summary(seconds), seconds)
        self._file.close()
        if gpu:
            gpu.close()

    def _write_until(self, due: float) -> bool:
        """Writes the records that come until then. False where the thread is to end."""
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
            # A value below the last one: the counter started again from zero.
            self._sums[name] = self._sums.get(name, 0) + (value - before if value >= before else value)
            self._counters[name] = (read, value)

    def _count_state(self) -> None:
        """A state that spans several intervals is counted in each of them."""
        now = time.monotonic()
        if self._state is not None:
            self._sums[self._state] = self._sums.get(self._state, 0.0) + now - self._entered
        self._entered = now


class _Readings:
    """The GPU and memory readings of one interval."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._rows: list[dict[str, float]] = []
        self._counters: dict[str, float] = {}  # at the start of the interval

    def take(self) -> None:
        row = {} if self._gpu is None else self._gpu.read()
        resident = _resident_bytes()
        if resident is not None:
            row["host_memory_bytes"] = resident
        if not self._rows and not self._counters:
            self._counters = _counters(row)
        self._rows.append(row)

    def first(self) -> dict[str, float]:
        """The FIELDS that one reading can give. The first interval begins with it."""
        self.take()
        return self.summary(0.0)

    def summary(self, seconds: float) -> dict[str, float]:
        """The FIELDS of this interval. It then begins the next one."""
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
            if grown >= 0 and seconds > 0:  # negative where the driver was reloaded
                found[f"{name}_per_second"] = grown / seconds
        self._counters = counters
        return found


def _opened(uuid: str | None, open_gpu: Callable[[str], Any]) -> Gpu | None:
    """The GPU. None without one, and the log says why. The log also says which readings the GPU does not offer."""
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
        thread.join(_LAST_WRITES)


def _counters(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in ("nvlink_sent_bytes", "nvlink_received_bytes") if name in row}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _resident_bytes() -> int | None:
    """RAM that this process uses; None without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return None
