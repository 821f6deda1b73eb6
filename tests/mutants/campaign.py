"""Plants the faults of `faults.py` one at a time in a copy of the checkout, and sees which test notices each.

    make mutants ARGS='--area loss --resume'

A fault meets the tests that its line in the table names; if it survives these, the whole fast tier (pytest -m "not
slow"), and then the rest. The same selection must pass without the fault, so that a failure is due to it. Results are
kept in build/mutants, and the table is written there as Markdown. Exit status 1 if a fault survived everything.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults import AREAS, Fault, all_faults
from tree import FOLDER, Broken, Ended, Tree

FAST, SLOW = "not slow", "slow"  # the tiers, as pytest -m takes them
# Seconds for a tier as a whole, for one test of a selection at least, and for what pytest itself needs.
_TIER, _TEST, _START = 7200, 60, 60
_PASSED, _FAILED, _INTERRUPTED, _NO_TESTS = 0, 1, 2, 5  # exit codes of pytest


@dataclass(frozen=True)
class Result:
    """What became of one fault. tier: that noticed it, "" for none. test: that failed. build, seconds: of the build
    with the fault, and of the tests up to the failure."""

    name: str
    tier: str
    test: str
    build: float
    seconds: float


class Campaign:
    """The faults against the tests of one copy. relevant_only: survivors of a fault's own selection are left at that.

    save: called with each result.
    """

    def __init__(self, tree: Tree, relevant_only: bool, save: Callable[[Result], None]) -> None:
        self._tree = tree
        self._relevant_only = relevant_only
        self._save = save
        self._passed: dict[tuple, float] = {}  # selections that pass without a fault, and their seconds

    def prepare(self, faults: list[Fault]) -> None:
        """Copies, builds, and proves that the copy is what will be tested."""
        self._tree.mirror()
        emulated = any(fault.emulated for fault in faults)
        _say("building the extension" + (" and the emulated kernels" if emulated else "") + " in the copy")
        self._tree.build(emulated)
        self._tree.check_imports()

    def run(self, faults: list[Fault]) -> list[Result]:
        found = []
        for fault in faults:
            self._pass_without(fault)
            found.append(self._try(fault))
            self._save(found[-1])
            _say(_line(found[-1]))
        return found

    def _pass_without(self, fault: Fault) -> None:
        selection = (fault.tests, fault.emulated)
        if selection in self._passed:
            return
        ended = self._tree.pytest(["-m", FAST, *fault.tests], 900, fault.emulated)
        if ended.code == _NO_TESTS:
            raise Broken(f"{fault.name}: no test of the fast tier is selected by {' '.join(fault.tests)}")
        if ended.code != _PASSED:
            raise Broken(f"{' '.join(fault.tests)} must pass without a fault:\n{ended.output[-4000:]}")
        self._passed[selection] = ended.seconds

    def _try(self, fault: Fault) -> Result:
        usual = self._passed[(fault.tests, fault.emulated)]
        with self._tree.planted(fault.file, fault.old, fault.new, fault.emulated) as build:
            limit = max(_TEST, 3 * usual)
            arguments = ["-m", FAST, "-o", f"timeout={limit:.0f}", *fault.tests]
            ended = self._tree.pytest(arguments, limit + _START, fault.emulated)
            if (test := _noticed(ended)) is not None:
                return Result(fault.name, FAST, test, build, ended.seconds)
            if self._relevant_only or fault.harmless:
                return Result(fault.name, "", "", build, ended.seconds)
            _say(f"{fault.name}: survived its own tests; now all")
            if fault.file.startswith("csrc/"):
                self._tree.build(True)
            for tier in (FAST, SLOW):
                ended = self._tree.pytest(["-m", tier], _TIER)
                if (test := _noticed(ended)) is not None:
                    return Result(fault.name, tier, test, build, ended.seconds)
        return Result(fault.name, "", "", build, ended.seconds)


def _noticed(ended: Ended) -> str | None:
    """The test that failed, or what else showed the fault; None if all passed."""
    if ended.code in (_PASSED, _NO_TESTS):
        return None
    if ended.code is None:
        return "nothing ended within the limit"
    if ended.code < 0:
        return f"the process crashed ({signal.Signals(-ended.code).name})"
    if ended.code not in (_FAILED, _INTERRUPTED):
        raise Broken(f"pytest ended with {ended.code}:\n{ended.output[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", ended.output, re.M)
    if failed is None:
        raise Broken(f"pytest failed without naming a test:\n{ended.output[-2000:]}")
    hangs = re.search(r"Timeout \(>|\+ Timeout \+", ended.output) is not None
    return failed[1].partition("[")[0] + (" (hangs)" if hangs else "")


def table(faults: list[Fault], results: dict[str, Result]) -> str:
    """Markdown: a row per fault, and how many of each area were noticed by which tier."""
    tiers = {FAST: "fast", SLOW: "all"}
    rows = ["| fault | file | noticed by | tier | seconds |", "|---|---|---|---|---:|"]
    for fault in faults:
        result = results[fault.name]
        test = re.sub(r"^tests/(.+)::(\w+)", r"`\1` `\2`", result.test)
        noticed = test or f"nothing: {fault.harmless or 'survived'}"
        seconds = f"{result.build + result.seconds:.0f}"
        rows.append(
            f"| {fault.name} | `{fault.file}` | {noticed} | {tiers.get(result.tier, '')} | {seconds} |"
        )
    rows += ["", "| area | faults | fast tier | all tests | minutes |", "|---|---:|---:|---:|---:|"]
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
    parser.add_argument("--list", action="store_true", help="show the faults and plant none")
    parser.add_argument("--only", action="append", help="faults whose name has this text; may be repeated")
    parser.add_argument("--area", choices=AREAS, help="the faults of one area")
    parser.add_argument("--resume", action="store_true", help="pass over faults that have a result")
    parser.add_argument(
        "--relevant-only", action="store_true", help="give survivors up after their own tests"
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "results.json", help="where results are kept")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    everything = all_faults()
    chosen = [f for f in everything if arguments.area in (None, f.area)]
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

    # So that what is planted is taken back, and what runs is ended, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    todo = [f for f in chosen if not (arguments.resume and f.name in results)]
    try:
        campaign = Campaign(Tree(), arguments.relevant_only, save)
        if todo:
            campaign.prepare(todo)
            campaign.run(todo)
    except Broken as error:
        print(f"vcrd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from here", file=sys.stderr)
        return 130
    done = [f for f in everything if f.name in results]
    path = FOLDER / "table.md"
    path.write_text(table(done, results))
    survivors = [f.name for f in done if not (results[f.name].tier or f.harmless)]
    _say(f"{len(done) - len(survivors)} of {len(done)} noticed; the table is in {path}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
