"""Families of reasoning-gym: its problems with our worked solutions, which end in its answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from problems import END, Problem, State
from tasks import chain


@cache
def _data_set(name: str, seed: int, **settings: Any):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1 << 30, seed=seed, **settings)


def _drawn(name: str, draw: random.Random, **settings: Any) -> dict[str, Any]:
    return _data_set(name, 0, **settings)[draw.randrange(1 << 30)]


def chain_sum(draw: random.Random, longer: bool) -> Problem:
    """`4f+8g-5?`: numbers of one digit, summed from the left: `f4+8=12;g12-5=7;=7$`."""
    terms = (5, 5) if longer else (2, 4)
    entry = _drawn("chain_sum", draw, min_terms=terms[0], max_terms=terms[1], min_digits=1, max_digits=1)
    first, *rest = entry["metadata"]["expression"].split()
    return chain(draw, int(first), list(zip(rest[::2], map(int, rest[1::2]), strict=True)))


@dataclass(frozen=True)
class Sorting(State):
    """The remaining numbers, in their order."""

    left: tuple[int, ...]

    def steps(self) -> Mapping[str, State | None]:
        if not self.left:
            return {f"={END}": None}
        return {f"{self.left[0]:02};": Sorting(self.left[1:])}


def number_sorting(draw: random.Random, longer: bool) -> Problem:
    """`-56,07,75?` asks for the numbers from the largest on (`+`: from the smallest): `75;56;07;=$`."""
    count = (5, 5) if longer else (2, 4)
    whole = {"min_value": 0, "max_value": 99, "min_decimals": 0, "max_decimals": 0}
    entry = _drawn("number_sorting", draw, min_numbers=count[0], max_numbers=count[1], **whole)
    data = entry["metadata"]
    numbers, ordered = (
        [int(float(each)) for each in data[key]] for key in ("original_numbers", "sorted_numbers")
    )
    sign = "-" if data["direction"] == "descending" else "+"
    return Problem(f"{sign}{','.join(f'{number:02}' for number in numbers)}?", Sorting(tuple(ordered)))


@dataclass(frozen=True)
class Palindrome(State):
    """The chosen letters of the first half of a palindrome, and the remaining letters, in pairs except the middle."""

    left: tuple[str, ...]
    chosen: str = ""

    def steps(self) -> Mapping[str, State | None]:
        pairs = sorted({letter for letter in self.left if self.left.count(letter) > 1})
        if not pairs:
            return {f"={self.chosen}{''.join(self.left)}{self.chosen[::-1]}{END}": None}
        found = {}
        for letter in pairs:
            rest = list(self.left)
            rest.remove(letter)
            rest.remove(letter)
            found[f"{letter};"] = Palindrome(tuple(rest), self.chosen + letter)
        return found


def palindrome_generation(draw: random.Random, longer: bool) -> Problem:
    """`nbabn?`: a palindrome of these letters, its first half in any order: `b;n;=bnanb$`."""
    length = (8, 9) if longer else (4, 7)
    entry = _drawn("palindrome_generation", draw, min_length=length[0], max_length=length[1])
    letters = entry["metadata"]["letters"]
    return Problem(f"{''.join(letters)}?", Palindrome(tuple(letters)))
