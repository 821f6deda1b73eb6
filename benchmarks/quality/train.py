"""Training of teachers, of students before the distillation, and of all methods side by side."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import methods as how
import torch
import torch.nn.functional as F
from data import SYMBOLS, Batch, batch_of, draw, solved, steps_of, verdicts
from methods import Method, Place
from models import Shape, Stack
from problems import Family, Problem
from torch import Tensor

MOST = 110  # symbols of a solution: what is longer is wrong


@dataclass(frozen=True)
class Sizes:
    """Of one configuration. teacher, student: width, layers and heads. good_enough: the share of problems that a
    teacher solves when its training ends. warm: steps of the student with correct solutions before the distillation.
    renewed: steps after which the student's own samples are drawn anew.
    """

    teacher: tuple[int, int, int] = (48, 3, 3)
    student: tuple[int, int, int] = (24, 2, 2)
    teacher_batch: int = 64
    teacher_steps: int = 6000
    good_enough: tuple[float, float] = (0.90, 0.97)
    warm: int = 900
    warm_rate: float = 6e-3
    batch: int = 16
    steps: int = 150
    renewed: int = 5
    problems: int = 256  # held out, of each length
    seeds: int = 5
    rates: tuple[float, ...] = (5e-4, 1.5e-3, 4e-3)


def _optimizer(models: Stack, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(models.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)


def _paced(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, warm_up: int) -> None:
    """Linearly up, then down to a tenth along a cosine. step: from 1 on."""
    down = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, step / warm_up) * down


def _imitate(
    models: Stack, optimizer: torch.optim.Optimizer, family: Family, rng: random.Random, rows: int
) -> None:
    """One step with correct solutions."""
    problems = draw(family, rng, rows)
    batch = batch_of(problems, [problem.solution(rng) for problem in problems], (1, rows))
    loss = F.cross_entropy(models(batch.tokens).flatten(0, 2), batch.labels.flatten(), ignore_index=-1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def share_solved(models: Stack, problems: Sequence[Problem]) -> float:
    """By the first model of the stack."""
    texts = solved(models, [problems], MOST)[0]
    return sum(p.is_correct(text) for p, text in zip(problems, texts, strict=True)) / len(problems)


def teacher_of(family: Family, sizes: Sizes, path: Path, say: Callable[[str], None]) -> Stack:
    """Good, but not perfect: trained until it solves a share in `good_enough`. Kept in `path`."""
    shape = Shape(*sizes.teacher, len(SYMBOLS))
    models = Stack(shape)
    if path.exists():
        models.load_state_dict(torch.load(path))
        return models
    rng, held = random.Random(1), draw(family, random.Random(2), 400)
    rate, often = 4e-3, 20
    optimizer = _optimizer(models, rate)
    low, high = sizes.good_enough
    share = 0.0
    best: tuple[float, dict] = (-1.0, {})
    for step in range(1, sizes.teacher_steps + 1):
        _paced(optimizer, rate, step, sizes.teacher_steps, 100)
        _imitate(models, optimizer, family, rng, sizes.teacher_batch)
        if step % (often if share > low / 2 else 5 * often) and step < sizes.teacher_steps:
            continue
        share = share_solved(models, held)
        if best[0] < share <= high:
            best = share, {name: value.clone() for name, value in models.state_dict().items()}
        if (low + high) / 2 <= share <= high:
            break
    if best[0] < low:
        say(f"the teacher solves {max(best[0], 0):.1%}, less than the {low:.0%} that were asked for")
    models.load_state_dict(best[1] or models.state_dict())
    say(f"teacher of {shape.parameters} parameters: {best[0]:.1%} solved after {step} steps")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(models.state_dict(), path)
    return models


def student_of(family: Family, sizes: Sizes, seed: int, path: Path) -> Stack:
    """A student that has seen some correct solutions. Kept in `path`."""
    models = Stack(Shape(*sizes.student, len(SYMBOLS)), seed=seed)
    if path.exists():
        models.load_state_dict(torch.load(path))
        return models
    rng = random.Random(1000 + seed)
    optimizer = _optimizer(models, sizes.warm_rate)
    for step in range(1, sizes.warm + 1):
        _paced(optimizer, sizes.warm_rate, step, sizes.warm, 50)
        _imitate(models, optimizer, family, rng, 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(models.state_dict(), path)
    return models


class Prefixes:
    """The micro-batches of a run: those of the teacher's solutions alike for all methods, of the student's own to each.

    All are drawn from the seed, so that every method sees the same problems in the same order.
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
        """Of [methods, rows], or [1, rows] where all have the same."""
        rows = self._sizes.batch
        if not self._waiting:
            problems = draw(self._family, self._rng, rows * self._sizes.renewed)
            own = self._regime == how.OWN
            models, count = (students, self._count) if own else (self._teacher, 1)
            texts = solved(models, [problems] * count, MOST, 1.0, self._generator)
            pairs = [list(zip(problems, row, strict=True)) for row in texts]
            for first in range(0, len(problems), rows):
                self._waiting.append([pair for row in pairs for pair in row[first : first + rows]])
        pairs = self._waiting.pop(0)
        return batch_of(*map(list, zip(*pairs, strict=True)), (len(pairs) // rows, rows))


def distil(
    chosen: Sequence[Method],
    regime: str,
    family: Family,
    teacher: Stack,
    student: Stack,
    sizes: Sizes,
    seed: int,
    rate: float,
    wrong: float = 0.0,
) -> Stack:
    """One student for each method, from the same beginning. wrong: the share of the verifier's verdicts that is."""
    students = Stack(student.shape, len(chosen))
    students.take(student, [0] * len(chosen))
    optimizer = _optimizer(students, rate)
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
        losses = [
            how.loss_of(
                method,
                logits[number],
                taught[place],
                _place(batch, place, regime, generators[number], wrong, first),
            )
            for number, method in enumerate(chosen)
            for place in [number if regime == how.OWN else 0]
        ]
        _paced(optimizer, rate, step, sizes.steps, 10)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # each student has its own gradient
        optimizer.step()
    return students


def _place(
    batch: Batch, place: int, regime: str, generator: torch.Generator, wrong: float, first: Tensor | None
) -> Place:
    rows = batch.tokens.shape[1]
    mine = Batch(
        batch.tokens[place],
        batch.labels[place],
        batch.counts[place],
        batch.problems[place * rows : (place + 1) * rows],
        batch.solutions[place * rows : (place + 1) * rows],
    )

    def judge(student_action: Tensor, teacher_action: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.stack([verdicts(mine, student_action), verdicts(mine, teacher_action)])
        if wrong:
            found ^= torch.rand(found.shape, generator=generator) < wrong
        return tuple(found.float())

    labels = None
    if regime == how.TRACES:
        # The teacher errs, too: what it wrote counts as verified as far as it is correct.
        labels = torch.where(verdicts(mine, mine.labels.clamp(min=0)), mine.labels, -1)
    steps = steps_of(mine)
    return Place(mine.counts, steps, labels, judge, generator, None if first is None else first[place])


def correct(students: Stack, problems: Sequence[Problem]) -> list[list[bool]]:
    """Of each student, which problems it solves."""
    texts = solved(students, [problems] * students.count, MOST)
    return [[p.is_correct(text) for p, text in zip(problems, row, strict=True)] for row in texts]
