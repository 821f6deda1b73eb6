"""Kills at random moments of a run: do the student's final weights equal those of an undisturbed run, bit for bit?

    PYTHONPATH=. python tests/link/chaos.py --kills 50 --steps 200

A student of tensor ranks and data ranks trains a linear model on the answers of teacher replicas, once undisturbed,
then while ranks of the teacher, or whole replicas, are killed with signal 9: at random moments from their very start
on, one after another. What comes back is laid out at random. The steps are spread over the kills. Prints a line per
kill and a summary; exit status 1 unless all weights are equal, the student finished, and nothing was left running.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # also in the processes that it starts, which import it by name
    sys.path.append(str(Path(__file__).parents[1]))

from fork_server import context
from link_jobs import Jobs, Layout
from ports import free_port
from rejoin_jobs import run_student, run_teacher, settings_for

PATIENCE = 300.0  # seconds for the last steps, on a machine that has other things to do


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--payload", default="float32", choices=["float32", "float16", "logits_8bit"])
    parser.add_argument("--transport", default="tcp", choices=["tcp", "fake"])
    parser.add_argument("--tensor", type=int, default=2, help="the student's tensor-parallel size")
    parser.add_argument("--data", type=int, default=2, help="the student's data-parallel size")
    parser.add_argument("--context", type=int, default=1, help="the student's context-parallel size")
    parser.add_argument(
        "--replicas", type=int, default=2, help="teacher replicas, at most the data-parallel size"
    )
    parser.add_argument("--vocab", type=int, default=1009)
    parser.add_argument("--longest", type=float, default=2.5, help="seconds that a replica lives at most")
    given = parser.parse_args()
    student = Layout(
        student_tensor=given.tensor,
        student_context=given.context,
        student_data=given.data,
        replicas=given.replicas,
        vocab=given.vocab,
    )
    calm = weights_after(student, given, kills=0)
    stormy = weights_after(student, given, kills=given.kills)
    same = calm == stormy
    print(
        f"{given.kills} kills, {given.steps} steps, seed {given.seed}: weights {'equal' if same else 'DIFFER'}"
    )
    return 0 if same else 1


def weights_after(student: Layout, given: argparse.Namespace, kills: int) -> list[str]:
    """The digest of each rank's final weights."""
    dice = random.Random(given.seed)
    settings = settings_for(free_port(), payload=given.payload, transport=given.transport)
    allowed = context().Value("i", given.steps)
    names = [f"student{rank}" for rank in range(student.students)]
    with tempfile.TemporaryDirectory() as folder, Jobs(Path(folder)) as jobs:
        replicas = [Replica(jobs, student, settings, replica, dice) for replica in range(given.replicas)]
        if kills:
            allowed.value = max(1, given.steps // (kills + 1))
        jobs.world(
            "student", student.students, run_student, student, settings, given.steps, 0.0, True, allowed
        )
        for replica in replicas:
            replica.start()
        begun = time.monotonic()
        for kill in range(kills):
            time.sleep(dice.uniform(0.0, given.longest))
            step = jobs.output("student0").count("step ")
            victim = dice.choice(replicas)
            print(
                f"{time.monotonic() - begun:6.1f} s, step {step:3}, kill {kill + 1:3}: {victim.kill()}",
                flush=True,
            )
            victim.start()
            if not jobs.processes["student0"].is_alive():
                break
            allowed.value = max(1, given.steps * (kill + 2) // (kills + 1))
        allowed.value = given.steps
        deadline = time.monotonic() + PATIENCE
        for name in [*names, *(name for replica in replicas for name in replica.names)]:
            process = jobs.processes[name]
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode != 0 or (name in names and "threads left: []" not in jobs.output(name)):
                print(f"--- {name} ended with {process.exitcode}\n{jobs.output(name)}")
                return [f"none {kills}"]
        losses = sum(jobs.output(name).count("is lost to") for name in names)
        took = time.monotonic() - begun
        print(
            f"{took:6.1f} s, finished after {kills} kills, of which ranks that ask noticed {losses}",
            flush=True,
        )
        return [digest(jobs.output(name)) for name in names]


def digest(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("weights ")]
    return line


class Replica:
    """A teacher replica that is started again after each of its deaths."""

    def __init__(self, jobs: Jobs, student: Layout, settings, replica: int, dice: random.Random) -> None:
        self.names: list[str] = []
        self._jobs, self._student, self._settings, self._replica, self._dice = (
            jobs,
            student,
            settings,
            replica,
            dice,
        )
        self._lives = 0

    def start(self) -> None:
        layout = Layout(
            vocab=self._student.vocab,
            replicas=self._student.replicas,
            teacher_tensor=self._dice.choice([1, 2, 3]),
            pipeline=self._dice.choice([0, 1]),
        )
        name = f"teacher{self._replica}.{self._lives}."
        self._lives += 1
        self._jobs.world(name, layout.teachers, run_teacher, self._replica, layout, self._settings)
        self.names = [f"{name}{rank}" for rank in range(layout.teachers)]

    def kill(self) -> str:
        """One rank and, as a launcher would, the others after it; or all at once. What was done, in words."""
        victim = self._dice.choice(self.names)
        alone = self._dice.random() < 0.6
        self._jobs.kill(victim)
        if alone:
            time.sleep(self._dice.uniform(0.0, 0.5))
        for name in self.names:
            self._jobs.kill(name)
        return f"{victim}, {'then' if alone else 'with'} the rest of {len(self.names)}"


if __name__ == "__main__":
    sys.exit(main())
