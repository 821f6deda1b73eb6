"""The numbers of docs/evidence.md and docs/evidence-tables.md are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import anatomy
import page
import tables
from data import SYMBOLS
from lm import page as lm
from problems import END, Line, Problem
from vcrd.loss import reference


@pytest.mark.parametrize(("name", "least"), [("evidence.md", 1), ("evidence-tables.md", 10)])
def test_the_tables_are_those_of_the_committed_results(name, least):
    text = (page.DOCS / name).read_text()
    assert text.count("<!-- tables: ") == text.count("<!-- end -->") >= least
    assert page.with_tables(text, page.DOCS / "evidence") == text


def test_every_result_is_on_a_page_and_drawn():
    text = "".join((page.DOCS / name).read_text() for name in page.PAGES)
    found = sorted((page.DOCS / "evidence").glob("*.json"))
    assert found and all(f"<!-- tables: {path.stem} -->" in text for path in found)
    for name in page.comparisons(page.DOCS / "evidence"):
        assert f"images/evidence/{name}/" in text, name


def test_the_readme_has_the_numbers_of_the_page():
    """Its intervals are those of the tables."""
    section = (page.DOCS.parent / "README.md").read_text().split("## Does it help?")[1].split("\n## ")[0]
    traces = {
        "teacher's solutions: the default, KL with its weights, over plain KL": ("label", "forward KL"),
        "teacher's solutions: JSD with the default weights over plain KL": ("JSD x label", "forward KL"),
    }
    own = {
        "student's own samples, a verifier: JSD with the default weights over JSD": ("JSD x scores", "JSD"),
    }
    found = page.comparisons(page.DOCS / "evidence")
    content = json.loads((page.DOCS / "evidence/lm.json").read_text())
    real = {regime: lm.results_of(content, regime) for regime in ("traces", "own")}
    assert all(len(results.seeds) == 3 for results in real.values())
    for title, (a, b) in (traces | own).items():
        (cells,) = re.findall(
            rf"^\| {re.escape(title)} \| (.*) \| (.*) \| (.*) \| (.*) \|$", section, re.MULTILINE
        )
        regime = "own" if title in own else "traces"
        for cell, config in zip(cells[:2], ("small", "worse-teacher"), strict=True):
            (results, *_) = (
                each
                for name, each in found.items()
                if each.content["config"] == config and {a, b} <= set(each.methods(regime))
                # The page says so.
                if (len(each.tasks) == 9 if title in own else not name.startswith(("choice", "held-out")))
            )
            assert cell == gain(results, regime, a, b), title
        assert cells[2] == gain(found["held-out"], regime, a, b), title
        assert cells[3] == gain(real[regime], regime, a, b), title


def gain(results: tables.Results, regime: str, a: str, b: str) -> str:
    return tables.shown(tables.difference(*(results.solved(regime, name) for name in (a, b)))).strip("*")


def test_a_table_replaces_the_text_between_its_marks(tmp_path):
    results = {
        "small": _content("small", a="11110000", b="11000000"),
        "other": _content("other", a="10000000"),
    }
    for name, content in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = "Above.\n<!-- tables: small -->\nformer\n<!-- end -->\nBetween.\n<!-- tables: other -->\n<!-- end -->\n"
    made = page.with_tables(text, tmp_path)
    assert made.startswith("Above.\n<!-- tables: small -->\n\nConfiguration `small`")
    assert "former" not in made and "| a | 50.0 | 50.0 |\n| b | 25.0 | 25.0 |" in made
    assert "\n<!-- end -->\nBetween.\n<!-- tables: other -->\n" in made and "| a | 12.5 | 12.5 |" in made
    assert page.with_tables(made, tmp_path) == made


def test_the_map_takes_each_gain_from_the_first_results_that_have_it(monkeypatch):
    monkeypatch.setattr(tables, "GAINS", (("a", "b"), ("c", "a")))
    usual = tables.Results(_content("small", a="11110000", b="11000000"))
    more = tables.Results(_content("small", a="11111111", b="11000000", c="00000000"))
    head, _, taught, before, *rows = tables.where({"small": [usual, more]}).splitlines()
    assert head == "| gain | small, traces | small, own |"
    assert taught == "| the teachers solve, % | 90.0 | 90.0 |" and "30.0 | 30.0" in before
    assert rows[0].startswith("| a, against b | +25.0 (+0.0 to +") and rows[0].endswith(" |  |")
    assert rows[1].startswith("| c, against a | **-100.0 (-100.0 to -100.0)** |")


def test_the_summary_has_the_gains_on_jsd_where_families_leave_a_choice_and_where_not(monkeypatch):
    monkeypatch.setattr(tables, "BY_CHOICE", ("JSD x position", "JSD x scores"))
    contents = [
        _content(
            "small", "own", task, **{"JSD": "11000000", "JSD x position": "11110000", "JSD x scores": scores}
        )
        for task, scores in (("open", "10000000"), ("closed", "11111111"))
    ]
    erring = _content("small", "own", "open", 0.2, **{"JSD x scores": "00000000"})
    both = {**contents[0], "runs": [run for content in contents for run in content["runs"]]}
    both["underspecified"] = {"open": {"entropy": 0.5}, "closed": {"entropy": 0.0}}
    wrong = {**both, "runs": [*contents[0]["runs"], *erring["runs"]]}
    known = {"choice": tables.Results(both), "choice-erring": tables.Results(wrong)}
    head, _, families, solved, position, scores = tables.summary(known).splitlines()
    assert head == (
        "| method | good teachers, a choice | no choice | good teachers, a choice, 20 % of the verdicts wrong | "
        "always wrong about some symbols |"
    )
    assert families == "| families, seeds | 1, 1 | 1, 1 | 1, 1 | 1, 1 |"
    assert solved == "| JSD solves, % | 25.0 | 25.0 | 25.0 | 25.0 |"
    # Its weights are the same whatever the verdicts are.
    assert position.count("+25.0 (+") == 4
    assert [cell[:8] for cell in scores.split(" | ")[1:4]] == ["-12.5 (-", "**+75.0 ", "-25.0 (-"]
    assert scores.endswith(" |  |"), "no run with this verifier"


def _content(config: str, regime: str = "traces", task: str = "t", wrong: float = 0.0, **solved: str) -> dict:
    """Results of one task and seed, by default on the teacher's solutions."""
    run = {"task": task, "seed": 0, "regime": regime, "wrong": wrong}
    run |= {"before": {"usual": 0.3, "longer": 0.0}, "teacher": {"usual": 0.9, "longer": 0.0}}
    packed = {
        name: {length: f"{int(bits, 2):02x}" for length in tables.LENGTHS} for name, bits in solved.items()
    }
    return {
        "config": config,
        "sizes": {"problems": 8, "steps": 1, "batch": 1},
        "problems": {"usual": 8, "longer": 8},
        "runs": [{**run, "solved": packed}],
    }


