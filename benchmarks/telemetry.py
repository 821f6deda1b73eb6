"""Measures the overhead of telemetry in the training thread: `python benchmarks/telemetry.py`. Needs no GPU.

Prints the median time of each step, each answer and each record, and the processor time of the thread that reads and
writes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from vcrd.link.student import Waits
from vcrd.megatron.metrics import Parts, StepClock
from vcrd.monitor.telemetry import Telemetry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the median (default: %(default)s)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        telemetry = Telemetry(folder, "student", 0, interval=1.0)
        step = median(rounds, lambda: a_step(telemetry), 2000)
        record = median(rounds, lambda: telemetry.write("figures", **FIGURES), 200)
        wait = median(rounds, a_wait, 2000)
        telemetry.close()
        print(f"a step: {1e6 * step:.1f} us; an answer: {1e6 * wait:.1f} us; a record: {1e6 * record:.1f} us")
        print(
            f"the thread: {100 * of_the_thread(folder, seconds=20.0):.3f} % of a core, without a GPU to read"
        )


FIGURES = {"loss": 1.0, "weight_histogram": [75, list(range(70))], "validity_histogram": list(range(40))}


_CLOCK = StepClock()


def a_step(telemetry: Telemetry) -> None:
    """The clock of one micro-batch, and the work of `IntervalLog` at the end of each step."""
    with _CLOCK.forward():
        pass
    _CLOCK.end_backward()
    _CLOCK.end_step()
    added = Waits(1.0, 0.5, 0.0, 4, 2).since(Waits())
    telemetry.at(3)
    telemetry.add(
        steps=1,
        teacher_wait=added.seconds,
        arriving=added.arriving,
        while_lost=added.while_lost,
        **vars(_CLOCK.parts.since(Parts())),
    )


_WAITS = Waits()


def a_wait() -> None:
    begun = time.perf_counter()
    _WAITS.add(time.perf_counter() - begun, 0.0, False)


def median(rounds: int, work, repeats: int) -> float:
    """Seconds of one call."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        found.append((time.perf_counter() - begun) / repeats)
    return statistics.median(found)


def of_the_thread(folder: str, seconds: float) -> float:
    """Share of a core for the thread, at the default interval."""
    telemetry = Telemetry(folder, "student", 1, interval=10.0)
    begun, before = time.monotonic(), time.process_time()
    time.sleep(seconds)
    share = (time.process_time() - before) / (time.monotonic() - begun)
    telemetry.close()
    return share


if __name__ == "__main__":
    main()
