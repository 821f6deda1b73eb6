"""The measurement of a judge that sees a solution, on a made-up family and models."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import estimators
import privileged
from data import SYMBOLS, decode
from judges import AFTER_HINT, hint_of, hinted
from methods import OWN, TRACES
from models import Shape, Stack
from privileged import FAULTY, JUDGES, Proposals, aurocs, proposals
from problems import END
from runs import TASKS, family_of
from train import imitate, optimizer_of


@pytest.mark.parametrize("task", TASKS.split(","))
def test_hints_are_right_partial_or_wrong_as_they_say(task):
    rng = random.Random(1)
    for _ in range(40):
        problem = family_of(task)(rng, False)
        assert AFTER_HINT not in problem.prompt
        assert problem.is_correct(hint_of(problem, rng, "right") + END)
        assert not problem.is_correct(hint_of(problem, rng, "wrong") + END)
        partial = hint_of(problem, rng, "partial")
        assert all(
            symbol in allowed for symbol, allowed in zip(partial, problem.allowed(partial), strict=True)
        )
        assert hint_of(problem, rng, "none") == ""
        seen = hinted(problem, rng, "right")
        assert seen.prompt.endswith(AFTER_HINT + problem.prompt) and seen.start == problem.start


def test_the_share_of_faulty_hints():
    rng = random.Random(2)
    problem = family_of("number_sorting")(rng, False)
    right = problem.solution(rng).removesuffix(END)
    found = [hinted(problem, rng, FAULTY).prompt.split(AFTER_HINT)[0] == right for _ in range(600)]
    assert 0.74 < np.mean(found) < 0.86


class _ByTwo(torch.nn.Module):
    """Logits that depend on the last two symbols and on whether there is a hint."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = 3 * torch.randn(2, len(SYMBOLS), len(SYMBOLS), len(SYMBOLS), generator=generator)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hint = (tokens == SYMBOLS.index(AFTER_HINT)).any(-1, keepdim=True).long().expand_as(tokens)
        return self.logits[hint, tokens.roll(1, -1), tokens]


@pytest.mark.parametrize("regime", [TRACES, OWN])
def test_scores_are_those_of_each_proposal_at_its_own_prefix(regime, monkeypatch):
    family = family_of("arithmetic")
    rng = random.Random(3)
    wanted: list[str] = []

    def solve(model, problems, length, chances):
        wanted[:] = [problem.solution(rng) for problem in problems[0]]
        wanted[0] = wanted[0][:3] + "x" + wanted[0][4:]  # nothing is judged after it
        return [wanted]

    asked = []
    monkeypatch.setattr(privileged, "solved", solve)
    monkeypatch.setattr(
        privileged, "draw", lambda *a, **k: asked or asked.extend(plain_draw(*a, **k)) or asked
    )
    teacher, student, judge = _ByTwo(1), _ByTwo(2), _ByTwo(3)
    found = proposals(teacher, student, {0.0: judge, FAULTY: judge}, family, regime, 0, 6)
    place = 0
    for row, (problem, text) in enumerate(zip(asked, wanted, strict=True)):
        for written in range(len(text)):
            if not (allowed := problem.allowed(text)[written]):
                break
            before = problem.prompt + text[:written]
            codes = [SYMBOLS.index(symbol) for symbol in before[-2:]]
            actions = [int(model.logits[0, codes[0], codes[1]].argmax()) for model in (student, teacher)]
            assert found.problem[place] == row
            for name, action in zip(("student", "teacher"), actions, strict=True):
                assert found.valid[name][place] == (decode([action]) in allowed)
            log_p = judge.logits[1, codes[0], codes[1]].double().log_softmax(-1)
            for name in JUDGES:
                scored = [found.scores[name][model][place] for model in (0, 1)]
                assert scored == pytest.approx([float(log_p[action]) for action in actions], abs=1e-5)
            place += 1
    assert place == len(found.problem)


plain_draw = privileged.draw


def test_weighted_aurocs_are_those_of_repeated_items():
    rng = np.random.default_rng(1)
    score, right = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.5
    weights = np.stack([np.ones(60), rng.integers(0, 3, 60)]).astype(float)
    found = aurocs(score, right, weights)
    times = weights[1].astype(int)
    assert found[0] == pytest.approx(estimators.auroc(score, right))
    assert found[1] == pytest.approx(estimators.auroc(score.repeat(times), right.repeat(times)))
    assert np.isnan(aurocs(score, np.ones(60, dtype=bool), weights)).all()


def test_which_of_the_two_is_asked_where_exactly_one_is_valid():
    valid = {"teacher": np.array([True, True, False, False]), "student": np.array([True, False, True, False])}
    pair = (np.array([1.0, 2.0, 3.0, 4.0]), np.array([9.0, 7.0, 5.0, 3.0]))
    right, scores, problem = Proposals(np.arange(4), valid, {"a": pair}).about("relative")
    assert (
        right.tolist() == [True, False] and scores["a"].tolist() == [5.0, 2.0] and problem.tolist() == [1, 2]
    )
    right, scores, _ = Proposals(np.arange(4), valid, {"a": pair}).about("student")
    assert right.tolist() == valid["student"].tolist() and scores["a"].tolist() == pair[0].tolist()


def test_a_hint_is_part_of_what_a_model_is_trained_on():
    """`imitate` shows the model each problem as the judge sees it."""
    family = family_of("formats")
    model = Stack(Shape(16, 1, 1, len(SYMBOLS)))
    optimizer = optimizer_of(model, 1e-3)
    seen: list[str] = []

    def shown(problem, rng):
        seen.append(hinted(problem, rng, 0.0).prompt)
        return hinted(problem, rng, 0.0)

    imitate(model, optimizer, family, random.Random(1), 4, shown)
    assert len(seen) == 4 and all(AFTER_HINT in prompt for prompt in seen)


def test_the_command_writes_results_and_tables(tmp_path, capsys):
    command = "--config tiny --tasks arithmetic,tracing --seeds 2 --problems 8 --judge-steps 3 2"
    privileged.main([*command.split(), "--out", str(tmp_path)])
    content = json.loads((tmp_path / "privileged.json").read_text())
    text = privileged.page(content)
    assert text in capsys.readouterr().out
    for name in JUDGES:
        assert text.count(f"\n| {name} |") >= 3
    models = sorted(path.name for path in (tmp_path / "models").rglob("*.pt"))
    assert [name for name in models if name.startswith("arithmetic")] == [
        *("arithmetic-0.pt", "arithmetic-1.pt", "arithmetic-faulty.pt", "arithmetic-right.pt"),
        "arithmetic-teacher.pt",
    ]
    for regime in privileged.TITLES:
        for task in content["tasks"]:
            assert content["regimes"][regime]["teacher"]["tasks"][task]["wrong"] > 0
