"""Makes teachers and students, and distils. Each training continues where it was interrupted."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import draw
from examples.demo.model import Shape
from lm.decoder import Decoder, generate
from lm.losses import Method, loss_of
from lm.sizes import Sizes
from lm.text import Rows, Task, Vocabulary, pairs_of_symbols, smollm2
from methods import OWN
from runs import family_of
from train import paced

SAVE_EVERY = 300.0  # seconds
PARTS = 3  # A batch is computed in this many groups of rows of similar length: less padding.
_TINY = Shape(2, 24, 40, 4, 2, 6, 0, 1e-5, 10000.0)  # the vocabulary has its own size
Say = Callable[[str], None]


class OutOfTime(Exception):
    """The time is over. What was being trained is stored, and continues with the next call."""


@dataclass(frozen=True)
class Setting:
    """What every training needs. deadline: in seconds of `time.monotonic`."""

    sizes: Sizes
    vocabulary: Vocabulary
    tasks: tuple[Task, ...]
    watched: tuple[Task, ...]
    held_out: tuple[Task, ...]
    length: int  # most tokens of a solution
    device: torch.device
    deadline: float = float("inf")
    say: Say = lambda text: None

    @classmethod
    def of(cls, sizes: Sizes, device: str = "cpu", **more: Any) -> Setting:
        vocabulary = smollm2() if sizes.model == "smollm2" else pairs_of_symbols()
        pool = _tasks(sizes, vocabulary, 1, sizes.pool, held=False)
        watched = _tasks(sizes, vocabulary, 2, sizes.watched // len(sizes.families), held=True)
        held_out = _tasks(sizes, vocabulary, 4, sizes.problems // len(sizes.families), held=True)
        # Correct solutions may differ in length, also in tokens.
        longest = max(len(task.worked) for task in (*pool, *held_out))
        length = 4 + 3 * longest // 2
        return cls(sizes, vocabulary, pool, watched, held_out, length, torch.device(device), **more)

    def picked(self, seed: int, count: int) -> list[Task]:
        """`count` of the training problems, as many of each family, in random order."""
        rng, families = random.Random(seed), len(self.sizes.families)
        each = len(self.tasks) // families
        drawn = [self.tasks[rng.randrange(each) * families + number % families] for number in range(count)]
        rng.shuffle(drawn)
        return drawn

    def solved(self, model: Decoder, tasks: Sequence[Task], chances: Tensor | None = None) -> list[list[int]]:
        prompts = [task.prompt for task in tasks]
        return generate(model, prompts, self.length, self.vocabulary.end, chances, self.sizes.together)

    def correct(self, model: Decoder, tasks: Sequence[Task]) -> list[bool]:
        """Whether the model solves each problem, greedily."""
        texts = map(self.vocabulary.decode, self.solved(frozen(model), tasks))
        return [task.problem.is_correct(text) for task, text in zip(tasks, texts, strict=True)]

    def sampled(self, model: Decoder, seed: int, count: int) -> tuple[list[Task], list[list[int]]]:
        """Problems, and solutions that are sampled from the model. Every model gets the same random numbers."""
        tasks = self.picked(seed, count)
        chances = torch.rand(count, self.length, generator=torch.Generator().manual_seed(seed))
        return tasks, self.solved(model, tasks, chances)

    def logits(self, model: Decoder, rows: Rows) -> Tensor:
        """[n, vocabulary], at the n places of `rows`. Rows of similar length go together, with less padding."""
        row, place = rows.counts.nonzero(as_tuple=True)
        length = torch.zeros(len(rows.tokens), dtype=torch.int64).scatter_reduce(0, row, place + 1, "amax")
        hidden, at = [], []
        for group in length.argsort(stable=True).tensor_split(PARTS):
            if len(group):
                group = group.sort().values  # so that its places stay in their order
                last = int(length[group].max())
                tokens, counts = (each[group, :last].to(self.device) for each in (rows.tokens, rows.counts))
                hidden.append(model(tokens)[counts])
                at.append(torch.isin(row, group).nonzero()[:, 0])
        return model.logits(torch.cat(hidden)[torch.cat(at).argsort().to(self.device)])

    def rows(self, tasks: Sequence[Task], solutions: Sequence[Sequence[int]]) -> Rows:
        return Rows.of(tasks, solutions, self.vocabulary)


def _tasks(sizes: Sizes, vocabulary: Vocabulary, seed: int, count: int, held: bool) -> tuple[Task, ...]:
    """`count` problems of each family, which alternate."""
    rng, found = random.Random(seed), []
    for number, name in enumerate(sizes.families):
        problems = draw(family_of(name), rng, count, held=held, longer=sizes.longer)
        encode = vocabulary.encode
        found.append(
            [Task(each, number, encode(each.prompt), encode(each.solution(rng))) for each in problems]
        )
    return tuple(task for several in zip(*found, strict=True) for task in several)


def decoder(setting: Setting, layers: Sequence[int], seed: int = 0) -> Decoder:
    """The model before any training, with these of its layers. seed: of the tiny model, whose weights are random."""
    sizes = setting.sizes
    compute = getattr(torch, sizes.compute)
    if sizes.model == "tiny":
        shape = Shape(**{**vars(_TINY), "vocab_size": len(setting.vocabulary.texts)})
        return Decoder(shape, len(layers), compute).start(seed).to(setting.device)
    from examples.demo.settings import CACHE
    from examples.demo.source import weights

    model = Decoder(Shape.load(CACHE / "shape.json"), len(layers), compute)
    with weights(CACHE) as fetch:
        return model.load(fetch, layers).to(setting.device)


def frozen(model: Decoder) -> Decoder:
    """A copy whose weights are in the dtype of the matrix products, without gradients."""
    return copy.deepcopy(model).to(model.compute).requires_grad_(False)


def optimizer_of(model: Decoder, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def step_of(model: Decoder, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Progress:
    """Stores a training in a file, from time to time and when the time is over."""

    def __init__(
        self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer, setting: Setting
    ) -> None:
        self._path, self._setting = path, setting
        self._parts = {"model": model, "optimizer": optimizer}
        self._stored = time.monotonic()

    def begin(self) -> tuple[int, Any]:
        """Restores what is stored: its step and what was kept with it, or 0 and None."""
        if not self._path.exists():
            return 0, None
        content = torch.load(self._path, map_location=self._setting.device, weights_only=False)
        for name, part in self._parts.items():
            part.load_state_dict(content[name])
        return content["step"], content["kept"]

    def look(self, step: int, kept: Any) -> None:
        """After `step` steps. Stores if it is time to. OutOfTime if the deadline has passed."""
        now = time.monotonic()
        over = now > self._setting.deadline
        if over or now - self._stored > SAVE_EVERY:
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            store({**parts, "step": step, "kept": kept}, self._path)
            self._stored = time.monotonic()
        if over:
            raise OutOfTime

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


def store(content: Any, path: Path) -> None:
    """Writes and renames, so that a killed run leaves no incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save(content, new)
    new.rename(path)


