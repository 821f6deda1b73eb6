"""The held-out families, compared with solutions found from the text of the prompt alone."""

from __future__ import annotations

import itertools
import random
import re

import pytest

import data
import held_out
from problems import END, State


def all_of(state: State | None) -> set[str]:
    if state is None:
        return {""}
    return {step + rest for step, left in state.steps().items() for rest in all_of(left)}


def pins(prompt: str) -> set[str]:
    """By a trial of all sequences of points."""
    intervals, found = re.findall("([a-z])(.)(.)", prompt), set()
    for count in range(1, int(prompt[0]) + 1):
        for points in itertools.permutations("123456789", count):
            left, steps = intervals, []
            for point in points:
                hit = [each for each in left if each[1] <= point <= each[2]]
                left = [each for each in left if each not in hit]
                steps.append(point + "".join(name for name, *_ in hit))
            if not left and all(len(step) > 1 for step in steps):
                found.add(";".join(steps) + END)
    return found


def matchings(prompt: str) -> set[str]:
    """By a trial of all choices in all orders."""
    words, found = prompt[:-1].split(","), set()
    for chosen in itertools.product(*([word[0] + digit for digit in word[1:]] for word in words)):
        if len({digit for _, digit in chosen}) == len(chosen):
            found |= {"".join(order) + END for order in itertools.permutations(chosen)}
    return found


def circles(prompt: str) -> set[str]:
    """By counting with a queue."""
    number, queue, steps = int(prompt[0]), list(prompt[2:-1]), []
    while len(queue) > 1:
        for _ in range(number - 1):
            queue.append(queue.pop(0))
        queue.pop(0)
        steps.append("".join(queue))
    return {";".join(steps) + END}


def machines(prompt: str) -> set[str]:
    """By a table."""
    table, word = prompt[:-1].split(":")
    leads = {row[:2]: row[2] for row in table.split(",")}
    state, steps = word[0], []
    for name, bit in re.findall("([a-z])([01])", word):
        steps.append(f"{name}{state}{bit}{leads[state + bit]}")
        state = leads[state + bit]
    return {";".join(steps) + END}


@pytest.mark.parametrize("solve", [pins, matchings, circles, machines])
def test_the_solutions_are_those_that_the_prompt_asks_for(solve):
    family = getattr(held_out, solve.__name__)
    prompt, solution = re.findall("`(.+?)`", " ".join(family.__doc__.split()))
    assert solution in solve(prompt)
    for problem in data.draw(family, random.Random(3), 40, longer=False):
        assert all_of(problem.start) == solve(problem.prompt), problem
