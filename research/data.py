"""Problems and solutions as tensors of tokens, and the verdicts of an exact verifier."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Stack, generate
from problems import END, Family, Problem

# One token per symbol; the first is padding.
SYMBOLS = "\0" + END + "0123456789+-*/%=;,.:!?" + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STOP = SYMBOLS.index(END)
_TOKEN = {symbol: token for token, symbol in enumerate(SYMBOLS)}


def encode(text: str) -> list[int]:
    return [_TOKEN[symbol] for symbol in text]


def decode(tokens: Sequence[int]) -> str:
    return "".join(SYMBOLS[token] for token in tokens)


@dataclass
class Batch:
    """Rows of prompt and solution. tokens, labels: int64 [.., s]; the label is the next token, -1 if it does not
    count. counts: bool [.., s], where the next token belongs to the solution. problems: of the rows, flat.
    """

    tokens: Tensor
    labels: Tensor
    counts: Tensor
    problems: list[Problem]
    solutions: list[str]

    def to(self, device: torch.device) -> Batch:
        tensors = (each.to(device) for each in (self.tokens, self.labels, self.counts))
        return Batch(*tensors, self.problems, self.solutions)

    def part(self, place: int) -> Batch:
        """The rows of one part of [parts, rows, s]."""
        rows = self.tokens.shape[1]
        its = slice(place * rows, (place + 1) * rows)
        tensors = (each[place] for each in (self.tokens, self.labels, self.counts))
        return Batch(*tensors, self.problems[its], self.solutions[its])

    @cached_property
    def allowed(self) -> Tensor:
        """The tokens with which a correct continuation begins, bool [.., s, symbols]; none outside solutions."""
        return self._allowed(local=False)

    @cached_property
    def allowed_locally(self) -> Tensor:
        """As `allowed`, where a step after a wrong one is judged by what is written."""
        return self._allowed(local=True)

    def _allowed(self, local: bool) -> Tensor:
        length = self.tokens.shape[-1]
        places = [
            ((row * length + len(problem.prompt) - 1 + place) * len(SYMBOLS)) + _TOKEN[symbol]
            for row, (problem, solution) in enumerate(zip(self.problems, self.solutions, strict=True))
            for place, symbols in enumerate(problem.allowed(solution, local))
            for symbol in symbols
        ]
        found = torch.zeros(self.tokens.numel() * len(SYMBOLS), dtype=torch.bool)
        found[torch.tensor(places, dtype=torch.int64)] = True
        return found.view(*self.tokens.shape, len(SYMBOLS)).to(self.tokens.device)


def batch_of(problems: Sequence[Problem], solutions: Sequence[str], leading: tuple[int, ...] = ()) -> Batch:
    """The rows as tensors. leading: shape of the rows; default [rows]."""
    texts = [problem.prompt + solution for problem, solution in zip(problems, solutions, strict=True)]
    length = max(map(len, texts)) - 1
    tokens = torch.zeros(len(texts), length + 1, dtype=torch.int64)
    counts = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (text, problem) in enumerate(zip(texts, problems, strict=True)):
        tokens[row, : len(text)] = torch.tensor(encode(text))
        counts[row, len(problem.prompt) - 1 : len(text) - 1] = True
    labels = torch.where(counts, tokens[:, 1:], -1)
    shape = leading or (len(texts),)
    return Batch(
        *(each.view(*shape, length) for each in (tokens[:, :-1].contiguous(), labels, counts)),
        list(problems),
        list(solutions),
    )


def verdicts(batch: Batch, actions: Tensor, local: bool = False) -> Tensor:
    """Whether a correct continuation begins with each action, bool as `actions` [.., s]; false outside solutions.
    local: a step after a wrong one is judged by what is written.
    """
    allowed = batch.allowed_locally if local else batch.allowed
    return allowed.gather(-1, actions[..., None])[..., 0]


def up_to_the_first_error(counts: Tensor, written: Tensor) -> Tensor:
    """Whether a token counts and all earlier ones are correct, bool [.., s]. written: whether each next token is."""
    before = F.pad((written | ~counts)[..., :-1], (1, 0), value=True)
    return counts & before.long().cumprod(-1).bool()


def unbroken(batch: Batch) -> tuple[Tensor, Tensor]:
    """bool [.., s] each: whether the next written token is correct, and whether all earlier ones are."""
    written = verdicts(batch, batch.labels.clamp(min=0))
    return written, up_to_the_first_error(batch.counts, written)


def steps_of(batch: Batch) -> Tensor:
    """The reasoning step of each position, int64, numbered over all rows; -1 outside solutions. A step ends at ';'."""
    ends = batch.tokens == _TOKEN[";"]
    # The token after a ';' begins the next step.
    number = (ends & batch.counts).view(-1, batch.tokens.shape[-1]).cumsum(-1)
    rows = torch.arange(len(batch.problems), device=number.device)[:, None] * batch.tokens.shape[-1]
    return torch.where(batch.counts, (number + rows).view(batch.tokens.shape), -1)


def is_held_out(problem: Problem) -> bool:
    """Whether a problem is held out: a fifth of all problems, by their text."""
    return zlib.crc32(problem.prompt.encode()) % 5 == 0


def draw(
    family: Family, rng: random.Random, count: int, held: bool = False, longer: bool = False
) -> list[Problem]:
    """Draws different problems. held: those that are held out. ValueError if there are too few."""
    found: list[Problem] = []
    for _ in range(100 * count + 1000):
        if len(found) == count:
            return found
        problem = family(rng, longer)
        if is_held_out(problem) == held:
            found.append(problem)
    raise ValueError(
        f"{family.__name__} draws too few different problems: expected {count} with held out {held}, "
        f"got {len(found)} of {100 * count + 1000}"
    )


def solved(
    models: Stack, problems: Sequence[Sequence[Problem]], length: int, chances: torch.Tensor | None = None
) -> list[list[str]]:
    """Solutions of each model for its problems, up to END or `length`. Greedy, or sampled with chances
    [problems, length], as in `generate`.
    """
    longest = max(len(problem.prompt) for row in problems for problem in row)
    tokens = torch.zeros(len(problems), len(problems[0]), longest, dtype=torch.int64)
    padding = torch.zeros(tokens.shape[:2], dtype=torch.int64)
    for model, row in enumerate(problems):
        for place, problem in enumerate(row):
            padding[model, place] = longest - len(problem.prompt)
            tokens[model, place, padding[model, place] :] = torch.tensor(encode(problem.prompt))
    if chances is not None:
        chances = chances.to(models.device)
    found = generate(
        models, tokens.to(models.device), padding.to(models.device), length, STOP, chances
    ).tolist()
    return [[decode(row).rstrip("\0") for row in rows] for rows in found]