@dataclass(frozen=True)
class Pace:
    """steps: at most. wanted: ends when the share of solved problems is in it. look: steps between measurements."""

    steps: int
    batch: int
    rate: float
    look: int
    wanted: tuple[float, float]


def taught(model: Decoder, pace: Pace, seed: int, path: Path, setting: Setting, name: str) -> Decoder:
    """Trains on worked solutions until the share of solved problems is in `pace.wanted`. Stored in `path`.

    If the share jumps over this range or never reaches it, the best model below is kept.
    """
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=setting.device))
        return model
    optimizer = optimizer_of(model, pace.rate)
    progress = Progress(path.with_suffix(".part"), model, optimizer, setting)
    step, best = progress.begin()
    best = best or (-1.0, None, 0)
    low, high = pace.wanted
    while step < pace.steps and best[0] < low:
        step += 1
        paced(optimizer, pace.rate, step, pace.steps, 20)
        tasks = setting.picked(seed * 1_000_000 + step, pace.batch)
        rng = random.Random(seed * 1_000_000 + step)
        solutions = [setting.vocabulary.encode(task.problem.solution(rng)) for task in tasks]
        rows = setting.rows(tasks, solutions)
        loss = F.cross_entropy(setting.logits(model, rows).float(), rows.written.to(setting.device))
        step_of(model, optimizer, loss)
        if step % pace.look and step < pace.steps:
            continue
        right = setting.correct(model, setting.watched)
        share = sum(right) / len(right)
        setting.say(f"{name}: step {step}, loss {loss.item():.3f}, solves {_by_family(right, setting)}")
        if best[0] < share <= high:
            best = share, {key: value.clone() for key, value in model.state_dict().items()}, step
        elif share > high and best[1] is not None:
            break
        progress.look(step, best)
    if best[1] is not None:
        model.load_state_dict(best[1])
    setting.say(f"{name} solves {best[0]:.1%} after {best[2]} steps; wanted: {low:.0%} to {high:.0%}")
    store(model.state_dict(), path)
    progress.end()
    return model


