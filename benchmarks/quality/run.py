"""Does the calibration train better students? Every method on every task, from the same students, with the same tokens.

    python benchmarks/quality/run.py --out evidence                    on two cores
    python benchmarks/quality/run.py --out evidence --config large --jobs 16
    python benchmarks/quality/run.py --out mine --tasks my_tasks:sorting,my_tasks:mazes

--tasks: names of tasks.py and gym.py, or module:function of your own (problems.py says what such a function returns).
Each task has a teacher, trained until it solves 90 to 97 % of its problems, and for each seed a student that has seen
some correct solutions. The learning rate of each method is the one of a grid, the same for all, after which its student
solves the most problems of a validation set; that run's seed counts nowhere else. Then each method trains one student
for each seed. What is written: OUT/results.json, which tables.py reads. OUT/models keeps teachers and students,
OUT/runs what each run found: the same command goes on where it was stopped. After a change of the code begin with an
empty folder.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent))

from compared import methods
from data import draw
from methods import OWN, TRACES, Method
from models import Stack
from problems import Family
from train import Sizes, correct, distil, student_of, teacher_of

OURS = {
    "tasks": ("arithmetic", "tracing", "formats"),
    "gym": ("chain_sum", "number_sorting", "palindrome_generation"),
}
CONFIGS = {
    "tiny": Sizes(  # to see it run; nothing follows from it
        teacher=(16, 1, 1),
        student=(8, 1, 1),
        teacher_steps=40,
        good_enough=(0.0, 1.0),
        student_steps=5,
        batch=4,
        steps=4,
        renewed=2,
        problems=8,
        seeds=2,
        rates=(1e-3, 3e-3),
    ),
    "small": Sizes(),
    # Where the calibration may begin to matter: `small` with teachers that err more, with students that know less.
    "worse-teacher": replace(Sizes(), good_enough=(0.60, 0.75)),
    "early-student": replace(Sizes(), begun=0.05),
    "large": replace(
        Sizes(),
        teacher=(128, 4, 8),
        student=(48, 4, 6),
        teacher_steps=20_000,
        student_steps=20_000,
        batch=64,
        steps=600,
        problems=1024,
        seeds=8,
        rates=(3e-4, 1e-3, 3e-3),
    ),
}
LENGTHS = ("usual", "longer")
WHO = ("teacher", "student")
TUNING = 999  # seed of the runs that choose the rates
WRONG = (0.1, 0.3)  # shares of a verifier's verdicts that are wrong
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
)


@dataclass(frozen=True)
class Run:
    """One process's work: these methods side by side. tuning: judged on the validation set."""

    task: str
    regime: str
    seed: int
    rate: float
    methods: tuple[str, ...]
    wrong: float = 0.0
    tuning: bool = False


def family_of(name: str) -> Family:
    """Of OURS, or module:function. ValueError for none."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where a module of the caller's own lies
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


def prepare(task: str, seed: int | None, sizes: Sizes, out: Path) -> None:
    """The task's teacher, or the student of a seed, in a file."""
    torch.set_num_threads(1)
    _model(task, seed, sizes, out, lambda text: print(f"{task}: {text}", flush=True))


def _model(
    task: str, seed: int | None, sizes: Sizes, out: Path, say: Callable[[str], None] = lambda text: None
) -> Stack:
    """The teacher where seed is None. Kept by what its training depends on."""
    its = [getattr(sizes, name) for name in ("good_enough", "begun")]
    its += [getattr(sizes, f"{who}{what}") for who in WHO for what in ("", "_batch", "_steps", "_rate")]
    path = out / "models" / _digest(its) / f"{task}-{'teacher' if seed is None else seed}.pt"
    family = family_of(task)
    return (
        teacher_of(family, sizes, path, say) if seed is None else student_of(family, sizes, seed, path, say)
    )


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def execute(run: Run, sizes: Sizes, out: Path) -> dict:
    """The run's record, kept in a file: what is there is not done again."""
    kept = out / "runs" / f"{_digest((run, replace(sizes, seeds=0)))}.json"
    if not kept.exists():
        record = json.dumps(_executed(run, sizes, out))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".new").write_text(record)
        kept.with_suffix(".new").rename(kept)
    return json.loads(kept.read_text())


