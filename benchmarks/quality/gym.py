"""Families of reasoning-gym: its problems, with worked solutions of our own, which end in its answers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from problems import END, Problem, State
from tasks import Chain


@cache
def _data_set(name: str, seed: int, **settings: Any):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1 << 30, seed=seed, **settings)


def _drawn(name: str, draw: random.Random, **settings: Any) -> dict[str, Any]:
    return _data_set(name, 0, **settings)[draw.randrange(1 << 30)]


def chain_sum(draw: random.Random, longer: bool) -> Problem:
    """`4+8-5?`: numbers of one digit, summed from the left."""
    terms = (6, 7) if longer else (2, 5)
    entry = _drawn("chain_sum", draw, min_terms=terms[0], max_terms=terms[1], min_digits=1, max_digits=1)
    first, *rest = entry["metadata"]["expression"].split()
    pairs = tuple((sign, int(number)) for sign, number in zip(rest[::2], rest[1::2], strict=True))
    return Problem(
        f"{first}{''.join(f'{sign}{number}' for sign, number in pairs)}?", Chain(int(first), pairs)
    )


@dataclass(frozen=True)
class Euclid(State):
    larger: int
    smaller: int

    def steps(self) -> Mapping[str, State | None]:
        if not self.smaller:
            return {f"={self.larger}{END}": None}
        rest = self.larger % self.smaller
        return {f"{self.larger}%{self.smaller}={rest};": Euclid(self.smaller, rest)}


def gcd(draw: random.Random, longer: bool) -> Problem:
    """`48,36?`: Euclid's algorithm, each remainder a step."""
    values = (61, 120) if longer else (2, 60)
    entry = _drawn("gcd", draw, min_value=values[0], max_value=values[1])
    a, b = entry["metadata"]["numbers"]
    return Problem(f"{a},{b}?", Euclid(max(a, b), min(a, b)))


@dataclass(frozen=True)
class Factors(State):
    """What is left of a number, and the primes that were taken out; any prime factor may be the next."""

    left: int
    taken: tuple[int, ...] = ()

    def steps(self) -> Mapping[str, State | None]:
        primes = sorted(
            {prime for prime in range(2, self.left + 1) if self.left % prime == 0 and _is_prime(prime)}
        )
        if not primes:
            return {f"={'*'.join(map(str, sorted(self.taken)))}{END}": None}
        return {
            f"{self.left}/{prime}={self.left // prime};": Factors(self.left // prime, (*self.taken, prime))
            for prime in primes
        }


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % each for each in range(2, int(number**0.5) + 1))


def prime_factorization(draw: random.Random, longer: bool) -> Problem:
    """`60?`: prime factors in any order, then all of them sorted: `60/2=30;30/5=6;6/3=2;2/2=1;=2*2*3*5$`."""
    values = (100, 160) if longer else (2, 99)
    entry = _drawn("prime_factorization", draw, min_value=values[0], max_value=values[1])
    return Problem(f"{entry['metadata']['number']}?", Factors(entry["metadata"]["number"]))
