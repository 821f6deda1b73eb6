"""Compares the methods: trains students with each of them on every task, from the same students and tokens.

    python research/run.py --out evidence                    on two cores
    python research/run.py --out evidence --config large --device cuda --jobs 13     on one H100
    python research/run.py --out evidence --name variants --methods variants
    python research/run.py --out mine --tasks my_tasks:sorting,my_tasks:mazes

--tasks: names of tasks.py and gym.py, or your own module:function (problems.py describes such a function).

Each task has a teacher, trained until it solves 90 to 97 % of its problems, and for each seed a student that has seen
some correct solutions. All methods share a grid of learning rates. Each method uses the rate whose student solves the
most problems of a validation set. The seed of these runs is used nowhere else. Then each method trains one student for
each seed. Writes OUT/NAME.json after each seed, and at the end plots in OUT/NAME and the tables of tables.py.
OUT/models keeps teachers and students, and OUT/runs keeps the result of each method. So the same command continues
after an interruption, and a command with further methods or seeds uses what is there. After a change of the code, use
an empty folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))

import tables
from compared import named, sets
from configs import CONFIGS
from methods import OWN, TRACES
from runs import (
    LENGTHS,
    TASKS,
    TUNING,
    WRONG,
    Run,
    best_rates,
    counts,
    execute,
    family_of,
    final_runs,
    packed,
    prepare,
    tuning_runs,
)
from train import Sizes
from underspecified import underspecification


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    sizes = CONFIGS[options.config]
    for name in ("seeds", "steps"):
        if getattr(options, name) is not None:
            sizes = replace(sizes, **{name: getattr(options, name)})
    tasks = options.tasks.split(",")
    try:
        for task in tasks:
            family_of(task)
        chosen = named(options.methods)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: expected a GPU that torch can use for 'cuda', got none")
        verifiers = [(share, False) for share in _shares("--wrong", options.wrong)]
        verifiers += [(share, True) for share in _shares("--wrong-symbols", options.wrong_symbols)]
        seeds = range(options.first_seed, options.first_seed + sizes.seeds)
        if not 0 <= options.first_seed or TUNING in seeds:
            raise ValueError(
                f"--first-seed: expected seeds from 0 on without {TUNING}, which chooses the rates, got {seeds}"
            )
    except ValueError as error:
        parser.error(str(error))
    began = time.perf_counter()
    name = options.name or options.config
    path, where = options.out / f"{name}.json", (sizes, options.out, options.device)
    final: list[dict] = []
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        _prepared(pool, [(task, seed) for seed in (None, TUNING) for task in tasks], where)
        regimes = (TRACES, OWN) if options.prefixes == "both" else (options.prefixes,)
        tuned = _all(pool, tuning_runs(tasks, chosen, sizes, regimes), where, "choosing rates")
        results = {
            "config": options.config,
            "sizes": asdict(sizes),
            "torch": torch.__version__,
            "rates": best_rates(tuned),
            "problems": dict(zip(LENGTHS, counts(sizes), strict=True)),
            "underspecified": {task: underspecification(family_of(task)) for task in tasks},
        }
        # One seed after another, so that the results of complete seeds can be read before the end.
        for seed in seeds:
            _prepared(pool, [(task, seed) for task in tasks], where)
            final += _all(pool, final_runs(tuned, sizes, seed, verifiers), where, f"training, seed {seed}")
            results["core_minutes"] = round(sum(record["seconds"] for record in (*tuned, *final)) / 60, 1)
            results["runs"] = [packed(record) for record in final]
            path.write_text(json.dumps(results, indent=0) + "\n")
    print(f"{path}: {len(final)} runs in {(time.perf_counter() - began) / 60:.0f} minutes\n", flush=True)
    tables.main([str(path), "--plots", str(path.with_suffix(""))])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of the results")
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--name", help="name of the results; default: that of the configuration")
    parser.add_argument(
        "--methods", default="usual", help=f"sets ({', '.join(sets())}) and methods by name, separated by ';'"
    )
    parser.add_argument(
        "--wrong",
        default=",".join(map(str, WRONG)),
        help='further shares of wrong verdicts besides 0; "" for none',
    )
    parser.add_argument(
        "--wrong-symbols",
        default="",
        help="shares of wrong verdicts of verifiers that are always wrong about the same symbols",
    )
    parser.add_argument(
        "--prefixes", choices=("both", TRACES, OWN), default="both", help="of the teacher's solutions, or own"
    )
    parser.add_argument("--seeds", type=int, help="students per method; default: of the configuration")
    parser.add_argument("--first-seed", type=int, default=0, help="first seed of the students")
    parser.add_argument("--steps", type=int, help="steps of each training; default: of the configuration")
    parser.add_argument("--jobs", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the models")
    return parser


def _prepared(
    pool: ProcessPoolExecutor, models: list[tuple[str, int | None]], where: tuple[Sizes, Path, str]
) -> None:
    for made in [pool.submit(prepare, task, seed, *where) for task, seed in models]:
        made.result()


def _end_with_parent() -> None:
    """Ends a worker when its parent is killed. Otherwise it would continue with its queue."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _shares(option: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part]
        if all(0 < share < 1 for share in found):
            return found
    except ValueError:
        pass
    raise ValueError(f"{option}: expected numbers between 0 and 1, separated by ',', got {text!r}")


def _all(pool: ProcessPoolExecutor, runs: list[Run], where: tuple[Sizes, Path, str], what: str) -> list[dict]:
    began, found = time.perf_counter(), []
    for record in pool.map(execute, runs, *([each] * len(runs) for each in where)):
        found.append(record)
        passed = (time.perf_counter() - began) / 60
        print(f"{what}: {len(found)} of {len(runs)} runs, {passed:.1f} min", flush=True)
    return found


if __name__ == "__main__":
    main()
