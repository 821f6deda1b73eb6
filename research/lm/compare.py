"""Distils a real language model with every method, and compares the students on held-out problems.

    python research/lm --out lm                                         two cores; start it twice to use both
    python research/lm --out lm --config gpu --device cuda              one H100
    python research/lm --out lm --config gpu --device cuda --seconds 80       as much as is done in 80 seconds

The teacher is SmolLM2-135M-Instruct, further trained on worked solutions of two generated families, one of which has
several correct next steps. The student has some layers of this teacher, and is briefly trained on worked solutions.
Both have SmolLM2's own tokenizer, whose tokens may be several symbols of a solution. Then each method trains one
student for each seed and kind of prefixes: those of the student's own samples, which are drawn anew every few steps,
and those of solutions by the teacher. The same random numbers are used for every method.

OUT/models keeps teachers and students, and OUT/runs keeps the results of each run. What is finished there is not
repeated, and an interrupted training continues, so the same command finishes the work in several calls, and several
processes can share it. Writes OUT/lm.json after each run, with what has been finished so far. After a change of the
code, use an empty folder. Needs the packages of `make demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lm import judged, page
from lm.losses import METHODS, REGIMES, names_of
from lm.sizes import CONFIGS, Sizes
from lm.training import Decoder, OutOfTime, Setting, distil, store, student_of, teacher_of
from methods import OWN


@dataclass(frozen=True)
class Run:
    """One student."""

    regime: str
    seed: int
    method: str


def runs_of(sizes: Sizes) -> list[Run]:
    """In this order, so that the first results already compare all methods on the student's own prefixes."""
    return [
        Run(regime, seed, name)
        for regime in REGIMES
        for seed in range(sizes.seeds)
        for name in names_of(regime)
    ]


class Folder:
    """The files of one configuration. A name has a digest of everything that the content depends on."""

    def __init__(self, out: Path, sizes: Sizes) -> None:
        self._out, self._sizes = out, replace(sizes, seeds=0)

    def teacher(self) -> Path:
        return self._models(("teacher", "good_enough")) / "teacher.pt"

    def student(self, seed: int) -> Path:
        """Only if there is a teacher, whose layers the student has."""
        return self._models(("student", "begun"), fingerprint(self.teacher())) / f"student-{seed}.pt"

    def _models(self, names: tuple[str, ...], start: str = "") -> Path:
        """Of the settings that begin with these names, and those that all models have in common."""
        names = ("families", "longer", "pool", "model", "compute", "watched", *names)
        its = {name: value for name, value in asdict(self._sizes).items() if name.startswith(names)}
        return self._out / "models" / digest((its, start))

    def of_run(self, run: Run) -> Path:
        # A teacher that is trained anew on another machine is another teacher.
        models = [fingerprint(path) for path in (self.teacher(), self.student(run.seed))]
        name = run.method.replace(" ", "-").replace(",", "")
        return self._out / "runs" / digest((self._sizes, models)) / f"{run.regime}-{run.seed}-{name}.json"


def digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def fingerprint(path: Path) -> str:
    """Of the content of a file."""
    return _fingerprint(path, path.stat().st_mtime_ns)