def _executed(run: Run, sizes: Sizes, out: Path) -> dict:
    """For each method which problems its student solves, of the usual length and longer ones."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    family = family_of(run.task)
    teacher, student = (_model(run.task, seed, sizes, out) for seed in (None, run.seed))
    chosen = [method for method in methods() if method.name in run.methods]
    students = distil(chosen, run.regime, family, teacher, student, sizes, run.seed, run.rate, run.wrong)
    if run.tuning:
        held = draw(family, random.Random(3), sizes.problems, held=True)
        found = {
            method.name: sum(row) / len(row)
            for method, row in zip(chosen, correct(students, held), strict=True)
        }
        return {**asdict(run), "solved": found, "seconds": time.perf_counter() - began}
    record = {**asdict(run), "solved": {method.name: {} for method in chosen}, "before": {}, "teacher": {}}
    for length, count in zip(LENGTHS, _counts(sizes), strict=True):
        held = draw(family, random.Random(4), count, held=True, longer=length == "longer")
        for method, row in zip(chosen, correct(students, held), strict=True):
            record["solved"][method.name][length] = "".join("01"[each] for each in row)
        for name, of in (("before", run.seed), ("teacher", None)):
            record[name][length] = _share_solved(run.task, of, sizes, out, length)
    return {**record, "seconds": time.perf_counter() - began}


@functools.cache
def _share_solved(task: str, seed: int | None, sizes: Sizes, out: Path, length: str) -> float:
    """Before the distillation; by the teacher where seed is None."""
    count = dict(zip(LENGTHS, _counts(sizes), strict=True))[length]
    held = draw(family_of(task), random.Random(4), count, held=True, longer=length == "longer")
    return sum(correct(_model(task, seed, sizes, out), held)[0]) / count


def _counts(sizes: Sizes) -> tuple[int, int]:
    """Of held-out problems of each length."""
    return sizes.problems, max(1, sizes.problems // 4)


def _packed(record: dict) -> dict:
    """Which problems are solved as hexadecimal digits, eight problems a byte, filled up with zeros."""
    solved = {
        method: {
            length: np.packbits([bit == "1" for bit in bits]).tobytes().hex()
            for length, bits in those.items()
        }
        for method, those in record["solved"].items()
    }
    return {**record, "solved": solved}


def tuning_runs(tasks: Iterable[str], chosen: list[Method], sizes: Sizes) -> list[Run]:
    return [
        Run(task, regime, TUNING, rate, names, tuning=True)
        for task in tasks
        for regime in (TRACES, OWN)
        if (names := tuple(method.name for method in chosen if regime in method.regimes))
        for rate in sizes.rates
    ]


def final_runs(tuned: list[dict], sizes: Sizes) -> list[Run]:
    """Each method at its own rate; those of one rate side by side. Then those that ask a verifier, with worse ones."""
    runs = []
    for (task, regime), rates in best_rates(tuned).items():
        for seed in range(sizes.seeds):
            for rate in sizes.rates:
                names = tuple(name for name, best in rates.items() if best == rate)
                if names:
                    runs.append(Run(task, regime, seed, rate, names))
                judged = tuple(name for name in names if name in JUDGED)
                if regime == OWN and judged:
                    runs += [Run(task, regime, seed, rate, judged, wrong) for wrong in WRONG]
    return runs


def best_rates(tuned: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """Of each task and regime the rate of each method; of equals the smallest."""
    found: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for record in sorted(tuned, key=lambda record: record["rate"]):
        rates = found.setdefault((record["task"], record["regime"]), {})
        for name, share in record["solved"].items():
            if name not in rates or share > rates[name][0]:
                rates[name] = (share, record["rate"])
    return {place: {name: rate for name, (_, rate) in rates.items()} for place, rates in found.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of the results")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--tasks", default=",".join(name for names in OURS.values() for name in names))
    parser.add_argument(
        "--methods", help="some of them, by name and separated by ';'; default: all that are no variants"
    )
    parser.add_argument("--seeds", type=int, help="students of each method; default: the configuration's")
    parser.add_argument("--steps", type=int, help="of each training; default: the configuration's")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args(arguments)
    sizes = CONFIGS[options.config]
    for name in ("seeds", "steps"):
        if getattr(options, name) is not None:
            sizes = replace(sizes, **{name: getattr(options, name)})
    tasks, chosen = options.tasks.split(","), methods()
    try:
        for task in tasks:
            family_of(task)
        chosen = _named(options.methods, chosen)
    except ValueError as error:
        parser.error(str(error))
    began = time.perf_counter()
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        models = [(task, seed) for seed in (None, TUNING, *range(sizes.seeds)) for task in tasks]
        for made in [pool.submit(prepare, task, seed, sizes, options.out) for task, seed in models]:
            made.result()
        tuned = _all(pool, tuning_runs(tasks, chosen, sizes), sizes, options.out, "choosing rates")
        final = _all(pool, final_runs(tuned, sizes), sizes, options.out, "training")
    results = {
        "config": options.config,
        "sizes": asdict(sizes),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "rates": {f"{task}, {regime}": rates for (task, regime), rates in best_rates(tuned).items()},
        "problems": dict(zip(LENGTHS, _counts(sizes), strict=True)),
        "runs": [_packed(record) for record in final],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=0) + "\n")
    print(f"{options.out / 'results.json'}: {len(final)} runs in {results['seconds'] / 60:.0f} minutes")


def _end_with_parent() -> None:
    """A worker whose parent is killed would go on with what is in its queue."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _named(text: str | None, known: list[Method]) -> list[Method]:
    if text is None:
        return [method for method in known if method.group != "variant"]
    wanted = [name.strip() for name in text.split(";")]
    if unknown := [name for name in wanted if name not in {method.name for method in known}]:
        raise ValueError(
            f"--methods: expected names among {[method.name for method in known]}, got {unknown[0]!r}"
        )
    return [method for method in known if method.name in wanted]


def _all(pool: ProcessPoolExecutor, runs: list[Run], sizes: Sizes, folder: Path, what: str) -> list[dict]:
    began, found = time.perf_counter(), []
    for record in pool.map(execute, runs, [sizes] * len(runs), [folder] * len(runs)):
        found.append(record)
        passed = (time.perf_counter() - began) / 60
        print(f"{what}: {len(found)} of {len(runs)} runs, {passed:.1f} min", flush=True)
    return found


if __name__ == "__main__":
    main()
