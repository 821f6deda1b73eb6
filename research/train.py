"""Trains teachers, students before the distillation, and all methods together."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import methods as how
from data import STOP, SYMBOLS, Batch, batch_of, draw, solved, steps_of, up_to_the_first_error, verdicts
from methods import Method, Place
from models import Shape, Stack
from problems import Family, Problem
from verifiers import RIGHT, Verifier

# A batch, the student's actions and the teacher's -> whether each is valid, float.
Judge = Callable[[Batch, Tensor, Tensor], tuple[Tensor, Tensor]]


def longest(problems: Sequence[Problem]) -> int:
    """The longest allowed solution of these problems, in symbols. Correct solutions may differ in length."""
    return 10 + max(3 * len(problem.solution(random.Random(0))) // 2 for problem in problems)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one configuration. teacher, student: width, layers and heads. teacher_steps, student_steps: most steps
    on correct solutions. The training of a teacher ends when it solves a share of problems in `good_enough`, that of a
    student when it solves `begun` of them; then the distillation begins. batch, steps: of the distillation. renewed:
    steps after which the student's own samples are drawn again. watched: held-out problems whose solved share ends the
    training of teachers and students.
    """

    teacher: tuple[int, int, int] = (72, 3, 4)
    student: tuple[int, int, int] = (32, 3, 4)
    teacher_batch: int = 64
    teacher_steps: int = 3000
    teacher_rate: float = 3e-3
    good_enough: tuple[float, float] = (0.90, 0.97)
    student_batch: int = 32
    student_steps: int = 3000
    student_rate: float = 6e-3
    begun: float = 0.3
    watched: int = 300
    batch: int = 12
    steps: int = 150
    renewed: int = 5
    problems: int = 256  # held out; and a quarter as many longer ones
    seeds: int = 5
    rates: tuple[float, ...] = (1e-3, 3e-3)


