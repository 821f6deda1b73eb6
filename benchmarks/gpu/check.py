"""Runs everything that needs a GPU, as a queue of short stages. Each call continues where the last one ended.

    make gpu-check PYTHON=python3 [SECONDS=420] [ARGS="--list"]

Runs the stages of stages.py whose result is missing, failed, or older than the tested code, as many as fit into the
time. Writes each result at once to docs/performance/gpu/<stage>.json. Stages that failed with the current code run
last, so that they do not block the others. An existing extension is used if it was built from these sources with this
torch.

Uses the interpreter that started it, and no network. torch with CUDA, pybind11, ninja, a CUDA toolkit and pytest must
be installed. If a stage needs anything else that is missing, it is unavailable, which is no failure. The exit status is
0 if every stage that ran passed; speeds do not matter for it. --list needs no GPU and no torch.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.process import run
from benchmarks.gpu.results import FAILED, MISSING, PASSED, STALE, UNAVAILABLE, Finding
from benchmarks.gpu.stages import STAGES, Stage

SECONDS = 420
MARGIN = 2  # seconds kept for writing results and the table
Stages = Sequence[Stage]
ORDER = {MISSING: 0, STALE: 0, FAILED: 1, UNAVAILABLE: 2}


@dataclass(frozen=True)
class Entry:
    """A stage with its last result. state: of the result, see `results.state`."""

    stage: Stage
    result: dict | None
    digest: str
    state: str

    @classmethod
    def of(cls, stage: Stage, folder: Path) -> Entry:
        result, digest = results.read(folder, stage.name), results.digest(stage.sources)
        return cls(stage, result, digest, results.state(result, digest))

    @property
    def expected(self) -> float:
        """Expected seconds: those of the last run that passed, otherwise those of the table."""
        took = self.result.get("seconds") if self.result and self.result.get("passed") else None
        # An existing build took 0 s. A stage that took slightly more than its limit still fits into the limit.
        return min(took or self.stage.expected, self.stage.limit)


def due(folder: Path, stages: Stages) -> list[Entry]:
    """The stages to run, in this order."""
    entries = [Entry.of(stage, folder) for stage in stages]
    return sorted((e for e in entries if e.state != PASSED), key=lambda e: ORDER[e.state])


def listing(folder: Path, stages: Stages) -> str:
    rows = [("stage", "state", "date", "device", "proves")]
    for stage in stages:
        entry = Entry.of(stage, folder)
        result = entry.result or {}
        rows.append(
            (stage.name, entry.state, *(str(result.get(k) or "-") for k in ("date", "device")), stage.proves)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


class Queue:
    """One run of the queue: its machine, its time, and the result of each stage."""

    def __init__(self, folder: Path, machine: dict, seconds: float, started: float) -> None:
        self._folder, self._machine, self._end = folder, machine, started + seconds
        self._commit = results.commit()
        self.found: dict[str, Finding] = {}
        self.left_out: dict[str, str] = {}

    def left(self) -> float:
        return self._end - time.monotonic() - MARGIN

    def attempt(self, entry: Entry) -> Finding | None:
        """Runs the stage if it fits into the time that is left, and writes its result."""
        stage = entry.stage
        reason = stage.reason_to_skip()
        if reason is not None:
            print(f"==> {stage.name}: {reason}", flush=True)
            return self._keep(entry, Finding(None, reason), 0.0)
        limit = min(stage.limit, self.left())
        if limit < entry.expected:
            self.left_out[stage.name] = f"takes about {entry.expected:.0f} s, {max(0, limit):.0f} s were left"
            return None
        print(f"==> {stage.name}, at most {limit:.0f} s: {stage.proves}", flush=True)
        started = time.monotonic()
        try:
            finding = stage.work(limit)
        except Exception as error:  # an error in the queue's code must not stop the other stages
            finding = Finding(False, f"{type(error).__name__}: {error}")
        return self._keep(entry, finding, time.monotonic() - started)

    def _keep(self, entry: Entry, finding: Finding, seconds: float) -> Finding:
        self.found[entry.stage.name] = finding
        # "Unavailable on this machine" must not overwrite a result of another machine.
        measured = entry.result is not None and entry.result.get("passed") is not None
        if finding.passed is not None or not measured:
            results.write(self._folder, entry.stage.name, self.record(entry, finding, seconds))
        if finding.text:
            print(finding.text)
        print(f"{entry.stage.name} {word(finding)} in {seconds:.0f} s: {finding.how}", flush=True)
        return finding

    def record(self, entry: Entry, finding: Finding, seconds: float) -> dict:
        facts = dict(self._machine["facts"])
        for known in ("packages", "date", "python", "cuda"):  # the record has them under other names
            facts.pop(known, None)
        return {
            "stage": entry.stage.name,
            "proves": entry.stage.proves,
            "passed": finding.passed,
            "how": results.without_paths(finding.how),
            "seconds": round(seconds, 1),
            "date": results.now(),
            **self._commit,
            "sources": entry.digest,
            "device": facts.pop("device", "unknown"),
            "driver": facts.pop("driver_version", "unknown"),
            "versions": self._machine["versions"],
            "machine": facts,
            "figures": json.loads(results.without_paths(json.dumps(finding.figures))),
        }

    def prepare(self, entry: Entry, anew: bool = False) -> bool:
        """Whether the extension can be used. Builds it if necessary, or if `anew`."""
        reason = self._machine["kernels"] or ("as asked for" if anew else None)
        if reason is None:
            if entry.state != PASSED:
                carried = {"built": "before this run, from these sources and with this torch"}
                self._keep(entry, Finding(True, "its CUDA kernels run on this machine", carried), 0.0)
            return True
        print(f"building vcrd._C: {reason}", flush=True)
        finding = self.attempt(entry)
        if finding is None or not finding.passed:
            return False
        again = probe(max(20.0, self.left()))
        if again.get("kernels", "it cannot be loaded") is not None:
            how = again.get("kernels") or again.get("error", "it cannot be loaded")
            self._keep(entry, Finding(False, f"built, but {how}", finding.figures), 0.0)
            return False
        return True

    def summary(self) -> str:
        rows = [(name, word(finding), finding.how) for name, finding in self.found.items()]
        rows += [(name, "not run", why) for name, why in self.left_out.items()]
        width, middle = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        counts = [row[1] for row in rows]
        line = (
            ", ".join(f"{counts.count(each)} {each}" for each in dict.fromkeys(counts)) or "no stage was due"
        )
        return "\n".join([*(f"{a:<{width}}  {b:<{middle}}  {shortened(c)}" for a, b, c in rows), line])


def word(finding: Finding) -> str:
    return {True: PASSED, False: FAILED, None: UNAVAILABLE}[finding.passed]


def shortened(text: str, longest: int = 160) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def probe(seconds: float = 120) -> dict:
    """The output of probe.py about the machine and the extension; `error`: why there is none."""
    outcome = run([sys.executable, "-m", "benchmarks.gpu.probe"], seconds)
    for line in reversed(outcome.output.splitlines()):
        if line.startswith('{"torch"'):
            return json.loads(line)
    return {"error": outcome.how if outcome.returncode is None else outcome.tail(1) or outcome.how}


def usable_machine() -> dict | str:
    """The output of the probe, or the reason why no stage can run."""
    found = probe()
    if "error" in found:
        return f"{sys.executable} cannot be used: {found['error']}"
    if not found["gpu"]:
        return f"torch {found['torch']} of {sys.executable} finds no usable GPU"
    return found


def parse(arguments: list[str] | None, stages: Stages) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time for all stages (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="show the state of each stage and run nothing")
    parser.add_argument(
        "--stage",
        action="append",
        choices=[stage.name for stage in stages],
        metavar="NAME",
        help="run this stage, whatever its state",
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, stages: Stages = STAGES) -> int:
    options, started = parse(arguments, stages), time.monotonic()
    if options.list:
        print(listing(options.results, stages))
        return 0
    # Raises SystemExit, so that the running stage ends with its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    machine = usable_machine()
    if isinstance(machine, str):
        print(f"gpu-check: {machine}", file=sys.stderr)
        return 1
    print(
        f"{machine['facts']['device']}, driver {machine['facts'].get('driver_version')}, torch {machine['torch']}"
    )
    queue = Queue(options.results, machine, options.seconds, started)
    by_name = {stage.name: stage for stage in stages}
    names = options.stage or []
    build = Entry.of(by_name.pop("build"), options.results)
    ready = queue.prepare(build, anew="build" in names)
    if ready and names:
        for name in dict.fromkeys(names):
            if name in by_name:
                queue.attempt(Entry.of(by_name[name], options.results))
    elif ready:
        for entry in due(options.results, list(by_name.values())):
            queue.attempt(entry)
    print(f"\n{queue.summary()} in {time.monotonic() - started:.0f} s")
    return 1 if any(finding.passed is False for finding in queue.found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
