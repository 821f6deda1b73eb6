"""Training of teachers, of students before the distillation, and of all methods side by side."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import methods as how
from data import SYMBOLS, Batch, batch_of, draw, solved, steps_of, unbroken, verdicts
from methods import Method, Place
from models import Shape, Stack
from problems import Family, Problem


def longest(problems: Sequence[Problem]) -> int:
    """Symbols that a solution of these may have; what is longer is wrong. Correct solutions may differ in length."""
    return 10 + max(3 * len(problem.solution(random.Random(0))) // 2 for problem in problems)


@dataclass(frozen=True)
class Sizes:
    """Of one configuration. teacher, student: width, layers and heads. teacher_steps, student_steps: at most so many,
    with correct solutions; a teacher's end when it solves a share of problems in `good_enough`, a student's when it
    solves `begun` of them, which is where the distillation begins. batch, steps: of the distillation. renewed: steps
    after which the student's own samples are drawn anew.
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
    batch: int = 12
    steps: int = 150
    renewed: int = 5
    problems: int = 256  # held out; and a quarter of that of longer ones
    seeds: int = 5
    rates: tuple[float, ...] = (1e-3, 3e-3)


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
    solutions = [problem.solution(rng) for problem in problems]
    batch = batch_of(problems, solutions, (1, rows)).to(models.device)
    loss = F.cross_entropy(models(batch.tokens).flatten(0, 2), batch.labels.flatten(), ignore_index=-1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def share_solved(models: Stack, problems: Sequence[Problem]) -> float:
    """By the first model of the stack."""
    texts = solved(models, [problems], longest(problems))[0]
    return sum(p.is_correct(text) for p, text in zip(problems, texts, strict=True)) / len(problems)


def teacher_of(
    family: Family, sizes: Sizes, path: Path, say: Callable[[str], None], device: str = "cpu"
) -> Stack:
    """Good, but not perfect: trained until it solves a share in `good_enough`. Kept in `path`."""
    low, high = sizes.good_enough
    return _taught(
        Stack(Shape(*sizes.teacher, len(SYMBOLS))).to(device),
        family,
        1,
        (sizes.teacher_steps, sizes.teacher_batch, sizes.teacher_rate),
        ((low + high) / 2, high),
        path,
        lambda text: say(f"teacher {text}"),
    )


def student_of(
    family: Family, sizes: Sizes, seed: int, path: Path, say: Callable[[str], None], device: str = "cpu"
) -> Stack:
    """One that solves some problems, with as much to learn. Kept in `path`."""
    return _taught(
        Stack(Shape(*sizes.student, len(SYMBOLS)), seed=seed).to(device),
        family,
        1000 + seed,
        (sizes.student_steps, sizes.student_batch, sizes.student_rate),
        (sizes.begun, 1.0),
        path,
        lambda text: say(f"student {seed} {text}"),
    )


def _taught(
    models: Stack,
    family: Family,
    seed: int,
    pace: tuple[int, int, float],
    wanted: tuple[float, float],
    path: Path,
    say: Callable[[str], None],
) -> Stack:
    """By correct solutions, until it solves a share of the problems in `wanted`. pace: most steps, batch, rate.

    Where the share leaps over what is wanted, or never reaches it, the best one below is kept.
    """
    if path.exists():
        models.load_state_dict(torch.load(path, map_location=models.device))
        return models
    rng, held = random.Random(seed), draw(family, random.Random(2), 300, held=True)
    steps, batch, rate = pace
    optimizer = _optimizer(models, rate)
    best: tuple[float, dict] = (-1.0, models.state_dict())
    for step in range(1, steps + 1):
        _paced(optimizer, rate, step, steps, 100)
        _imitate(models, optimizer, family, rng, batch)
        # Where it learns fast it is looked at often.
        if step % (20 if best[0] > wanted[0] / 4 else 40) and step < steps:
            continue
        share = share_solved(models, held)
        if best[0] < share <= wanted[1]:
            best = share, {name: value.clone() for name, value in models.state_dict().items()}
        if share >= wanted[0] and best[0] >= wanted[0]:
            break
    models.load_state_dict(best[1])
    short = "" if best[0] >= wanted[0] else f", less than the {wanted[0]:.1%} that were wanted"
    say(f"of {models.shape.parameters} parameters solves {best[0]:.1%} after {step} steps{short}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(models.state_dict(), path)
    return models


class Prefixes:
    """The micro-batches of a run: those of the teacher's solutions alike for all methods, of the student's own to each.

    All are drawn from the seed: every method has the same problems in the same order, and samples by the same chances.
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
    wrong: float = 0.0,
) -> Stack:
    """One student for each method, from the same beginning. wrong: the share of the verifier's verdicts that is."""
    students = Stack(student.shape, len(chosen)).to(student.device)
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
        # On the teacher's solutions all methods stand at the same place: what holds there is found once.
        marked = [_marked(batch.part(number)) for number in range(len(batch.tokens))]
        losses = [
            how.loss_of(
                method,
                logits[number],
                taught[place],
                _place(
                    *marked[place], regime, generators[number], wrong, None if first is None else first[place]
                ),
            )
            for number, method in enumerate(chosen)
            for place in [number if regime == how.OWN else 0]
        ]
        _paced(optimizer, rate, step, sizes.steps, 10)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # each student has its own gradient
        optimizer.step()
    return students


def _marked(batch: Batch) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """Its steps, where what was written next is correct, and where all is that was written before."""
    return batch, steps_of(batch), *unbroken(batch)


def _place(
    batch: Batch,
    steps: Tensor,
    written: Tensor,
    before: Tensor,
    regime: str,
    generator: torch.Generator,
    wrong: float,
    first: Tensor | None,
) -> Place:
    def judge(student_action: Tensor, teacher_action: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.stack([verdicts(batch, student_action), verdicts(batch, teacher_action)])
        if wrong:
            found ^= (torch.rand(found.shape, generator=generator) < wrong).to(found.device)
        return tuple(found.float())

    # The teacher errs, too: what it wrote counts as verified as far as it is correct.
    labels = torch.where(written, batch.labels, -1) if regime == how.TRACES else None
    return Place(batch.counts, steps, labels, judge, before, generator, first)


def correct(students: Stack, problems: Sequence[Problem]) -> list[list[bool]]:
    """Of each student, which problems it solves."""
    texts = solved(students, [problems] * students.count, longest(problems))
    return [[p.is_correct(text) for p, text in zip(problems, row, strict=True)] for row in texts]
