"""Families with several correct next steps at most places, and the same problems with exactly one.

In each of the first six, any order or any choice is right as long as the end can still be reached. The families
`..._in_order` ask for the first correct step of a fixed order, so the problems are the same and the choice is gone.
`underspecification` measures how much choice a family leaves.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from problems import END, Family, Problem, State

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Walk(State):
    """At a node of a graph without cycles. edges: each node, and the nodes after it."""

    node: str
    goal: str
    edges: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        return {
            f"{node}{END}" if node == self.goal else node: None
            if node == self.goal
            else Walk(node, self.goal, self.edges)
            for node in _after(self.node, self.edges)
            if _reaches(node, self.goal, self.edges)
        }

    def after_wrong(self, text: str) -> State | None:
        return Walk(text, self.goal, self.edges) if len(text) == 1 else None


def _after(node: str, edges: tuple[str, ...]) -> str:
    return next((those[1:] for those in edges if those[0] == node), "")


@cache
def _reaches(node: str, goal: str, edges: tuple[str, ...]) -> bool:
    return node == goal or any(_reaches(each, goal, edges) for each in _after(node, edges))


def walks(draw: random.Random, longer: bool) -> Problem:
    """`af,bcd,cad,dae,ef?bf` lists the nodes after each node, and asks for any walk from b to f: `cdef$`."""
    count = 9 if longer else draw.randint(6, 7)
    while True:
        nodes = draw.sample(_LETTERS[:9], count)
        edges = []
        for place, node in enumerate(nodes[:-1]):
            near = nodes[place + 1 : place + 4]
            edges.append(node + "".join(sorted(draw.sample(near, min(len(near), draw.choice((1, 2, 2, 3)))))))
        start = Walk(nodes[0], nodes[-1], tuple(sorted(edges)))
        if len(start.steps()) > 1:
            return Problem(f"{','.join(start.edges)}?{nodes[0]}{nodes[-1]}", start)


@dataclass(frozen=True)
class Payment(State):
    """An amount that remains, and the coins, each of which may be used any number of times."""

    left: int
    coins: tuple[int, ...]

    def steps(self) -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        for coin in self.coins:
            if _payable(rest := self.left - coin, self.coins):
                text = f"{coin}{rest:02}"
                found[text if rest else text + END] = Payment(rest, self.coins) if rest else None
        return found

    def after_wrong(self, text: str) -> State | None:
        whole = len(text) == 3 and text.isdecimal() and int(text[1:])
        return Payment(int(text[1:]), self.coins) if whole else None


@cache
def _payable(amount: int, coins: tuple[int, ...]) -> bool:
    return amount == 0 or any(_payable(amount - coin, coins) for coin in coins if coin <= amount)


def coins(draw: random.Random, longer: bool) -> Problem:
    """`14:952?`: pay 14 with coins of these values in any order. Each coin has what remains after it:
    `509207502200$`.
    """
    while True:
        values = tuple(sorted(draw.sample(range(2, 10), draw.randint(3, 4)), reverse=True))
        start = Payment(draw.randint(24, 28) if longer else draw.randint(8, 22), values)
        if _payable(start.left, values) and len(start.steps()) > 1:
            return Problem(f"{start.left:02}:{''.join(map(str, values))}?", start)


@dataclass(frozen=True)
class Tasks(State):
    """The remaining tasks, and the pairs of which the first must come before the second."""

    left: str
    pairs: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        if len(self.left) == 1:
            return {f"{self.left}{END}": None}
        return {
            task: Tasks(self.left.replace(task, ""), self.pairs)
            for task in self.left
            if not any(before in self.left for before, after in self.pairs if after == task)
        }

    def after_wrong(self, text: str) -> State | None:
        """A task that comes too early is done; one that is done or unknown changes nothing."""
        return Tasks(self.left.replace(text, ""), self.pairs) if len(text) == 1 else None


def orderings(draw: random.Random, longer: bool) -> Problem:
    """`adfhk:fa,kd,ka?`: these tasks in any order with f before a, k before d and k before a: `hkfda$`."""
    count = 8 if longer else draw.randint(5, 6)
    tasks = draw.sample(_LETTERS[:12], count)
    pairs = {
        "".join(tasks[place] for place in sorted(draw.sample(range(count), 2))) for _ in range(count - 1)
    }
    listed = tuple(draw.sample(sorted(pairs), len(pairs)))
    ordered = "".join(sorted(tasks))
    return Problem(f"{ordered}:{','.join(listed)}?", Tasks(ordered, listed))


@dataclass(frozen=True)
class Sum(State):
    """A sum of digits modulo 10."""

    digits: str

    def steps(self) -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        for place in range(len(self.digits) - 1):
            added = sum(map(int, self.digits[place : place + 2])) % 10
            left = f"{self.digits[:place]}{added}{self.digits[place + 2 :]}"
            found.setdefault(left + (";" if left[1:] else END), Sum(left) if left[1:] else None)
        return found

    def after_wrong(self, text: str) -> State | None:
        whole = len(text) == len(self.digits) > 2 and text[-1] == ";" and text[:-1].isdecimal()
        return Sum(text[:-1]) if whole else None


def reductions(draw: random.Random, longer: bool) -> Problem:
    """`3527?` is a sum modulo 10. Each step adds any two neighbours: `377;07;7$`."""
    count = 6 if longer else draw.randint(4, 5)
    digits = "".join(draw.choice("0123456789") for _ in range(count))
    return Problem(f"{digits}?", Sum(digits))


@dataclass(frozen=True)
class Edits(State):
    """The remaining edits of a text, each a place, from 1 on, and the new letter there."""

    left: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        if len(self.left) == 1:
            return {f"{self.left[0]}{END}": None}
        return {edit: Edits(tuple(other for other in self.left if other != edit)) for edit in self.left}

    def after_wrong(self, text: str) -> State | None:
        """Nothing that remains is done."""
        return self if len(text) == 2 and text[0].isdecimal() and text[1].isalpha() else None


def edits(draw: random.Random, longer: bool) -> Problem:
    """`1aa2db3cc4ef?` has two letters for each place of a text, what is there and what should be. It asks for the
    changes in any order: `4f2b$`.
    """
    length = 6 if longer else draw.randint(3, 4)
    pairs = [letter * 2 for letter in draw.choices(_LETTERS[:6], k=length)]
    for place in draw.sample(range(length), 4 if longer else draw.randint(2, 3)):
        pairs[place] = "".join(draw.sample(_LETTERS[:6], 2))
    left = tuple(f"{place}{new}" for place, (old, new) in enumerate(pairs, 1) if old != new)
    return Problem(f"{''.join(f'{place}{pair}' for place, pair in enumerate(pairs, 1))}?", Edits(left))


@dataclass(frozen=True)
class Summands(State):
    """A number that remains for so many digits, and the digits that are not allowed."""

    left: int
    count: int
    without: str

    def steps(self) -> Mapping[str, State | None]:
        found: dict[str, State | None] = {}
        for digit in "0123456789":
            rest, count = self.left - int(digit), self.count - 1
            if digit not in self.without and _summable(rest, count, self.without):
                found[f"{digit}{rest:02}" if count else digit + END] = (
                    Summands(rest, count, self.without) if count else None
                )
        return found

    def after_wrong(self, text: str) -> State | None:
        whole = self.count > 1 and len(text) == 3 and text.isdecimal()
        return Summands(int(text[1:]), self.count - 1, self.without) if whole else None


@cache
def _summable(number: int, count: int, without: str) -> bool:
    if not count:
        return number == 0
    return any(
        _summable(number - int(digit), count - 1, without)
        for digit in "0123456789"
        if digit not in without and int(digit) <= number
    )


def summands(draw: random.Random, longer: bool) -> Problem:
    """`17:4-38?`: any four digits with the sum 17, none of them 3 or 8. Each but the last has what remains after it:
    `5122106044$` is 5, 2, 6 and 4.
    """
    while True:
        count = 5 if longer else draw.randint(3, 4)
        without = "".join(sorted(draw.sample("0123456789", 2)))
        start = Summands(draw.randint(3, 9 * count - 3), count, without)
        if len(start.steps()) > 1:
            return Problem(f"{start.left:02}:{count}-{without}?", start)


@dataclass(frozen=True)
class First(State):
    """Only the first correct step of each state."""

    state: State

    def steps(self) -> Mapping[str, State | None]:
        for text, left in self.state.steps().items():
            return {text: None if left is None else First(left)}
        return {}

    def after_wrong(self, text: str) -> State | None:
        """A step that is correct in another order leads where it would."""
        left = self.state.steps().get(text) or self.state.after_wrong(text)
        return None if left is None else First(left)


def _in_order(family: Family) -> Family:
    def made(draw: random.Random, longer: bool) -> Problem:
        problem = family(draw, longer)
        return Problem(problem.prompt, First(problem.start))

    made.__name__ = f"{family.__name__}_in_order"
    made.__doc__ = f"As `{family.__name__}`, but only the first correct step counts: one solution."
    return made


# The next node by the alphabet; the largest coin; the first task by the alphabet; neighbours from the left; places from
# the left; the smallest digit.
walks_in_order = _in_order(walks)
coins_in_order = _in_order(coins)
orderings_in_order = _in_order(orderings)
reductions_in_order = _in_order(reductions)
edits_in_order = _in_order(edits)
summands_in_order = _in_order(summands)


def underspecification(family: Family, problems: int = 200) -> dict[str, float]:
    """Means over the places of random solutions of problems, from a fixed seed.

    symbols: the number of correct next symbols. several: the share of places with more than one. entropy: of the next
    symbol of a random solution, whose steps are drawn uniformly from the correct ones, in nats. uniform: as if all
    correct next symbols were as probable. steps: the number of correct next steps, over the steps.
    """
    rng = random.Random(6)
    found: dict[str, list[float]] = {
        name: [] for name in ("symbols", "several", "entropy", "uniform", "steps")
    }
    for _ in range(problems):
        state: State | None = family(rng, False).start
        while state is not None:
            steps = state.steps()
            text = rng.choice(list(steps))
            found["steps"].append(len(steps))
            for place in range(len(text)):
                following = Counter(other[place] for other in steps if other.startswith(text[:place]))
                shares = [count / following.total() for count in following.values()]
                found["symbols"].append(len(shares))
                found["several"].append(len(shares) > 1)
                found["entropy"].append(-sum(share * math.log(share) for share in shares))
                found["uniform"].append(math.log(len(shares)))
            state = steps[text]
    return {name: sum(values) / len(values) for name, values in found.items()}
