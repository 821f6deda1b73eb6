"""Three families of tasks: multi-step arithmetic, the tracing of programs, instructions whose format can be checked."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from problems import END, Problem, State

_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Chain(State):
    """Operations on a number, worked from the left. Operands of sums and products may change places.

    modulus: of every result; 0 for none.
    """

    value: int
    rest: tuple[tuple[str, int], ...]
    modulus: int = 0

    def steps(self) -> Mapping[str, State | None]:
        if not self.rest:
            return {f"={self.value}{END}": None}
        (sign, number), *rest = self.rest
        value = _OPERATIONS[sign](self.value, number)
        if self.modulus:
            value %= self.modulus
        left = Chain(value, tuple(rest), self.modulus)
        found = {f"{self.value}{sign}{number}={value};": left}
        if sign != "-":
            found[f"{number}{sign}{self.value}={value};"] = left
        return found


def arithmetic(draw: random.Random, longer: bool) -> Problem:
    """`7+5-3*2?` is worked off as `7+5=2;2-3=9;9*2=8;=8$`."""
    count = draw.randint(6, 7) if longer else draw.randint(2, 5)
    start = draw.randrange(10)
    rest = tuple((draw.choice("+-*"), draw.randrange(10)) for _ in range(count))
    return Problem(f"{start}{''.join(f'{sign}{number}' for sign, number in rest)}?", Chain(start, rest, 10))


@dataclass(frozen=True)
class Trace(State):
    """The statements of a program that are still to be run, and the variables' values."""

    statements: tuple[tuple[str, str, str, str], ...]  # target, left, sign, right
    values: tuple[tuple[str, int], ...]
    asked: str

    def steps(self) -> Mapping[str, State | None]:
        known = dict(self.values)
        if not self.statements:
            return {f"{self.asked}{known[self.asked]}{END}": None}
        (target, left, sign, right), *rest = self.statements

        def value_of(name: str) -> int:
            return known[name] if name in known else int(name)

        known[target] = _OPERATIONS[sign](value_of(left), value_of(right)) % 10
        return {f"{target}{known[target]};": Trace(tuple(rest), tuple(sorted(known.items())), self.asked)}


def tracing(draw: random.Random, longer: bool) -> Problem:
    """`a3;b7;a=a+b;b=a*2;?b` sets two variables and changes them; the trace has each new value: `a0;b0;b0$`."""
    names = "abc"
    values = tuple((name, draw.randrange(10)) for name in names)
    statements = tuple(
        (
            draw.choice(names),
            draw.choice(names),
            draw.choice("+-*"),
            draw.choice([draw.choice(names), str(draw.randrange(10))]),
        )
        for _ in range(draw.randint(6, 7) if longer else draw.randint(2, 5))
    )
    asked = draw.choice(names)
    head = "".join(f"{name}{value};" for name, value in values)
    body = "".join(f"{target}={left}{sign}{right};" for target, left, sign, right in statements)
    return Problem(f"{head}{body}?{asked}", Trace(statements, values, asked))


@dataclass(frozen=True)
class Words(State):
    """Words still to be written in a format, in any order where `ordered` is false; none may come twice."""

    left: tuple[str, ...]
    ordered: bool
    form: str  # "u": in capitals; "r": backwards; "d": each letter doubled
    between: str
    first: bool = True

    def steps(self) -> Mapping[str, State | None]:
        if not self.left:
            return {END: None}
        found = {}
        for place, word in enumerate(self.left[:1] if self.ordered else self.left):
            rest = self.left[:place] + self.left[place + 1 :]
            text = ("" if self.first else self.between) + _formed(word, self.form)
            found[text] = Words(rest, self.ordered, self.form, self.between, False)
        return found


def _formed(word: str, form: str) -> str:
    return {"u": word.upper(), "r": word[::-1], "d": "".join(letter * 2 for letter in word)}[form]


def formats(draw: random.Random, longer: bool) -> Problem:
    """`u,!:bad,ace,fig?` asks for the words in capitals, in any order (`!`; `.`: in theirs), with commas between."""
    count = draw.randint(5, 6) if longer else draw.randint(2, 4)
    # Letters that tell words apart from the first on, in each of the forms: no step may begin another.
    firsts, lasts = (draw.sample("abcdefgh", count) for _ in range(2))
    words = tuple(first + draw.choice("aeiou") + last for first, last in zip(firsts, lasts, strict=True))
    form, between, ordered = draw.choice("urd"), draw.choice(",/"), draw.choice([True, False])
    prompt = f"{form}{between}{'.' if ordered else '!'}:{','.join(words)}?"
    return Problem(prompt, Words(words, ordered, form, between))