def _by_family(right: Sequence[bool], setting: Setting) -> str:
    names = setting.sizes.families
    shares = [
        sum(right[number :: len(names)]) / len(right[number :: len(names)]) for number in range(len(names))
    ]
    return f"{sum(right) / len(right):.1%} ({', '.join(f'{share:.1%}' for share in shares)})"


def teacher_of(setting: Setting, path: Path) -> Decoder:
    """The teacher, ready for use."""
    sizes = setting.sizes
    pace = Pace(
        sizes.teacher_steps, sizes.teacher_batch, sizes.teacher_rate, sizes.teacher_look, sizes.good_enough
    )
    return frozen(taught(decoder(setting, sizes.teacher_layers), pace, 1, path, setting, "teacher"))


def student_of(setting: Setting, teacher: Decoder, seed: int, path: Path) -> Decoder:
    """The student of a seed before the distillation: layers of the teacher, trained briefly."""
    sizes = setting.sizes
    pace = Pace(sizes.student_steps, sizes.student_batch, sizes.student_rate, sizes.student_look, sizes.begun)
    kept = [sizes.teacher_layers.index(layer) for layer in sizes.student_layers]
    return taught(teacher.part(kept), pace, 1000 + seed, path, setting, f"student {seed}")


def distil(
    method: Method,
    regime: str,
    teacher: Decoder,
    student: Decoder,
    seed: int,
    path: Path,
    setting: Setting,
) -> tuple[Decoder, int]:
    """A student, trained from `student`, and the number of tokens of its training. path: of what is interrupted.

    All methods see the same problems in the same order and draw with the same random numbers.
    """
    sizes = setting.sizes
    model = copy.deepcopy(student)
    optimizer = optimizer_of(model, sizes.rate)
    progress = Progress(path, model, optimizer, setting)
    step, tokens = progress.begin()
    tokens = tokens or 0
    while step < sizes.steps:
        # Samples and shuffles depend on the step alone, so that an interrupted training continues as it would have.
        tasks, solutions = setting.sampled(
            frozen(model) if regime == OWN else teacher,
            77_000_000 + seed * 100_000 + step,
            sizes.batch * sizes.renewed,
        )
        for first in range(0, len(tasks), sizes.batch):
            its = slice(first, first + sizes.batch)
            rows = setting.rows(tasks[its], solutions[its])
            with torch.no_grad():
                taught_logits = setting.logits(teacher, rows)
            logits = setting.logits(model, rows)
            generator = torch.Generator().manual_seed(31 * seed + step)
            step += 1
            paced(optimizer, sizes.rate, step, sizes.steps, max(1, sizes.steps // 15))
            step_of(model, optimizer, loss_of(method, logits, taught_logits, rows, regime, generator))
            tokens += sum(
                len(task.prompt) + len(each) for task, each in zip(tasks[its], solutions[its], strict=True)
            )
            if step == sizes.steps:
                break
        progress.look(step, tokens)
    progress.end()
    return model, tokens
