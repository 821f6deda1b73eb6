"""Problems whose worked solutions are verified exactly, symbol by symbol.

A problem is a graph: a state knows every correct next step as text, and the state that each leads to. A correct
solution is a path to the end; there may be many. So of any prefix it is known with which symbols a correct continuation
begins. A family of tasks is a function that draws a `Problem`; one that is not in this repository is named by its
module (run.py --tasks).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

END = "$"


class State(Protocol):
    def steps(self) -> Mapping[str, State | None]:
        """Every correct next step and what it leads to, None after the last, whose text ends with END.

        No step begins another.
        """


@dataclass(frozen=True)
class Problem:
    prompt: str
    start: State

    def solution(self, draw: random.Random) -> str:
        """A correct one, each of its steps drawn evenly from those that are correct."""
        text, state = "", self.start
        while state is not None:
            step, state = draw.choice(list(state.steps().items()))
            text += step
        return text

    def allowed(self, solution: str) -> list[frozenset[str]]:
        """Of each prefix of a solution, the empty one first, with which symbols a correct continuation begins.

        As many as the solution has symbols; none from its first wrong symbol on, nor after its end.
        """
        found: list[frozenset[str]] = []
        state: State | None = self.start
        steps, begun = state.steps(), ""
        for symbol in solution:
            going = (
                frozenset(s[len(begun)] for s in steps if s.startswith(begun))
                if state is not None
                else frozenset()
            )
            found.append(going)
            if symbol not in going:
                state = None
                continue
            begun += symbol
            if begun in steps:
                state, begun = steps[begun], ""
                steps = state.steps() if state is not None else {}
        return found

    def is_correct(self, solution: str) -> bool:
        """Whether it is whole, and correct to its end."""
        allowed = self.allowed(solution)
        return (
            bool(solution)
            and solution.endswith(END)
            and all(s in a for s, a in zip(solution, allowed, strict=True))
        )


# A family of tasks: draws a problem, a longer one than those that models are trained on where `longer` is true.
Family = Callable[[random.Random, bool], Problem]


@dataclass(frozen=True)
class Line(State):
    """A solution with no choice: these steps, one after the other."""

    texts: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        first, *rest = self.texts
        return {first: Line(tuple(rest)) if rest else None}
