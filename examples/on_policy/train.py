"""The teacher, the students, and the methods that are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from examples.on_policy.model import VOCAB, Learner, forward_step, shape
from examples.on_policy.problems import LENGTH, draw, is_right, micro_batches, right_steps, solution
from examples.on_policy.sampling import sample
from examples.verified.arithmetic import END, Chain, decode, encode
from vcrd.megatron import DistillSettings, distill

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """teacher, student: layers, hidden size and heads. teacher_updates, student_updates: of the first training, on
    `first_rows` right solutions each with the learning rate `first_rate`. updates, rows, rate: of the distillation.
    parts: micro-batches of an update. fresh: updates after which the student samples again. held_out: problems
    that are counted every `interval` updates.
    """

    teacher: tuple[int, int, int] = (2, 48, 4)
    student: tuple[int, int, int] = (2, 32, 4)
    teacher_updates: int = 400
    student_updates: int = 400
    first_rows: int = 64
    first_rate: float = 5e-3
    updates: int = 200
    fresh: int = 5
    rows: int = 32
    parts: int = 2
    rate: float = 5e-4
    held_out: int = 200
    interval: int = 50
    seeds: int = 3


FULL = Sizes()
QUICK = Sizes(
    teacher_updates=10,
    student_updates=5,
    first_rows=8,
    updates=4,
    fresh=2,
    rows=8,
    held_out=8,
    interval=4,
    seeds=1,
)


@dataclass(frozen=True)
class Method:
    """own: whether the prefixes are the student's own samples; else they are right solutions. validity: as for vcrd."""

    name: str
    own: bool
    validity: str


METHODS = (
    Method("off-policy, uniform", own=False, validity="uniform"),
    Method("off-policy, label", own=False, validity="label"),
    Method("on-policy, uniform", own=True, validity="uniform"),
    Method("on-policy, confidence", own=True, validity="confidence"),
    Method("on-policy, scores", own=True, validity="scores"),
)


@dataclass(frozen=True)
class Teacher:
    """solved: share of the held-out problems. right_steps: share of its tokens that are in right steps, of those up to
    the end of the first wrong step; on problems of the training.
    """

    solved: float
    right_steps: float


@dataclass(frozen=True)
class Run:
    """solved: share of the held-out problems before the first update, and after each `interval` updates."""

    method: str
    seed: int
    solved: list[float]
    seconds: float


def train_teacher(sizes: Sizes, say: Say) -> tuple[torch.nn.Module, Teacher]:
    """A trained and frozen teacher, and how good it is."""
    model = _taught(sizes.teacher, sizes.teacher_updates, 0, sizes)
    problems = draw(sizes.held_out, torch.Generator().manual_seed(0))
    judged = [
        right for pair in answered(model, problems) for right in right_steps(*pair) if right is not None
    ]
    found = Teacher(share_solved(model, sizes), sum(judged) / len(judged))
    say(f"the teacher solves {found.solved:.1%}; {found.right_steps:.1%} of its tokens are in right steps")
    return model.eval().requires_grad_(False), found


def compare(teacher: torch.nn.Module, about: Teacher, seed: int, sizes: Sizes, say: Say) -> list[Run]:
    """Distils a new student with each method, from the same weights and on the same problems."""
    start = _taught(sizes.student, sizes.student_updates, seed, sizes).state_dict()
    runs = []
    for method in METHODS:
        distillation = Distillation(method, teacher, about, seed, sizes)
        model = distillation.learner.model
        model.load_state_dict(start)
        began, curve = time.perf_counter(), [share_solved(model, sizes)]
        for number in range(sizes.updates // sizes.fresh):
            distillation.round(number)
            if (number + 1) * sizes.fresh % sizes.interval == 0:
                curve.append(share_solved(model, sizes))
        distillation.plug.close()
        runs.append(Run(method.name, seed, curve, time.perf_counter() - began))
        say(f"seed {seed}, {method.name}: {' '.join(f'{share:.1%}' for share in curve)}")
    return runs


class Distillation:
    """A student with random weights, and rounds of samples and updates."""

    def __init__(
        self, method: Method, teacher: torch.nn.Module, about: Teacher, seed: int, sizes: Sizes
    ) -> None:
        self.learner = Learner(shape(*sizes.student), seed, sizes.rate, sizes.updates)
        settings = DistillSettings(divergence="jsd", validity=method.validity, vocab_size=VOCAB)
        self.plug = distill(forward_step, settings, teacher=teacher.module)
        self._method, self._about, self._seed, self._sizes = method, about, seed, sizes

    def round(self, number: int) -> None:
        """Samples once and trains on it. A run can resume here: the number is the whole state of sampling and data."""
        sizes = self._sizes
        generator = generator_of(self._seed, number)
        problems = draw(sizes.rows * sizes.fresh, generator)
        if self._method.own:
            seed = int(torch.randint(2**62, (), generator=generator))
            responses = [response for _, response in answered(self.learner.model, problems, 1.0, seed)]
        else:
            responses = [solution(problem) for problem in problems]
        scores = self._about.right_steps if self._method.validity == "scores" else None
        batches = iter(micro_batches(problems, responses, sizes.rows // sizes.parts, scores))
        for _ in range(sizes.fresh):
            self.learner.update(self.plug, batches, sizes.parts)


def share_solved(model: torch.nn.Module, sizes: Sizes) -> float:
    """Share of the held-out problems that the model solves with its most probable tokens."""
    problems = draw(sizes.held_out, torch.Generator().manual_seed(0), held_out=True)
    return sum(is_right(*pair) for pair in answered(model, problems)) / len(problems)


def answered(
    model: torch.nn.Module, problems: list[Chain], temperature: float = 0.0, seed: int = 0
) -> Iterator[tuple[Chain, str]]:
    prompts = [encode(problem.prompt) for problem in problems]
    options: dict[str, Any] = {"vocab_size": VOCAB, "temperature": temperature, "seed": seed}
    responses = sample(model, prompts, LENGTH + 1, END, **options)
    return zip(problems, map(decode, responses), strict=True)


def _taught(size: tuple[int, int, int], updates: int, seed: int, sizes: Sizes) -> torch.nn.Module:
    """A model that was trained on right solutions, with cross-entropy."""
    learner = Learner(shape(*size), seed, sizes.first_rate, updates)
    for number in range(updates):
        problems = draw(sizes.first_rows, generator_of(seed, number, first=True))
        solutions = [solution(problem) for problem in problems]
        batches = micro_batches(problems, solutions, sizes.first_rows // sizes.parts)
        learner.update(forward_step, iter(batches), sizes.parts)
    return learner.model


def generator_of(seed: int, number: int, first: bool = False) -> torch.Generator:
    """Of a round, or of an update of the first training. Data-parallel replicas draw different problems, the ranks of
    one replica the same.
    """
    replica = parallel_state.get_data_parallel_rank()
    return torch.Generator().manual_seed(((2 * seed + first) * 4096 + replica) * 2**20 + number)
