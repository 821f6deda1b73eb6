"""Three families of tasks: multi-step arithmetic, tracing of programs, and instructions with a checkable format."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from problems import END, Problem, State

_LOWER, _UPPER = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Chain(State):
    """Operations on a number, evaluated from the left. Operands of sums and products may be swapped.

    rest: name, sign and number of each operation. modulus: for every result; 0 for none.
    """

    value: int
    rest: tuple[tuple[str, str, int], ...]
    modulus: int = 0

    def steps(self) -> Mapping[str, State | None]:
        if not self.rest:
            return {f"={self.value}{END}": None}
        (name, sign, number), *rest = self.rest
        value = _OPERATIONS[sign](self.value, number)
        if self.modulus:
            value %= self.modulus
        left = Chain(value, tuple(rest), self.modulus)
        found = {f"{name}{self.value}{sign}{number}={value};": left}
        if sign != "-":
            found[f"{name}{number}{sign}{self.value}={value};"] = left
        return found


def names(draw: random.Random, count: int, alphabet: str) -> str:
    """Letters in order. A solution uses them to name operations."""
    first = draw.randrange(len(alphabet) - count + 1)
    return alphabet[first : first + count]


def chain(draw: random.Random, start: int, pairs: Sequence[tuple[str, int]], modulus: int = 0) -> Problem:
    """pairs: sign and number of each operation."""
    rest = tuple((name, *pair) for name, pair in zip(names(draw, len(pairs), _LOWER), pairs, strict=True))
    prompt = f"{start}{''.join(f'{name}{sign}{number}' for name, sign, number in rest)}?"
    return Problem(prompt, Chain(start, rest, modulus))


def arithmetic(draw: random.Random, longer: bool) -> Problem:
    """`7f+5g-3h*2?` is evaluated modulo 10: `f7+5=2;g2-3=9;h2*9=8;=8$`."""
    count = 5 if longer else draw.randint(2, 4)
    return chain(
        draw, draw.randrange(10), [(draw.choice("+-*"), draw.randrange(10)) for _ in range(count)], 10
    )


@dataclass(frozen=True)
class Trace(State):
    """The remaining statements of a program, and the values of the variables."""

    statements: tuple[tuple[str, str, str, str, str], ...]  # line, target, left, sign, right
    values: tuple[tuple[str, int], ...]
    asked: str

    def steps(self) -> Mapping[str, State | None]:
        known = dict(self.values)
        if not self.statements:
            return {f"={known[self.asked]}{END}": None}
        (line, target, left, sign, right), *rest = self.statements
        a, b = (known[name] if name in known else int(name) for name in (left, right))
        known[target] = _OPERATIONS[sign](a, b) % 10
        state = "".join(f"{name}{value}" for name, value in sorted(known.items()))
        text = f"{line}{a}{sign}{b}={known[target]}:{state};"
        return {text: Trace(tuple(rest), tuple(sorted(known.items())), self.asked)}


def tracing(draw: random.Random, longer: bool) -> Problem:
    """`a3b7;Fa+b=a;Ga*2=b;?b` sets two variables and changes them; the trace: `F3+7=0:a0b7;G0*2=0:a0b0;=0$`."""
    values = tuple((name, draw.randrange(10)) for name in "ab")
    count = 4 if longer else draw.randint(1, 3)
    statements = tuple(
        (
            line,
            draw.choice("ab"),
            draw.choice("ab"),
            draw.choice("+-*"),
            draw.choice(["a", "b", str(draw.randrange(10))]),
        )
        for line in names(draw, count, _UPPER)
    )
    asked = draw.choice("ab")
    head = "".join(f"{name}{value}" for name, value in values)
    body = "".join(f"{line}{left}{sign}{right}={target};" for line, target, left, sign, right in statements)
    return Problem(f"{head};{body}?{asked}", Trace(statements, values, asked))


@dataclass(frozen=True)
class Words(State):
    """The remaining words in a format, in this order."""

    left: tuple[str, ...]
    form: str  # "u": in capitals; "r": backwards; "d": each letter doubled
    tagged: bool  # each with any digit

    def steps(self) -> Mapping[str, State | None]:
        if not self.left:
            return {f"={END}": None}
        word, *rest = self.left
        formed = {"u": word.upper(), "r": word[::-1], "d": "".join(letter * 2 for letter in word)}[self.form]
        left = Words(tuple(rest), self.form, self.tagged)
        return {f"{formed}{tag};": left for tag in ("0123456789" if self.tagged else ("",))}


def formats(draw: random.Random, longer: bool) -> Problem:
    """`u-!bal,cen,fim?` asks for the words in capitals, from the last on (`+`: from the first), each with some digit:
    `FIM4;CEN0;BAL7;=$`.
    """
    count = 4 if longer else draw.randint(2, 3)
    parts = (draw.sample(letters, count) for letters in ("bcdfghj", "aeiou", "klmnprs"))
    words = tuple(map("".join, zip(*parts, strict=True)))
    form, order, tag = draw.choice("urd"), draw.choice("+-"), draw.choice(".!")
    prompt = f"{form}{order}{tag}{','.join(words)}?"
    return Problem(prompt, Words(words if order == "+" else words[::-1], form, tag == "!"))
