"""Problems whose worked solutions are verified exactly, symbol by symbol.

A problem is a graph. A state has every correct next step as text, and the state after it. A correct solution is a path
to the end, and there may be many. So for any prefix it is known with which symbols a correct continuation begins. A
family of tasks is a function that draws a `Problem`. A family outside this repository is given by its module (run.py
--tasks).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

END = "$"


class State(Protocol):
    def steps(self) -> Mapping[str, State | None]:
        """Every correct next step and the state after it: None after the last step, whose text ends with END.

        No step is a prefix of another one.
        """

    def after_wrong(self, text: str) -> State | None:
        """The state after a complete step that is not correct, by what it says; None if the text is no complete step,
        or if nothing can be said.
        """
        return None


@dataclass(frozen=True)
class Problem:
    prompt: str
    start: State

    def solution(self, draw: random.Random) -> str:
        """A random correct solution. Each step is drawn uniformly from the correct ones."""
        text, state = "", self.start
        while state is not None:
            step, state = draw.choice(list(state.steps().items()))
            text += step
        return text

    def allowed(self, solution: str, local: bool = False) -> list[frozenset[str]]:
        """For each prefix of a solution, the empty one first: the symbols with which a correct continuation begins.

        One entry per symbol of the solution; empty after its first wrong symbol and after its end. local: empty only
        to the end of the wrong step, as far as its state can say what holds after it. The steps after it are then
        judged by what is written, as if it were right.
        """
        found: list[frozenset[str]] = []
        state: State | None = self.start
        steps, begun = state.steps(), ""
        for symbol in solution:
            going = frozenset(s[len(begun)] for s in steps if s.startswith(begun) and s != begun)
            found.append(going)
            begun += symbol
            if begun in steps:
                state, begun = steps[begun], ""
            elif symbol in going:
                continue
            elif local and state is not None and (after := state.after_wrong(begun)) is not None:
                state, begun = after, ""
            elif not local:
                state = None
            else:
                continue
            steps = state.steps() if state is not None else {}
        return found

    def is_correct(self, solution: str) -> bool:
        """Whether the solution is complete and correct."""
        allowed = self.allowed(solution)
        return (
            bool(solution)
            and solution.endswith(END)
            and all(s in a for s, a in zip(solution, allowed, strict=True))
        )


# A family of tasks: draws a problem. longer: one that is longer than those of the training.
Family = Callable[[random.Random, bool], Problem]


@dataclass(frozen=True)
class Line(State):
    """A problem with one solution: these steps, one after the other."""

    texts: tuple[str, ...]

    def steps(self) -> Mapping[str, State | None]:
        first, *rest = self.texts
        return {first: Line(tuple(rest)) if rest else None}
