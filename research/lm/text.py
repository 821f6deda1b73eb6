"""Problems in the tokens of a language model, and an exact verifier for tokens of several symbols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from data import SYMBOLS
from problems import END, Problem, State

WRONG = "\0"  # stands for a token that no solution has; a symbol of no family
PAD = 0


class Vocabulary:
    """texts: what each token adds to a solution. The token `end` ends a solution, as END does in its text."""

    def __init__(self, texts: Sequence[str], end: int, encoder: Callable[[str], list[int]]) -> None:
        # A token without text would be a correct step that leads nowhere.
        self.texts = [text if text and END not in text else WRONG for text in texts]
        self.texts[end] = END
        self.end = end
        self._encoder = encoder

    def encode(self, text: str) -> list[int]:
        ended = text.endswith(END)
        return self._encoder(text.removesuffix(END)) + [self.end] * ended

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.texts[token] for token in tokens)


def smollm2() -> Vocabulary:
    """That of SmolLM2. Its end of a turn ends a solution. Needs the packages of `make demo`."""
    from examples.demo.settings import CACHE
    from examples.demo.source import prepare, tokenizer

    prepare(CACHE)
    known = tokenizer(CACHE)
    special = known.get_added_tokens_decoder()
    texts = [
        WRONG if token in special else known.decode([token], skip_special_tokens=False)
        for token in range(known.get_vocab_size())
    ]
    end = known.token_to_id("<|im_end|>")
    return Vocabulary(texts, end, lambda text: known.encode(text, add_special_tokens=False).ids)


def pairs_of_symbols() -> Vocabulary:
    """For tests: the symbols of all families, and some pairs of them, which are preferred."""
    symbols = SYMBOLS[2:]
    digits = "0123456789"
    pairs = (
        [a + b for a in digits for b in digits + ";="] + [f";{letter}" for letter in symbols[-52:]] + [";="]
    )
    texts = [WRONG, END, *symbols, *pairs]
    token = {text: number for number, text in enumerate(texts)}

    def encode(text: str) -> list[int]:
        found, place = [], 0
        while place < len(text):
            size = 2 if text[place : place + 2] in token else 1
            found.append(token[text[place : place + size]])
            place += size
        return found

    return Vocabulary(texts, token[END], encode)


class Cursor:
    """A place in correct solutions of a problem: what has been written so far, and every way to go on."""

    __slots__ = ("_steps", "_begun", "_after")

    def __init__(self, steps: Mapping[str, State | None], begun: str = "") -> None:
        self._steps, self._begun = steps, begun
        self._after: dict[str, Cursor | None] = {}  # the same places are visited again and again

    def after(self, text: str) -> Cursor | None:
        """The place after this text; None if no correct solution continues with it."""
        if text not in self._after:
            self._after[text] = self._walked(text)
        return self._after[text]

    def _walked(self, text: str) -> Cursor | None:
        steps, begun = self._steps, self._begun
        for symbol in text:
            begun += symbol
            if begun in steps:
                state = steps[begun]
                steps, begun = {} if state is None else state.steps(), ""
            elif not any(step.startswith(begun) for step in steps):
                return None
        return Cursor(steps, begun)


@dataclass
class Task:
    """A problem of a family (its number), and its prompt in tokens. worked: a correct solution in tokens."""

    problem: Problem
    family: int
    prompt: list[int]
    worked: list[int]

    @cached_property
    def start(self) -> Cursor:
        return Cursor(self.problem.start.steps())


@dataclass
class Rows:
    """Rows of prompt and solution, with padding after them.

    tokens: int64 [b, s]. counts: bool [b, s], where the next token belongs to the solution; n places in all.
    written: int64 [n], these next tokens. places: n cursors, None after the first wrong token.
    """

    tokens: Tensor
    counts: Tensor
    written: Tensor
    places: list[Cursor | None]
    texts: Sequence[str]

    @classmethod
    def of(cls, tasks: Sequence[Task], solutions: Sequence[Sequence[int]], vocabulary: Vocabulary) -> Rows:
        length = max(len(task.prompt) + len(each) for task, each in zip(tasks, solutions, strict=True)) - 1
        tokens = torch.full((len(tasks), length), PAD)
        counts = torch.zeros(len(tasks), length, dtype=torch.bool)
        written, places = [], []
        for row, (task, solution) in enumerate(zip(tasks, solutions, strict=True)):
            text = [*task.prompt, *solution]
            tokens[row, : len(text) - 1] = torch.tensor(text[:-1])
            counts[row, len(task.prompt) - 1 : len(text) - 1] = True
            written += solution
            place: Cursor | None = task.start
            for token in solution:
                places.append(place)
                place = None if place is None else place.after(vocabulary.texts[token])
        return cls(tokens, counts, torch.tensor(written), places, vocabulary.texts)

    def valid(self, actions: Tensor) -> Tensor:
        """Whether a correct solution continues with each of these tokens, int64 [n] -> bool [n] on their device."""
        found = [
            place is not None and place.after(self.texts[token]) is not None
            for place, token in zip(self.places, actions.tolist(), strict=True)
        ]
        return torch.tensor(found, device=actions.device)

    def unbroken(self) -> Tensor:
        """Whether everything before is correct, bool [n]."""
        return torch.tensor([place is not None for place in self.places])