@functools.cache
def _fingerprint(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(text: str, path: Path) -> None:
    """Writes and renames, so that a killed process leaves no incomplete file, and two processes do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text)
    new.rename(path)


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process has the work of `path`. The lock ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


class Queue:
    """All the work of a configuration."""

    def __init__(self, out: Path, config: str, setting: Setting) -> None:
        self.config, self.setting, self.folder = config, setting, Folder(out, setting.sizes)
        self.out = out

    def work(self, most: int | None = None) -> None:
        """Does all that no other process does. most: runs. OutOfTime at the deadline."""
        with locked(self.folder.teacher(), wait=True):
            teacher = teacher_of(self.setting, self.folder.teacher())
        for run in runs_of(self.setting.sizes)[:most]:
            path = self.folder.student(run.seed)
            with locked(path, wait=True):
                student = student_of(self.setting, teacher, run.seed, path)
            kept = self.folder.of_run(run)
            with locked(kept, wait=False) as mine:
                if mine and not kept.exists():
                    write(json.dumps(self._executed(run, teacher, student, kept)), kept)
                    self.write()
            kept = self._judged(run.seed)
            with locked(kept, wait=False) as mine:
                if mine and not kept.exists():
                    store(judged.measured(self.setting, teacher, student, run.seed), kept)

    def _executed(self, run: Run, teacher: Decoder, student: Decoder, kept: Path) -> dict:
        began, processor = time.monotonic(), time.process_time()
        setting, method = self.setting, METHODS[run.method]
        model, tokens = distil(
            method, run.regime, teacher, student, run.seed, kept.with_suffix(".part"), setting
        )
        trained = time.monotonic() - began
        record = {
            **asdict(run),
            "solved": bits(setting.correct(model, setting.held_out)),
            "before": self._known(kept.with_name(f"{run.seed}.before"), student),
            "teacher": self._known(kept.with_name(f"{run.seed}.teacher"), teacher),
            "tokens": tokens,
            # Of this call alone, if the training was interrupted.
            "seconds": round(time.monotonic() - began, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        }
        share = 100 * sum(map(int, record["solved"])) / len(setting.held_out)
        setting.say(
            f"{run.regime}, seed {run.seed}, {run.method}: {share:.1f} %, {tokens} tokens, trained in {trained:.0f} s"
        )
        return record

    def _known(self, path: Path, model: Decoder) -> str:
        """The solved problems of a teacher or of a student before its distillation, measured once."""
        if not path.exists():
            write(bits(self.setting.correct(model, self.setting.held_out)), path)
        return path.read_text()

    def _judged(self, seed: int) -> Path | None:
        if not self.folder.teacher().exists() or not self.folder.student(seed).exists():
            return None
        return self.folder.of_run(Run(OWN, seed, "judged")).with_suffix(".pt")

    def finished(self) -> list[dict]:
        """The records of all runs that are finished, with this teacher and these students."""
        sizes = self.setting.sizes
        if not self.folder.teacher().exists():
            return []
        known = [run for run in runs_of(sizes) if self.folder.student(run.seed).exists()]
        paths = map(self.folder.of_run, known)
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def write(self) -> Path | None:
        """The results so far, in OUT/lm.json."""
        records = self.finished()
        if not records:
            return None
        sizes = self.setting.sizes
        judged_paths = [path for path in map(self._judged, range(sizes.seeds)) if path and path.exists()]
        results = {
            "config": self.config,
            "sizes": asdict(sizes),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.setting.device.type == "cuda" else "cpu",
            "all_runs": len(runs_of(sizes)),
            "problems": [task.family for task in self.setting.held_out].count(0),
            "median": {name: median(records, name) for name in ("tokens", "seconds", "processor_seconds")},
            "judged": judged.summary([torch.load(path, weights_only=False) for path in judged_paths]),
            "students": [packed(record, len(sizes.families)) for record in records],
        }
        path = self.out / "lm.json"
        write(json.dumps(results, indent=0) + "\n", path)
        return path


def median(records: list[dict], name: str) -> float:
    return float(np.median([record[name] for record in records]))


def bits(right: list[bool]) -> str:
    return "".join("01"[each] for each in right)


def packed(record: dict, families: int) -> dict:
    """The solved problems of each family as hexadecimal digits, eight problems per byte."""

    def hexadecimal(text: str) -> list[str]:
        flags = np.array([each == "1" for each in text])
        return [np.packbits(flags[number::families]).tobytes().hex() for number in range(families)]

    return {**record, **{name: hexadecimal(record[name]) for name in ("solved", "before", "teacher")}}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python research/lm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lm"), help="folder of the models and results")
    parser.add_argument("--config", choices=CONFIGS, default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, help="stop after these, and continue with the next call")
    parser.add_argument("--threads", type=int, default=1, help="threads of a process on the CPU")
    parser.add_argument("--most", type=int, help="only the first runs, so many of them")
    parser.add_argument("--json", type=Path, help="file for the result of this call, for make gpu-check")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU that torch can use for 'cuda', got none")
    return options


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    sizes = CONFIGS[options.config]
    setting = Setting.of(
        sizes,
        options.device,
        deadline=began + options.seconds if options.seconds else float("inf"),
        say=lambda text: print(f"{time.monotonic() - began:7.0f} s  {text}", flush=True),
    )
    queue = Queue(options.out, options.config, setting)
    with contextlib.suppress(OutOfTime):
        queue.work(options.most)
    path = queue.write()
    done, wanted = len(queue.finished()), len(runs_of(sizes))
    how = f"{done} of {wanted} runs are finished"
    print(f"{how}; the same command continues" if done < wanted else how)
    if path is not None:
        print(f"\n{page.page(json.loads(path.read_text()))}")
    if options.json is not None:
        found = {"passed": True if done == wanted else None, "how": how}
        if path is not None:
            found |= {key: value for key, value in json.loads(path.read_text()).items() if key != "students"}
        options.json.write_text(json.dumps(found, indent=1))
    return 0