def optimizer_of(models: Stack, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(models.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def paced(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, warm_up: int) -> None:
    """Rises linearly, then falls to a tenth along a cosine. step: starts at 1."""
    down = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, step / warm_up) * down


def imitate(
    models: Stack,
    optimizer: torch.optim.Optimizer,
    family: Family,
    rng: random.Random,
    rows: int,
    shown: Callable[[Problem, random.Random], Problem] = lambda problem, rng: problem,
) -> None:
    """Runs one step with correct solutions. shown: a problem as the model sees it."""
    problems = [shown(problem, rng) for problem in draw(family, rng, rows)]
    solutions = [problem.solution(rng) for problem in problems]
    batch = batch_of(problems, solutions, (1, rows)).to(models.device)
    loss = F.cross_entropy(models(batch.tokens).flatten(0, 2), batch.labels.flatten(), ignore_index=-1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def share_solved(models: Stack, problems: Sequence[Problem]) -> float:
    """The share of problems that the first model of the stack solves."""
    texts = solved(models, [problems], longest(problems))[0]
    return sum(p.is_correct(text) for p, text in zip(problems, texts, strict=True)) / len(problems)


def teacher_of(
    family: Family, sizes: Sizes, path: Path, say: Callable[[str], None], device: str = "cpu"
) -> Stack:
    """A teacher, trained until it solves a share in `good_enough`. Stored in `path`."""
    low, high = sizes.good_enough
    return _taught(
        Stack(Shape(*sizes.teacher, len(SYMBOLS))).to(device),
        family,
        1,
        (sizes.teacher_steps, sizes.teacher_batch, sizes.teacher_rate),
        ((low + high) / 2, high),
        sizes.watched,
        path,
        lambda text: say(f"teacher {text}"),
    )


def student_of(
    family: Family, sizes: Sizes, seed: int, path: Path, say: Callable[[str], None], device: str = "cpu"
) -> Stack:
    """A student that solves some problems. Stored in `path`."""
    return _taught(
        Stack(Shape(*sizes.student, len(SYMBOLS)), seed=seed).to(device),
        family,
        1000 + seed,
        (sizes.student_steps, sizes.student_batch, sizes.student_rate),
        (sizes.begun, 1.0),
        sizes.watched,
        path,
        lambda text: say(f"student {seed} {text}"),
    )


def _taught(
    models: Stack,
    family: Family,
    seed: int,
    pace: tuple[int, int, float],
    wanted: tuple[float, float],
    watched: int,
    path: Path,
    say: Callable[[str], None],
) -> Stack:
    """Trains on correct solutions until the share of solved problems is in `wanted`. pace: most steps, batch, rate.

    If the share jumps over this range or never reaches it, the best model below is kept.
    """
    if path.exists():
        models.load_state_dict(torch.load(path, map_location=models.device))
        return models
    rng, held = random.Random(seed), draw(family, random.Random(2), watched, held=True)
    steps, batch, rate = pace
    optimizer = optimizer_of(models, rate)
    best: tuple[float, dict] = (-1.0, models.state_dict())
    for step in range(1, steps + 1):
        paced(optimizer, rate, step, steps, 100)
        imitate(models, optimizer, family, rng, batch)
        # Evaluates more often if it learns fast.
        if step % (20 if best[0] > wanted[0] / 4 else 40) and step < steps:
            continue
        share = share_solved(models, held)
        if best[0] < share <= wanted[1]:
            best = share, {name: value.clone() for name, value in models.state_dict().items()}
        if share >= wanted[0] and best[0] >= wanted[0]:
            break
    models.load_state_dict(best[1])
    short = "" if best[0] >= wanted[0] else f", less than the wanted {wanted[0]:.1%}"
    say(f"of {models.shape.parameters} parameters solves {best[0]:.1%} after {step} steps{short}")
    store(models, path)
    return models


def store(models: Stack, path: Path) -> None:
    """Writes the file of a model, whole or not at all: several processes may train the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}")
    torch.save(models.state_dict(), written)
    written.rename(path)


class Prefixes:
    """The micro-batches of a run. Teacher solutions are the same for all methods; each student has its own samples.

    All are drawn from the seed. Every method has the same problems in the same order, and the same random numbers.
    """

    def __init__(
        self, regime: str, family: Family, teacher: Stack, sizes: Sizes, seed: int, count: int
    ) -> None:
        self._regime, self._family, self._teacher, self._sizes, self._count = (
            regime,
            family,
            teacher,
            sizes,
            count,
        )
        self._rng = random.Random(77_000 + seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[list[tuple[Problem, str]]] = []

    def next(self, students: Stack) -> Batch:
        """Shape [methods, rows], or [1, rows] if all have the same."""
        rows = self._sizes.batch
        if not self._waiting:
            problems = draw(self._family, self._rng, rows * self._sizes.renewed)
            own = self._regime == how.OWN
            models, count = (students, self._count) if own else (self._teacher, 1)
            chances = torch.rand(len(problems), longest(problems), generator=self._generator)
            texts = solved(models, [problems] * count, chances.shape[1], chances)
            pairs = [list(zip(problems, row, strict=True)) for row in texts]
            for first in range(0, len(problems), rows):
                self._waiting.append([pair for row in pairs for pair in row[first : first + rows]])
        pairs = self._waiting.pop(0)
        batch = batch_of(*map(list, zip(*pairs, strict=True)), (len(pairs) // rows, rows))
        return batch.to(students.device)


def distil(
    chosen: Sequence[Method],
    regime: str,
    family: Family,
    teacher: Stack,
    student: Stack,
    sizes: Sizes,
    seed: int,
    rate: float,
    verifier: Verifier = RIGHT,
    judge: Judge | None = None,
) -> Stack:
    """Trains one student per method, from the same initial student. judge: for methods with this source of verdicts."""
    students = Stack(student.shape, len(chosen)).to(student.device)
    students.take(student, [0] * len(chosen))
    optimizer = optimizer_of(students, rate)
    prefixes = Prefixes(regime, family, teacher, sizes, seed, len(chosen))
    generators = [torch.Generator().manual_seed(31 * seed + 7) for _ in chosen]
    for step in range(1, sizes.steps + 1):
        batch = prefixes.next(students)
        with torch.no_grad():
            flat = batch.tokens.view(1, -1, batch.tokens.shape[-1])
            taught = teacher(flat).view(*batch.tokens.shape, -1)
            first = (
                student(flat).view(*batch.tokens.shape, -1) if any(m.against_first for m in chosen) else None
            )
        logits = students(batch.tokens.expand(len(chosen), -1, -1))
        # On the teacher's solutions all methods have the same tokens, so these values are computed once.
        marked = [_marked(batch.part(number)) for number in range(len(batch.tokens))]
        losses = []
        for number, method in enumerate(chosen):
            place = number if regime == how.OWN else 0
            where = _place(marked[place], regime, generators[number], verifier, judge)
            where.first_logits = None if first is None else first[place]
            losses.append(how.loss_of(method, logits[number], taught[place], where))
        paced(optimizer, rate, step, sizes.steps, 10)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # the students have separate gradients
        optimizer.step()
    return students


@dataclass(frozen=True)
class Marked:
    """A micro-batch, with what holds for all methods: steps, whether each written token is correct, positions."""

    batch: Batch
    steps: Tensor
    written: Tensor
    position: Tensor


def _marked(batch: Batch) -> Marked:
    position = torch.where(batch.counts, batch.counts.long().cumsum(-1) - 1, -1)
    return Marked(batch, steps_of(batch), verdicts(batch, batch.labels.clamp(min=0)), position)


def _place(
    marked: Marked, regime: str, generator: torch.Generator, verifier: Verifier, judge: Judge | None
) -> Place:
    batch, written = marked.batch, marked.written

    def verified(local: bool, *actions: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.stack([verdicts(batch, action, local) for action in actions])
        return tuple(verifier(found, torch.stack(actions), generator).float())

    def judged(student_action: Tensor, teacher_action: Tensor) -> tuple[Tensor, Tensor]:
        return judge(batch, student_action, teacher_action)

    # The teacher makes errors too. Its tokens count as verified while its solution is correct.
    labels = torch.where(written, batch.labels, -1) if regime == how.TRACES else None
    unbroken = up_to_the_first_error(batch.counts, verifier(written, batch.labels, generator))
    # A solution that does not end is not correct either.
    solved = (written | ~batch.counts).all(-1) & (batch.labels == STOP).any(-1)
    return Place(
        batch.counts,
        marked.steps,
        labels,
        batch.labels,
        {"verifier": partial(verified, False), "local": partial(verified, True), "judge": judged},
        unbroken,
        solved[:, None].expand_as(batch.counts),
        marked.position,
        generator,
    )


def correct(students: Stack, problems: Sequence[Problem]) -> list[list[bool]]:
    """The problems that each student solves."""
    texts = solved(students, [problems] * students.count, longest(problems))
    return [[p.is_correct(text) for p, text in zip(problems, row, strict=True)] for row in texts]
