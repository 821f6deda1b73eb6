"""The tasks and their verifier, compared with all correct solutions."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator

import pytest
import torch

import data
import gym
import held_out
import runs
import tasks
import underspecified
from problems import END, Line, Problem, State

CHOICES = ("walks", "coins", "orderings", "reductions", "edits", "summands")
FAMILIES = {
    family.__name__: family
    for family in (
        tasks.arithmetic,
        tasks.tracing,
        tasks.formats,
        gym.chain_sum,
        gym.number_sorting,
        gym.palindrome_generation,
        *(getattr(underspecified, f"{name}{kind}") for name in CHOICES for kind in ("", "_in_order")),
        *(held_out.pins, held_out.matchings, held_out.circles, held_out.machines),
    )
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


def solutions(state: State | None) -> Iterator[str]:
    if state is None:
        yield ""
        return
    for step, left in state.steps().items():
        for rest in solutions(left):
            yield step + rest


def problems(family, count: int, longer: bool = False) -> list[Problem]:
    return data.draw(family, random.Random(11), count, longer=longer)


@pytest.mark.parametrize("longer", [False, True])
def test_drawn_solutions_are_correct_and_use_known_symbols(family, longer):
    rng = random.Random(5)
    for problem in problems(family, 100, longer):
        solution = problem.solution(rng)
        assert problem.is_correct(solution) and solution.count(END) == 1
        assert data.decode(data.encode(problem.prompt + solution)) == problem.prompt + solution
        assert len(solution) <= 110


def test_longer_problems_are_longer(family):
    def mean(longer: bool) -> float:
        rng = random.Random(5)
        return sum(len(p.prompt + p.solution(rng)) for p in problems(family, 200, longer)) / 200

    assert mean(True) > 1.15 * mean(False)


def test_the_verifier_knows_every_correct_continuation_and_no_other(family):
    rng = random.Random(5)
    for problem in problems(family, 25):
        every = set(solutions(problem.start))
        solution = list(problem.solution(rng))
        place = rng.randrange(len(solution))
        solution[place] = rng.choice("0123456789;=+-*:?$abcXYZ")
        text = "".join(solution)
        expected = [
            {whole[length] for whole in every if whole.startswith(text[:length]) and len(whole) > length}
            for length in range(len(text))
        ]
        # No symbol is correct after the end, or after an error.
        assert [set(allowed) for allowed in problem.allowed(text)] == expected
        assert problem.is_correct(text) == (text in every)
        assert not problem.is_correct(text[:-1]) and not problem.is_correct("")


def test_no_step_is_a_prefix_of_another(family):
    def check(state: State | None) -> None:
        while state is not None:
            steps = list(state.steps())
            assert not any(a != b and b.startswith(a) for a in steps for b in steps)
            state = state.steps()[steps[-1]]

    for problem in problems(family, 50):
        check(problem.start)


def test_held_out_problems_are_never_trained_on(family):
    drawn = {held: data.draw(family, random.Random(4), 200, held) for held in (True, False)}
    texts = {held: {problem.prompt for problem in drawn[held]} for held in drawn}
    assert not texts[True] & texts[False] and len(texts[True]) > 100
    assert all(map(data.is_held_out, drawn[True])) and not any(map(data.is_held_out, drawn[False]))


def test_a_family_with_too_few_problems_is_an_error():
    def always(draw, longer):
        return Problem("1?", Line(("1$",)))

    held = data.is_held_out(always(None, False))
    assert len(data.draw(always, random.Random(1), 3, held)) == 3
    with pytest.raises(ValueError, match="always draws too few different problems"):
        data.draw(always, random.Random(1), 3, not held)


def test_solutions_end_in_the_answer_of_reasoning_gym():
    """Its own verifiers accept them."""
    import reasoning_gym

    rng = random.Random(3)
    for problem in problems(gym.chain_sum, 40):
        expression = re.sub("[a-z]", "", problem.prompt.removesuffix("?"))
        answer = problem.solution(rng).rpartition("=")[2].removesuffix(END)
        score = reasoning_gym.get_score_answer_fn("chain_sum")
        assert score(answer, {"answer": str(eval(expression)), "metadata": {}}) == 1.0
    for problem in problems(gym.palindrome_generation, 40):
        answer = problem.solution(rng).rpartition("=")[2].removesuffix(END)
        known = {"letters": list(problem.prompt.removesuffix("?")), "generated_palindrome": ""}
        score = reasoning_gym.get_score_answer_fn("palindrome_generation")
        assert score(answer, {"answer": "", "metadata": known}) == 1.0
        assert score(answer + "q", {"answer": "", "metadata": known}) < 1.0
    for problem in problems(gym.number_sorting, 40):
        sign, numbers = problem.prompt[0], [int(each) for each in problem.prompt[1:-1].split(",")]
        found = [int(each) for each in problem.solution(rng).split(";")[:-1]]
        assert found == sorted(numbers, reverse=sign == "-")


def test_verdicts_are_at_the_position_before_the_judged_symbol(family):
    rng = random.Random(5)
    drawn = problems(family, 6)
    texts = [problem.solution(rng) for problem in drawn]
    batch = data.batch_of(drawn, texts, (2, 3))
    assert batch.tokens.shape == batch.labels.shape and batch.tokens.shape[:2] == (2, 3)
    right = data.verdicts(batch, batch.labels.clamp(min=0))
    assert torch.equal(
        right, batch.counts
    )  # every symbol of a correct solution is correct, and nothing else is judged
    wrong = data.verdicts(batch, torch.full_like(batch.tokens, data.encode("?")[0]))
    assert not wrong.any()


def test_steps_end_at_a_semicolon_and_have_different_numbers():
    drawn = [Problem("1a+2?", tasks.Chain(1, (("a", "+", 2),)))] * 2
    batch = data.batch_of(drawn, ["a1+2=3;=3$", "a2+1=3;=3$"])
    steps = data.steps_of(batch)
    first, second = (row[row >= 0].tolist() for row in steps)
    assert [step - first[0] for step in first] == [0] * 7 + [1] * 3
    assert len(set(first) & set(second)) == 0
    assert (steps >= 0).equal(batch.counts)


def test_every_family_has_a_name_for_the_command_line():
    assert {runs.family_of(name) for names in runs.OURS.values() for name in names} == set(FAMILIES.values())


@pytest.mark.parametrize(
    ("family", "prompt", "solution"),
    [
        (underspecified.walks, "af,bcd,cad,dae,ef?bf", "cdef$"),
        (underspecified.coins, "14:952?", "509207502200$"),
        (underspecified.orderings, "adfhk:fa,kd,ka?", "hkfda$"),
        (underspecified.reductions, "3527?", "377;07;7$"),
        (underspecified.edits, "1aa2db3cc4ef?", "4f2b$"),
        (underspecified.summands, "17:4-38?", "5122106044$"),
    ],
)
def test_the_examples_of_the_families_are_right(family, prompt, solution):
    text = " ".join(family.__doc__.split())
    assert f"`{prompt}`" in text and f"`{solution}`" in text
    start = {
        "walks": lambda: underspecified.Walk("b", "f", ("af", "bcd", "cad", "dae", "ef")),
        "coins": lambda: underspecified.Payment(14, (9, 5, 2)),
        "orderings": lambda: underspecified.Tasks("adfhk", ("fa", "kd", "ka")),
        "reductions": lambda: underspecified.Sum("3527"),
        "edits": lambda: underspecified.Edits(("2b", "4f")),
        "summands": lambda: underspecified.Summands(17, 4, "38"),
    }[family.__name__]()
    assert Problem(prompt, start).is_correct(solution)


def test_solutions_reach_what_the_prompt_asks_for():
    """Without the states: what the text of the prompt and of the solution say."""
    rng = random.Random(7)
    for problem in problems(underspecified.walks, 60):
        (edges, ends), walk = problem.prompt.split("?"), problem.solution(rng)[:-1]
        assert walk[-1] == ends[1]
        after = {each[0]: each[1:] for each in edges.split(",")}
        assert all(b in after[a] for a, b in zip(ends[0] + walk[:-1], walk, strict=True))
    for problem in problems(underspecified.coins, 60):
        amount, values = problem.prompt[:-1].split(":")
        left = int(amount)
        for coin, tens, ones in zip(*[iter(problem.solution(rng)[:-1])] * 3, strict=True):
            left -= int(coin)
            assert coin in values and left == int(tens + ones)
        assert left == 0
    for problem in problems(underspecified.orderings, 60):
        (listed, pairs), order = problem.prompt[:-1].split(":"), problem.solution(rng)[:-1]
        assert sorted(order) == list(listed)
        assert all(order.index(a) < order.index(b) for a, b in pairs.split(","))
    for problem in problems(underspecified.reductions, 60):
        total = sum(map(int, problem.prompt[:-1])) % 10
        parts = problem.solution(rng)[:-1].split(";")
        assert [sum(map(int, part)) % 10 for part in parts] == [total] * len(parts)
        assert [len(part) for part in parts] == list(range(len(problem.prompt) - 2, 0, -1))
    for problem in problems(underspecified.edits, 60):
        text = problem.prompt
        for place, letter in zip(*[iter(problem.solution(rng)[:-1])] * 2, strict=True):
            at = text.index(place) + 1
            assert text[at] != letter == text[at + 1]
            text = text[:at] + letter + text[at + 1 :]
        assert all(a == b for a, b in zip(text[1::3], text[2::3], strict=True))
    for problem in problems(underspecified.summands, 60):
        (number, rest), text = problem.prompt[:-1].split(":"), problem.solution(rng)[:-1]
        digits = text[::3]
        assert len(digits) == int(rest[0]) and sum(map(int, digits)) == int(number)
        assert not set(digits) & set(rest[2:])


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
def test_the_held_out_families_have_the_solutions_that_the_prompt_asks_for(solve):
    family = getattr(held_out, solve.__name__)
    prompt, solution = re.findall("`(.+?)`", " ".join(family.__doc__.split()))
    assert solution in solve(prompt)
    for problem in problems(family, 40):
        assert set(solutions(problem.start)) == solve(problem.prompt), problem


def test_the_choice_that_a_family_leaves_by_hand():
    """ "ab" or "ba": two correct first symbols, then one, then the end."""
    either = lambda draw, longer: Problem("?", underspecified.Tasks("ab", ()))  # noqa: E731
    found = underspecified.underspecification(either)
    assert found["symbols"] == pytest.approx(4 / 3) and found["several"] == pytest.approx(1 / 3)
    assert found["uniform"] == found["entropy"] == pytest.approx(math.log(2) / 3)
    assert found["steps"] == pytest.approx(3 / 2)
    # Three of four steps begin with the same symbol.
    some = lambda draw, longer: Problem("?", underspecified.Edits(("1a", "1b", "1c", "2d")))  # noqa: E731
    entropy = underspecified.underspecification(some, 2000)
    assert entropy["uniform"] > entropy["entropy"] > 0


def test_in_order_there_is_one_solution_and_the_problems_are_the_same():
    for name in CHOICES:
        free, ordered = (FAMILIES[each] for each in (name, f"{name}_in_order"))
        for one, other in zip(problems(free, 30), problems(ordered, 30), strict=True):
            (only,) = set(solutions(other.start))
            assert one.prompt == other.prompt and one.is_correct(only)
        assert underspecified.underspecification(ordered)["symbols"] == 1.0
        assert underspecified.underspecification(free)["steps"] > 1.5


@pytest.mark.parametrize(
    ("start", "solution", "usual", "local"),
    [
        # A walk goes to a node without an edge, and continues from it.
        (underspecified.Walk("b", "f", ("af", "bcd", "cad", "dae", "ef")), "aef$", "x---", "xx.."),
        (underspecified.Walk("b", "f", ("af", "bcd", "cad", "dae", "ef")), "ef$", "x--", "x.."),
        # 14 - 5 is not 8. The next coin is right for 8, and so is the last one.
        (underspecified.Payment(14, (9, 5, 2)), "508206204202200$", "..x-------------", "..x............."),
        # d before k, which is wrong. Without it the others are right.
        (underspecified.Tasks("adfhk", ("fa", "kd", "ka")), "dhkfa$", "x-----", "x....."),
        # 2 + 7 is not 8. The sum that is written is reduced correctly.
        (underspecified.Sum("3527"), "358;88;6$", "..x------", "..xx....."),
        (underspecified.Edits(("2b", "4g", "6a")), "4h2b4g6a$", ".x-------", ".x......."),
        # 17 - 5 is not 13. Its last digits add up to that.
        (underspecified.Summands(17, 3, "38"), "5137066$", "..x-----", "..x....."),
        # Of two orders only one counts, so h is wrong here, and after it d is the first.
        (underspecified.First(underspecified.Tasks("dhk", ())), "hdk$", "x---", "x..."),
    ],
)
def test_a_step_after_a_wrong_one_is_judged_by_what_is_written(start, solution, usual, local):
    """x: wrong. -: not judged as correct because of it."""
    problem = Problem("?", start)
    for marks, is_local in ((usual, False), (local, True)):
        found = [
            symbol in those
            for symbol, those in zip(solution, problem.allowed(solution, is_local), strict=True)
        ]
        assert found == [mark == "." for mark in marks]


def test_local_verdicts_are_the_usual_ones_up_to_the_end_of_the_first_wrong_step(family):
    rng = random.Random(9)
    for problem in problems(family, 40):
        solution = problem.solution(rng)
        assert problem.allowed(solution, local=True) == problem.allowed(solution)
        place = rng.randrange(len(solution))
        text = solution[:place] + rng.choice("0123456789;abc$") + solution[place + 1 :]
        usual, local = problem.allowed(text), problem.allowed(text, local=True)
        assert local[: place + 1] == usual[: place + 1]
        assert all(those <= others for those, others in zip(usual, local, strict=True))
