"""The work of one process, and the work that a comparison needs."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from compared import JUDGED_WEIGHTS, methods
from data import draw
from judges import judge_for
from methods import OWN, TRACES, Method
from models import Stack
from problems import Family
from train import Sizes, correct, distil, student_of, teacher_of
from verifiers import RIGHT, Verifier, systematic

OURS = {
    "tasks": ("arithmetic", "tracing", "formats"),
    "gym": ("chain_sum", "number_sorting", "palindrome_generation"),
    "underspecified": (
        *("walks", "coins", "orderings", "reductions", "edits", "summands"),
        *("walks_in_order", "coins_in_order", "orderings_in_order"),
        *("reductions_in_order", "edits_in_order", "summands_in_order"),
    ),
    "held_out": ("pins", "matchings", "circles", "machines"),
}
TASKS = ",".join((*OURS["tasks"], *OURS["gym"]))
LENGTHS = ("usual", "longer")
TUNING = 999  # seed of the runs that choose the learning rates
WRONG = (0.1, 0.3)  # shares of wrong verdicts
JUDGED = (
    "KL + CE",
    "scores, tokens",
    "scores, gate",
    "scores x own",
    "scores + CE",
    "scores x own + CE",
    "JSD x scores",
    "JSD x gate",
    "JSD x scores x own",
    *JUDGED_WEIGHTS,
)


@dataclass(frozen=True)
class Run:
    """The work of one process: these methods together. wrong: share of the verdicts that are wrong, at random or, if
    systematic, always on the same symbols. tuning: evaluate on the validation set.
    """

    task: str
    regime: str
    seed: int
    rate: float
    methods: tuple[str, ...]
    wrong: float = 0.0
    systematic: bool = False
    tuning: bool = False

    def verifier(self) -> Verifier:
        if not self.wrong:
            return RIGHT
        return systematic(family_of(self.task), self.wrong) if self.systematic else Verifier(self.wrong)


def family_of(name: str) -> Family:
    """A family of OURS, or module:function. ValueError if there is none."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for a module of the caller
    module, _, function = name.rpartition(":")
    if not module:
        module = next((each for each, names in OURS.items() if name in names), "")
        function = name
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--tasks: expected names of {OURS}, or module:function, got {name!r} ({error})"
        ) from None


def prepare(task: str, seed: int | None, sizes: Sizes, out: Path, device: str = "cpu") -> None:
    """The file of the task's teacher, or of the student of a seed."""
    torch.set_num_threads(1)
    model(task, seed, sizes, out, lambda text: print(f"{task}: {text}", flush=True), device)


def model(
    task: str,
    seed: int | None,
    sizes: Sizes,
    out: Path,
    say: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
) -> Stack:
    """The student of a seed, or the teacher if seed is None. Stored by everything that its training depends on."""
    family, path = family_of(task), _path(task, seed, sizes, out)
    if seed is None:
        return teacher_of(family, sizes, path, say, device)
    return student_of(family, sizes, seed, path, say, device)


def trained(task: str, seed: int | None, sizes: Sizes, out: Path) -> Stack:
    """As `model`, but FileNotFoundError if it has not been trained."""
    if not (path := _path(task, seed, sizes, out)).exists():
        raise FileNotFoundError(
            f"--out: expected models that run.py has trained there, but {path} is missing"
        )
    return model(task, seed, sizes, out)


def _path(task: str, seed: int | None, sizes: Sizes, out: Path) -> Path:
    who, until = ("teacher", sizes.good_enough) if seed is None else ("student", sizes.begun)
    its = [
        until,
        sizes.watched,
        *(getattr(sizes, f"{who}{what}") for what in ("", "_batch", "_steps", "_rate")),
    ]
    return out / "models" / _digest(its) / f"{task}-{who if seed is None else seed}.pt"


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def execute(run: Run, sizes: Sizes, out: Path, device: str = "cpu") -> dict:
    """The record of the run. Each method's result is stored in a file, and what is stored is not repeated."""
    kept = {
        name: out / "runs" / f"{_digest((replace(run, methods=(name,)), replace(sizes, seeds=0)))}.json"
        for name in run.methods
    }
    missing = tuple(name for name, path in kept.items() if not path.exists())
    if missing:
        began = time.process_time()
        found = _executed(replace(run, methods=missing), sizes, out, device)
        seconds = (time.process_time() - began) / len(missing)
        for name in missing:
            kept[name].parent.mkdir(parents=True, exist_ok=True)
            kept[name].with_suffix(".new").write_text(json.dumps({"solved": found[name], "seconds": seconds}))
            kept[name].with_suffix(".new").rename(kept[name])
    stored = {name: json.loads(path.read_text()) for name, path in kept.items()}
    record = {
        **asdict(run),
        "solved": {name: each["solved"] for name, each in stored.items()},
        "seconds": sum(each["seconds"] for each in stored.values()),
    }
    if not run.tuning:
        for name, of in (("before", run.seed), ("teacher", None)):
            record[name] = {
                length: _share_solved(run.task, of, sizes, out, length, device) for length in LENGTHS
            }
    return record


