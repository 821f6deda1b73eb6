"""Worked arithmetic, with an exact verifier: does a correct continuation begin with this token?

A prompt is a chain of operations, evaluated from left to right: `7+5-3*2?` asks for ((7+5)-3)*2. A response has steps
and ends with a full stop: `7+5=12;12-3=9;9*2=18;.` or `7+5-3=9;9*2=18;.`. Each step evaluates one or more operations
at the front of the chain and writes the result. A step with one sum or product may swap its operands: `5+7=12;`. So
many prefixes have several correct next tokens, and one label cannot express them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# One token per character; the first is padding.
SYMBOLS = "_0123456789+-*=;?."
PADDING, END = 0, SYMBOLS.index(".")
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def encode(text: str) -> list[int]:
    return [SYMBOLS.index(symbol) for symbol in text]


def decode(tokens: list[int]) -> str:
    return "".join(SYMBOLS[token] if 0 <= token < len(SYMBOLS) else "_" for token in tokens)


@dataclass(frozen=True)
class Chain:
    """A number and operations on it. Each operation is a sign and an operand of at least 0."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, generator: torch.Generator, operations: int, largest: int = 9) -> Chain:
        """A random chain of numbers from 0 to `largest`."""
        numbers = torch.randint(largest + 1, (operations + 1,), generator=generator).tolist()
        signs = torch.randint(len(_OPERATIONS), (operations,), generator=generator).tolist()
        names = [list(_OPERATIONS)[sign] for sign in signs]
        return cls(numbers[0], tuple(zip(names, numbers[1:], strict=True)))

    @classmethod
    def parse(cls, prompt: str) -> Chain:
        """The chain of a prompt such as `7+5-3*2?`; ValueError for any other text."""
        numbers, signs = [""], []
        for symbol in prompt[:-1]:
            if symbol in _OPERATIONS:
                signs.append(symbol)
                numbers.append("")
            else:
                numbers[-1] += symbol
        if not prompt.endswith("?") or not all(n.isascii() and n.isdigit() for n in numbers):
            raise ValueError(f"prompt: expected a chain such as '7+5-3*2?', got {prompt!r}")
        first, *rest = map(int, numbers)
        return cls(first, tuple(zip(signs, rest, strict=True)))

    @property
    def prompt(self) -> str:
        return f"{self.start}{''.join(sign + str(number) for sign, number in self.operations)}?"

    def steps(self) -> dict[str, Chain]:
        """Every correct next step, with the remaining chain."""
        found, value, text = {}, self.start, str(self.start)
        for done, (sign, number) in enumerate(self.operations, 1):
            value, text = _OPERATIONS[sign](value, number), f"{text}{sign}{number}"
            rest = Chain(value, self.operations[done:])
            found[f"{text}={value};"] = rest
            if done == 1 and sign in "+*":
                found[f"{number}{sign}{self.start}={value};"] = rest
        return found


def correct_next(prompt: str, response: str) -> frozenset[str]:
    """The symbols with which a correct continuation of `response` begins; none if it is wrong or has ended."""
    chain = Chain.parse(prompt)
    *finished, begun = response.split(";")
    for step in finished:
        chain = chain.steps().get(step + ";")
        if chain is None:
            return frozenset()
    texts = chain.steps() or {".": chain}
    return frozenset(text[len(begun)] for text in texts if len(text) > len(begun) and text.startswith(begun))


def step_ids(response: str) -> list[int]:
    """The step of each symbol of a response. The full stop is a separate step."""
    return [response[:position].count(";") for position in range(len(response))]


def verifier(tokens: Tensor, student_action: Tensor, teacher_action: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's validity, float32 [b, s]: 1 if a correct continuation begins with the action, else 0.

    All arguments are int64 [b, s]. Actions of -1 and actions inside the prompt are not judged. After an error in the
    row itself no action is correct: both validities are 0, and the weight is that of equal validity.
    """
    validities = torch.ones(2, *tokens.shape)
    actions = torch.stack([student_action, teacher_action])
    for row, text in enumerate(map(decode, tokens.tolist())):
        end_of_prompt = text.find("?") + 1
        for who, position in (actions[:, row] >= 0).nonzero().tolist():
            if not 0 < end_of_prompt <= position + 1:
                continue
            correct = correct_next(text[:end_of_prompt], text[end_of_prompt : position + 1])
            proposed = decode([int(actions[who, row, position])])
            validities[who, row, position] = float(proposed in correct)
    return validities[0], validities[1]
