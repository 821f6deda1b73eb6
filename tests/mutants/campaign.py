"""Tests the mutants of `faults.py` one at a time in a copy of the checkout, and reports which test kills each.

    make mutants ARGS='--area loss --resume'

Each mutant names its tests. If it survives them, all fast tests run (pytest -m "not slow"), and then the others. The
same tests must pass without the mutant, so that a failure is due to it. Mutants of the area "integrations" are tested
with the interpreter `--systems`, and "all" are then the tests of these systems. build/mutants has the results, and the
table as Markdown. The exit status is 1 if a mutant survived all tests.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import AREAS, INTEGRATIONS, Fault, all_faults
from tree import FOLDER, Broken, Ended, Tree

FAST, SLOW = "not slow", "slow"  # the tiers, for pytest -m
_OF_SYSTEMS = ("tests/integrations", "tests/slurm/test_bridge_jobs.py")
# Seconds for tests that pass, the minimum for one test, and the overhead of pytest.
_LONGEST, _TEST, _START = 4 * 3600, 60, 60
_PASSED, _FAILED, _INTERRUPTED, _NO_TESTS = 0, 1, 2, 5  # exit codes of pytest


@dataclass(frozen=True)
class Stage:
    """Tests for a mutant. tier: one of the two tiers. arguments: of pytest. emulated: whether they run on the emulated
    kernels. whole: whether they are the whole tier. systems: whether they need the systems of vcrd/integrations."""

    tier: str
    arguments: tuple[str, ...]
    emulated: bool = False
    whole: bool = False
    systems: bool = False


@dataclass(frozen=True)
class Result:
    """The result of one mutant. tier: the one that killed it, "" for none. test: the one that failed. build, seconds:
    time of the build with the mutant, and of the tests up to the failure."""

    name: str
    tier: str
    test: str
    build: float
    seconds: float


class Campaign:
    """Runs the tests of one copy on the mutants. relevant_only: run only the named tests of each mutant.

    save: called with each result.
    """

    def __init__(self, tree: Tree, relevant_only: bool, save: Callable[[Result], None]) -> None:
        self._tree = tree
        self._relevant_only = relevant_only
        self._save = save
        self._passed: dict[Stage, float] = {}  # stages that pass without a mutant, and their seconds

    def prepare(self, faults: list[Fault]) -> None:
        """Copies, builds, and checks that the tests use the copy."""
        self._tree.mirror()
        emulated = any(fault.emulated for fault in faults)
        _say("building the extension" + (" and the emulated kernels" if emulated else "") + " in the copy")
        self._tree.build(emulated)
        self._tree.check_imports()

    def run(self, faults: list[Fault]) -> list[Result]:
        found = []
        for fault in faults:
            found.append(self._try(fault))
            self._save(found[-1])
            _say(_line(found[-1]))
        return found

    def _stages(self, fault: Fault) -> Iterator[Stage]:
        """The tests for a mutant, one stage after another, until one kills it."""
        systems = fault.area == INTEGRATIONS
        yield Stage(FAST, ("-m", FAST, *fault.tests), fault.emulated, systems=systems)
        if not (self._relevant_only or fault.harmless):
            _say(f"{fault.name}: survived its own tests; running all tests")
            for tier in (FAST, SLOW):
                yield Stage(
                    tier, ("-m", tier, *(_OF_SYSTEMS if systems else ())), whole=True, systems=systems
                )

    def _usual(self, stage: Stage) -> float:
        """Seconds of these tests without a mutant. All of them must pass."""
        if stage not in self._passed:
            ended = self._tree.pytest(stage.arguments, _LONGEST, stage.emulated, stage.systems)
            if ended.code == _NO_TESTS and not stage.whole:
                raise Broken(f"no test is selected by {' '.join(stage.arguments)}")
            if ended.code not in (_PASSED, _NO_TESTS):
                said = ended.output[-4000:]
                raise Broken(f"these must pass without a mutant: {' '.join(stage.arguments)}\n{said}")
            self._passed[stage] = ended.seconds
        return self._passed[stage]

    def _try(self, fault: Fault) -> Result:
        for stage in self._stages(fault):
            limit = max(_TEST, 3 * self._usual(stage))
            # So that pytest names a test that hangs.
            timeout = () if stage.whole else ("-o", f"timeout={limit:.0f}")
            with self._tree.planted(fault.file, fault.old, fault.new, fault.emulated) as build:
                if stage.whole and fault.file.startswith("csrc/"):
                    self._tree.build(True)
                arguments = [*timeout, *stage.arguments]
                ended = self._tree.pytest(arguments, limit + _START, stage.emulated, stage.systems)
            if (test := _noticed(ended)) is not None:
                return Result(fault.name, stage.tier, test, build, ended.seconds)
        return Result(fault.name, "", "", build, ended.seconds)


def _noticed(ended: Ended) -> str | None:
    """The test that failed, or another sign of the mutant; None if all passed."""
    if ended.code in (_PASSED, _NO_TESTS):
        return None
    if ended.code is None:
        return "nothing ended within the limit"
    if ended.code < 0:
        where = re.search(r'File ".*/(tests/\S+\.py)", line \d+ in (test_\w+)', ended.output)
        what = f"{where[1]}::{where[2]}" if where else "the process"
        return f"{what} (crashes: {signal.Signals(-ended.code).name})"
    if ended.code not in (_FAILED, _INTERRUPTED):
        raise Broken(f"pytest ended with {ended.code}:\n{ended.output[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", ended.output, re.M)
    if failed is None:
        return "the process (ended in the middle of a test)"
    hangs = re.search(r"Timeout \(>|\+ Timeout \+", ended.output) is not None
    return failed[1].partition("[")[0] + (" (hangs)" if hangs else "")


def table(faults: list[Fault], results: dict[str, Result]) -> str:
    """Markdown: a row per mutant, and for each area the number of mutants that each tier killed."""
    tiers = {FAST: "fast", SLOW: "all"}
    rows = ["| mutant | file | killed by | tier | seconds |", "|---|---|---|---|---:|"]
    for fault in faults:
        result = results[fault.name]
        test = re.sub(r"^tests/(.+)::(\w+)", r"`\1` `\2`", result.test)
        noticed = test or f"nothing: {fault.harmless or 'survived'}"
        seconds = f"{result.build + result.seconds:.0f}"
        rows.append(
            f"| {fault.name} | `{fault.file}` | {noticed} | {tiers.get(result.tier, '')} | {seconds} |"
        )
    rows += ["", "| area | mutants | fast tier | all tests | minutes |", "|---|---:|---:|---:|---:|"]
    for area in AREAS:
        mine = [results[fault.name] for fault in faults if fault.area == area]
        if mine:
            fast = sum(result.tier == FAST for result in mine)
            minutes = sum(result.build + result.seconds for result in mine) / 60
            noticed = sum(bool(result.tier) for result in mine)
            rows.append(f"| {area} | {len(mine)} | {fast} | {noticed} | {minutes:.0f} |")
    return "\n".join([*rows, ""])


def _line(result: Result) -> str:
    seconds = f"{result.build:5.0f} + {result.seconds:4.0f} s"
    return f"{seconds}  {result.name}: {result.test or 'SURVIVED'}"


def _say(text: str) -> None:
    print(text, flush=True)


def _read(path: Path) -> dict[str, Result]:
    return {row["name"]: Result(**row) for row in json.loads(path.read_text())} if path.exists() else {}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    parser.add_argument("--only", action="append", help="mutants whose name has this text; may be repeated")
    parser.add_argument("--area", choices=AREAS, help="the mutants of one area")
    parser.add_argument("--resume", action="store_true", help="skip mutants that have a result")
    parser.add_argument(
        "--relevant-only", action="store_true", help="run only the named tests of each mutant"
    )
    parser.add_argument(
        "--systems", type=Path, help="interpreter of the area integrations, which is left out without it"
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "results.json", help="where results are kept")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    everything = all_faults()
    chosen = [f for f in everything if arguments.area in (None, f.area)]
    if arguments.systems is None and not arguments.list:
        if arguments.area == INTEGRATIONS:
            what = "an interpreter with the systems of the integrations, as `make mutants` gives with Python 3.12"
            print(f"vcrd: --systems: expected {what}, got none", file=sys.stderr)
            return 2
        chosen = [f for f in chosen if f.area != INTEGRATIONS]
    if arguments.only:
        chosen = [f for f in chosen if any(text in f.name for text in arguments.only)]
    if arguments.list:
        for fault in chosen:
            print(f"{fault.area:<14} {fault.file:<28} {fault.name}")
        return 0
    results = _read(arguments.json)

    def save(result: Result) -> None:
        results[result.name] = result
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([vars(each) for each in results.values()], indent=1))

    # Restores the copy and ends all processes, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    todo = [f for f in chosen if not (arguments.resume and f.name in results)]
    try:
        campaign = Campaign(Tree(arguments.systems), arguments.relevant_only, save)
        if todo:
            campaign.prepare(todo)
            campaign.run(todo)
    except Broken as error:
        print(f"vcrd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume continues from here", file=sys.stderr)
        return 130
    done = [f for f in everything if f.name in results]
    path = FOLDER / "table.md"
    path.write_text(table(done, results))
    survivors = [f.name for f in done if not (results[f.name].tier or f.harmless)]
    _say(f"{len(done) - len(survivors)} of {len(done)} killed; the table is in {path}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