def _executed(run: Run, sizes: Sizes, out: Path, device: str) -> dict[str, float | dict[str, str]]:
    """For each method the problems that its student solves, of the usual length and longer; or their share."""
    torch.set_num_threads(1)
    family = family_of(run.task)
    teacher, student = (model(run.task, seed, sizes, out, device=device) for seed in (None, run.seed))
    chosen = [method for method in methods() if method.name in run.methods]
    judge = None
    if any(method.source == "judge" for method in chosen):
        judge = judge_for(teacher, family, sizes, _path(run.task, None, sizes, out).with_suffix(".judge.pt"))
    students = distil(
        chosen, run.regime, family, teacher, student, sizes, run.seed, run.rate, run.verifier(), judge
    )
    if run.tuning:
        held = draw(family, random.Random(3), sizes.problems, held=True)
        rows = correct(students, held)
        return {method.name: sum(row) / len(row) for method, row in zip(chosen, rows, strict=True)}
    found: dict[str, dict[str, str]] = {method.name: {} for method in chosen}
    for length, count in zip(LENGTHS, counts(sizes), strict=True):
        held = draw(family, random.Random(4), count, held=True, longer=length == "longer")
        for method, row in zip(chosen, correct(students, held), strict=True):
            found[method.name][length] = "".join("01"[each] for each in row)
    return found


@functools.cache
def _share_solved(task: str, seed: int | None, sizes: Sizes, out: Path, length: str, device: str) -> float:
    """The solved problems before the distillation; of the teacher if seed is None."""
    count = dict(zip(LENGTHS, counts(sizes), strict=True))[length]
    held = draw(family_of(task), random.Random(4), count, held=True, longer=length == "longer")
    return sum(correct(model(task, seed, sizes, out, device=device), held)[0]) / count


def counts(sizes: Sizes) -> tuple[int, int]:
    """The solved held-out problems of each length."""
    return sizes.problems, max(1, sizes.problems // 4)


def packed(record: dict) -> dict:
    """The solved problems as hexadecimal digits, eight problems per byte, padded with zeros."""
    solved = {
        method: {
            length: np.packbits([bit == "1" for bit in bits]).tobytes().hex()
            for length, bits in those.items()
        }
        for method, those in record["solved"].items()
    }
    kept = {name: value for name, value in record.items() if name not in ("methods", "tuning")}
    return {**kept, "solved": solved}


def tuning_runs(
    tasks: Iterable[str], chosen: list[Method], sizes: Sizes, regimes: Sequence[str] = (TRACES, OWN)
) -> list[Run]:
    return [
        Run(task, regime, TUNING, rate, names, tuning=True)
        for task in tasks
        for regime in regimes
        if (names := tuple(method.name for method in chosen if regime in method.regimes))
        for rate in sizes.rates
    ]


def final_runs(
    tuned: list[dict], sizes: Sizes, seed: int, verifiers: Sequence[tuple[float, bool]]
) -> list[Run]:
    """Each method at its rate, methods with one rate together. Then methods with a verifier, with verifiers that err:
    their share of wrong verdicts, and whether they err systematically.
    """
    runs = []
    for regime, rates in best_rates(tuned).items():
        for task in dict.fromkeys(record["task"] for record in tuned):
            for rate in sizes.rates:
                names = tuple(name for name, best in rates.items() if best == rate)
                if names:
                    runs.append(Run(task, regime, seed, rate, names))
                judged = tuple(name for name in names if name in JUDGED)
                if regime == OWN and judged:
                    runs += [Run(task, regime, seed, rate, judged, *verifier) for verifier in verifiers]
    return runs


def best_rates(tuned: list[dict]) -> dict[str, dict[str, float]]:
    """The rate of each method for each kind of prefixes, the best one in the mean over the tasks: a choice for each
    task would add its noise to every difference. The smallest of equal ones.
    """
    solved: dict[str, dict[str, dict[float, float]]] = {}
    for record in sorted(tuned, key=lambda record: record["rate"]):
        for name, share in record["solved"].items():
            shares = solved.setdefault(record["regime"], {}).setdefault(name, {})
            shares[record["rate"]] = shares.get(record["rate"], 0.0) + share
    return {
        regime: {name: max(shares, key=shares.get) for name, shares in by_method.items()}
        for regime, by_method in solved.items()
    }
