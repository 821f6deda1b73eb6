"""The measurement of the estimators, on synthetic text and models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import estimators
import vcrd
from estimators import Judged, Step, auroc, judged, pieces, table_of, verdict

TEXT = "First we add. Then (see above)\n\nwe have x = 1.5 and y.\n  \nSo 2 is it! The end"


def test_pieces_are_sentences_of_lines():
    found = [TEXT[first:last] for first, last in pieces(TEXT)]
    assert found == ["First we add.", "Then (see above)", "we have x = 1.5 and y.", "So 2 is it!", "The end"]


def test_steps_after_the_first_wrong_one_have_no_verdict():
    wrong = (TEXT.index("we have"), TEXT.index("and y."))
    assert [verdict(piece, wrong) for piece in pieces(TEXT)] == [True, True, False, None, None]
    assert [verdict(piece, None) for piece in pieces(TEXT)] == [True] * 5


class Letters:
    """A tokenizer with one token per symbol."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"<{messages[0]['content']}>"

    def __call__(self, text, return_offsets_mapping, add_special_tokens):
        assert return_offsets_mapping and not add_special_tokens
        return {
            "input_ids": [ord(c) % 50 for c in text],
            "offset_mapping": [(i, i + 1) for i in range(len(text))],
        }


def test_steps_are_found_among_the_tokens():
    start = TEXT.index("we have")
    entry = {
        "identifier": "P1",
        "_text": "Why?",
        "fws_annotations": {
            "a": {"text": TEXT, "start_idx": start, "end_idx": start + 4},
            "b": {"text": TEXT, "start_idx": None, "end_idx": None},
        },
    }
    first, second = judged(Letters(), entry)
    begin = len("<Why?>")
    assert first.steps == [
        Step(begin, begin + 12, True),
        Step(begin + 14, begin + 29, True),
        Step(begin + start, begin + TEXT.index(" y.") + 2, False),
    ]
    assert len(second.steps) == 5 and all(step.correct for step in second.steps)
    assert list(judged(Letters(), {**entry, "fws_annotations": None})) == []


def test_scores_are_read_where_a_step_s_tokens_are_predicted():
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(50, 50, generator=generator) for _ in range(2))
    items = [
        Judged("P1", list(range(9)), [Step(2, 4, True), Step(5, 5, False)]),
        Judged("P2", [3, 1, 2], [Step(1, 2, True)]),
    ]
    tables = table_of(
        items, lambda tokens: teacher[tokens], lambda tokens: student[tokens], lambda done: None
    )
    assert {name: len(values) for name, values in tables["steps"].items()}["correct"] == 3
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    expected = [np.mean([log_p[t - 1, t] for t in (2, 3, 4)]), log_p[4, 5], (log_p[3, 1] + log_p[1, 2]) / 2]
    assert tables["steps"]["teacher: label"] == pytest.approx(np.array(expected), rel=1e-5)
    rho = [float(torch.sigmoid(log_p[t - 1, t] - log_q[t - 1, t])) for t in (2, 3, 4, 5)]
    assert tables["tokens"]["relative: label"][:4] == pytest.approx(np.array(rho), rel=1e-5)
    assert list(tables["steps"]["trivial: earlier"]) == [-2, -5, -1]
    assert list(tables["steps"]["trivial: shorter"]) == [-2, 0, -1]
    entropy = -(log_q.exp() * log_q).sum(-1)
    assert tables["tokens"]["student: confidence"][3] == pytest.approx(-float(entropy[4]), rel=1e-5)


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    score, correct = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[correct] for b in score[~correct]]
    assert auroc(score, correct) == pytest.approx(np.mean(pairs))
    assert auroc(np.array([1.0, 2.0, 3.0]), np.array([False, False, True])) == 1.0


def test_an_interval_is_wider_if_problems_differ():
    rng = np.random.default_rng(1)
    problem = np.repeat(np.arange(20), 30)
    correct = rng.random(600) < 0.6
    alike = correct + rng.standard_normal(600)
    low, high = estimators.interval(alike, correct, problem, 200)
    assert low < auroc(alike, correct) < high < low + 0.12
    skewed = alike * np.where(problem < 4, -3, 1)
    wider = estimators.interval(skewed, correct, problem, 200)
    assert wider[1] - wider[0] > 1.5 * (high - low)


def test_the_page_has_every_score():
    columns = {
        "problem": np.array(["a", "a", "b", "b"]),
        "correct": np.array([True, False, True, False]),
        "teacher: label": np.array([1.0, 0.0, 1.0, 0.0]),
    }
    levels = {level: estimators.summary(columns, 20) for level in ("steps", "tokens")}
    text = estimators.page({"solutions": 2, "problems": 2, "students": {"before training": levels}})
    assert "2 correct and 2 wrong steps" in text
    assert "| teacher: label | 1.000 (1.000 to 1.000) | 1.000 (1.000 to 1.000) |" in text


def test_the_student_is_trained_towards_the_teacher(monkeypatch):
    from examples.demo import source
    from examples.demo.data import Problem

    vocab = 40
    rng = np.random.default_rng(1)
    made = [Problem(f"P{n}", rng.integers(vocab, size=20).tolist(), [-1] * 4 + [0] * 16) for n in range(12)]
    monkeypatch.setattr(source, "problems", lambda cache: made)
    target = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(2)) * 2

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(vocab, vocab))

        def forward(self, tokens, use_cache):
            assert not use_cache
            return type("Output", (), {"logits": self.table[tokens]})

    student = Student()

    def divergence() -> float:
        return vcrd.vocab_parallel_divergence(student.table.detach(), target).divergence.mean().item()

    before = divergence()
    estimators.training(student, lambda tokens: target[tokens], {f"P{n}" for n in range(10)}, 28)
    assert divergence() < 0.999 * before and not student.training
