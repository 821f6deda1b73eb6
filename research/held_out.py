"""Four families for one check of what docs/evidence.md claims, written by somebody who had seen no comparison.

`pins` and `matchings` leave a choice; `circles` and `machines` have one solution.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from problems import END, Problem, State

_LOWER, _UPPER = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Pins(State):
    """The intervals that no point has hit, each a name with its two ends, and how many points may follow."""

    left: tuple[str, ...]
    count: int

    def steps(self) -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        for point in "123456789":
            rest = _missed(self.left, point)
            if self.count and len(rest) < len(self.left) and _pierced(rest, self.count - 1):
                hit = "".join(name for name, *_ in self.left if all(name != other[0] for other in rest))
                found[f"{point}{hit};" if rest else f"{point}{hit}{END}"] = (
                    Pins(rest, self.count - 1) if rest else None
                )
        return found

    def after_wrong(self, text: str) -> State | None:
        """The intervals that it names count as hit, and one point less may follow."""
        whole = re.fullmatch("[0-9][a-z]*;", text)
        rest = tuple(each for each in self.left if each[0] not in text)
        return Pins(rest, max(0, self.count - 1)) if whole and rest else None


def _missed(intervals: tuple[str, ...], point: str) -> tuple[str, ...]:
    return tuple(each for each in intervals if not each[1] <= point <= each[2])


@cache
def _pierced(intervals: tuple[str, ...], count: int) -> bool:
    """Whether so many points can hit all of them. Some point is the end of the interval that ends first."""
    if not intervals or not count:
        return not intervals
    return _pierced(_missed(intervals, min(each[2] for each in intervals)), count - 1)


def pins(draw: random.Random, longer: bool) -> Problem:
    """`3:a14b36c58?`: at most 3 points, in any order, so that one is in each interval: 1 to 4, 3 to 6, 5 to 8.
    Each point has the intervals that it is the first to hit: `4ab;7c$`.
    """
    count = 5 if longer else draw.randint(3, 4)
    ends = (sorted(draw.sample("123456789", 2)) for _ in range(count))
    intervals = tuple(f"{name}{first}{last}" for name, (first, last) in zip(_LOWER, ends, strict=False))
    fewest = next(points for points in range(1, count + 1) if _pierced(intervals, points))
    return Problem(f"{fewest + 1}:{''.join(intervals)}?", Pins(intervals, fewest + 1))


@dataclass(frozen=True)
class Matching(State):
    """The letters without a digit so far, each with the digits that it may still have."""

    left: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        for letter, *digits in self.left:
            for digit in digits:
                if _matched(rest := _without(self.left, letter, digit)):
                    found[f"{letter}{digit}" if rest else f"{letter}{digit}{END}"] = (
                        Matching(rest) if rest else None
                    )
        return found

    def after_wrong(self, text: str) -> State | None:
        """The letter has a digit, and no other letter may have this digit."""
        whole = len(text) == 2 and text[0].isalpha() and text[1].isdecimal()
        return Matching(rest) if whole and (rest := _without(self.left, *text)) else None


def _without(left: tuple[str, ...], letter: str, digit: str) -> tuple[str, ...]:
    return tuple(each.replace(digit, "") for each in left if each[0] != letter)


@cache
def _matched(left: tuple[str, ...]) -> bool:
    """Whether each letter can have one of its digits, all different."""
    return not left or any(_matched(_without(left, left[0][0], digit)) for digit in left[0][1:])


def matchings(draw: random.Random, longer: bool) -> Problem:
    """`b13,d12,g23?`: each letter gets one of its digits, all different, in any order: `d2b1g3$`."""
    count = 5 if longer else draw.randint(3, 4)
    digits = "123456789"[: count + 1]
    while True:
        letters = sorted(draw.sample(_LOWER[:9], count))
        theirs = [sorted(draw.sample(digits, draw.choice((1, 2, 2, 3)))) for _ in letters]
        start = Matching(tuple(letter + "".join(its) for letter, its in zip(letters, theirs, strict=True)))
        if len(start.steps()) > 1:
            return Problem(f"{','.join(start.left)}?", start)


@dataclass(frozen=True)
class Circle(State):
    """Letters in a circle, from the one at which the counting begins, and the number to count up to."""

    letters: str
    number: int

    def steps(self) -> Mapping[str, State | None]:
        place = (self.number - 1) % len(self.letters)
        rest = self.letters[place + 1 :] + self.letters[:place]
        return {f"{rest};": Circle(rest, self.number)} if rest[1:] else {f"{rest}{END}": None}

    def after_wrong(self, text: str) -> State | None:
        whole = len(text) == len(self.letters) > 2 and text[:-1].isalpha() and text[-1] == ";"
        return Circle(text[:-1], self.number) if whole else None


def circles(draw: random.Random, longer: bool) -> Problem:
    """`3:adfk?`: each third letter of a circle leaves it. Each step writes who remains, from the next one on:
    `kad;ka;a$`.
    """
    letters = draw.sample(_LOWER[:12], 6 if longer else draw.randint(4, 5))
    number = draw.randint(2, 3)
    return Problem(f"{number}:{''.join(letters)}?", Circle("".join(letters), number))


@dataclass(frozen=True)
class Machine(State):
    """A machine in a state. word: the remaining inputs, a name with 0 or 1. rows: state, input, next one."""

    state: str
    word: tuple[str, ...]
    rows: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        (name, bit), *rest = self.word
        after = next(row[2] for row in self.rows if row[:2] == self.state + bit)
        text = f"{name}{self.state}{bit}{after}"
        return {f"{text};": Machine(after, tuple(rest), self.rows)} if rest else {f"{text}{END}": None}

    def after_wrong(self, text: str) -> State | None:
        """It is in the state that the step ends with, if there is such a state."""
        whole = len(text) == 5 and text[4] == ";" and any(row[0] == text[3] for row in self.rows)
        return Machine(text[3], self.word[1:], self.rows) if whole and self.word[1:] else None


def machines(draw: random.Random, longer: bool) -> Problem:
    """`A0B,A1C,B0A,B1A,C0C,C1B:Bf0g1?`: in state A, 0 leads to B and 1 to C, and so on. It starts
    in B and reads 0 and 1. Each step has the state, the input and the next state: `fB0A;gA1C$`.
    """
    count = 5 if longer else draw.randint(2, 4)
    states = sorted(draw.sample(_UPPER[:8], 3))
    rows = tuple(state + bit + draw.choice(states) for state in states for bit in "01")
    first = draw.randrange(len(_LOWER) - count + 1)
    word = tuple(name + draw.choice("01") for name in _LOWER[first : first + count])
    start = draw.choice(states)
    return Problem(f"{','.join(rows)}:{start}{''.join(word)}?", Machine(start, word, rows))