class _Table(torch.nn.Module):
    """Logits that depend only on the last symbol. knows: pairs of a symbol and its likely next one."""

    def __init__(self, seed: int, *knows: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(SYMBOLS), len(SYMBOLS), generator=generator)
        for symbol, then in knows:
            self.logits[SYMBOLS.index(symbol), SYMBOLS.index(then)] += 6.0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits[tokens]


def test_the_shares_of_tokens_and_of_divergence_by_hand(monkeypatch):
    """Two solutions of "abc": a right one, and one whose second symbol is wrong."""
    family = lambda draw, longer: Problem("abc?", Line((f"abc{END}",)))  # noqa: E731
    monkeypatch.setattr(anatomy, "draw", lambda family, rng, count: [family(rng, False)] * count)
    monkeypatch.setattr(anatomy, "solved", lambda models, problems, *_: [[f"abc{END}", f"aac{END}"]])
    teacher, student = _Table(0, "?a", "ab", "bc", "cd"), _Table(1, "?a", "ac", "bc", f"c{END}")
    found = anatomy.shares(teacher, student, family, "own", 0, 2)
    # Two of the second solution's four tokens come after its error.
    assert found["after"] == pytest.approx(2 / 8)
    assert found["teacher"] == pytest.approx(5 / 6)  # all but c
    assert found["student"] == pytest.approx(4 / 6)  # all but a, twice
    assert found["differ"] == pytest.approx(3 / 8)
    log_q, log_p = (
        model.logits[[SYMBOLS.index(symbol) for symbol in "?abc?aac"]].double().log_softmax(-1)
        for model in (student, teacher)
    )
    for name in ("forward_kl", "jsd"):
        each = reference.divergence(log_p, log_q, name, 0.1, 0.5)
        assert found[name] == pytest.approx(float(each[6:].sum() / each.sum()), rel=1e-4)
        assert found[f"{name}_wrong"] == pytest.approx(float(each[3] / each.sum()), rel=1e-4)


def test_missing_models_are_an_error(capsys, tmp_path):
    for arguments, says in (
        (["--tasks", "arithmetic"], "--out: expected models that run.py has trained there"),
        (["--configs", "huge"], "--configs: expected names among"),
    ):
        with pytest.raises(SystemExit) as stopped:
            anatomy.main(["--out", str(tmp_path), *arguments])
        assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
