"""Weights from the gap between the proposals, and their controls, compared with values by hand; verifiers that err."""

from __future__ import annotations

import math
import random

import pytest
import torch
from test_methods import LENGTH, METHODS, ROWS, exact, logits, loss, mean, observed, place, random_verdicts

import data
import judges
import methods as how
import tasks
import train
import underspecified
import vcrd
import verifiers
import weighting as by
from compared import CONTROLS, SIGNALS, WINNER, methods
from models import Shape, Stack
from problems import END, Line, Problem
from verifiers import Verifier


def sums(weights: torch.Tensor, seen: how.Seen) -> tuple[float, float]:
    """Of the divergence with these weights, and without."""
    divergence = seen.stats.divergence.detach()[seen.counts]
    return float((weights[seen.counts] * divergence).sum()), float(divergence.sum())


def test_the_gap_by_hand():
    where = place()
    student, teacher = (each.detach().double().softmax(-1) for each in logits())
    label = where.labels.clamp(min=0)[..., None]
    gap = (teacher.gather(-1, label) - student.gather(-1, label))[..., 0]
    gap[~where.counts | (where.labels < 0)] = 0.0
    size = (gap.square().sum() / where.counts.sum()).sqrt()
    weights = (1 + gap / size).clamp(0.05, 3.0)
    assert 0 < (weights == 0.05).sum() + (weights == 3.0).sum() < where.counts.sum()
    jsd = exact(where, "jsd")["divergence"]
    assert loss("JSD x gap", where).item() == pytest.approx(mean(weights * jsd, where), rel=1e-5)
    kept = weights * jsd[where.counts].sum() / (weights * jsd)[where.counts].sum()
    assert loss("JSD x gap, kept", where).item() == pytest.approx(mean(kept * jsd, where), rel=1e-5)
    assert loss("JSD x gap, kept", where).item() == pytest.approx(loss("JSD", where).item(), rel=1e-5)
    reversed_ = by.scaled(by.reversed_(by.gap), 0.5)(observed(where))
    expected = (1 - 0.5 * gap / size).clamp(0.05, 3.0)
    torch.testing.assert_close(reversed_[where.counts].double(), expected[where.counts])


def test_signals_that_use_both_proposals_by_hand():
    """Token by token in plain Python."""
    where = place()
    seen = observed(where)
    student, teacher = (each.detach().double().softmax(-1) for each in logits())
    valid_s, valid_t = random_verdicts(None, None)
    found = {name: signal(seen) for name, signal in SIGNALS.items()}
    both = set()
    for row in range(ROWS):
        for at in range(LENGTH):
            if not where.counts[row, at]:
                continue
            q, p = student[row, at].tolist(), teacher[row, at].tolist()
            s, t = q.index(max(q)), p.index(max(p))
            verdict = {s: float(valid_s[row, at])} | {t: float(valid_t[row, at])}
            both.add((s == t, verdict[s], verdict[t]))
            expected = {
                "accepted mass": sum(v * (p[a] - q[a]) for a, v in verdict.items()),
                "signed mass": sum((2 * v - 1) * (p[a] - q[a]) for a, v in verdict.items()),
                "verdicts": float(valid_t[row, at]) - float(valid_s[row, at]),
            }
            for name, value in expected.items():
                assert found[name][row, at].item() == pytest.approx(value, abs=1e-6), name
            taught, learnt = (sum(v * each[a] for a, v in verdict.items()) for each in (p, q))
            ratio = taught**4 / (taught**4 + learnt**4) if taught else 0.5
            assert by.soft_scores(seen)[row, at].item() == pytest.approx(0.1 + 1.8 * ratio, abs=1e-5)
            spared = 0.1 if s != t and verdict[s] else 1.0
            assert by.spare_the_valid(seen)[row, at].item() == pytest.approx(spared)
    assert len(both) >= 4  # not all the same case


def test_controls_have_what_they_should_of_the_weights():
    where = place()
    seen = observed(where, "jsd")
    weights = by.scaled(by.accepted_mass)(seen)[seen.counts]
    for name in (WINNER, *CONTROLS):
        weighted, whole = sums(METHODS[name].weights(seen), seen)
        assert weighted == pytest.approx(whole, rel=1e-5)
    found = {name.rpartition(", ")[2]: METHODS[name].weights(seen)[seen.counts] for name in CONTROLS}
    for kind in ("shuffled", "by position", "by divergence"):
        ratio = found[kind].sort().values / weights.sort().values  # all are multiplied by one number
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
        assert not torch.equal(found[kind].argsort(), weights.argsort())
    assert 1 < len(found["sign"].unique()) <= 3 and found["size"].min() > 0.25 * found["size"].mean()
    assert found["reversed"][weights < 1].min() > found["reversed"][weights > 1].max()


@pytest.mark.parametrize("bins", [by.by_position, by.by_divergence])
def test_a_shuffle_within_bins_keeps_the_weights_of_each_bin(bins):
    where = place()
    seen = observed(where, "jsd")
    weights = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(5))
    moved = by.shuffled_within(lambda _: weights, bins)(seen)
    number = bins(seen)
    assert 2 < len(number.unique()) <= by.BINS
    for each in number.unique():
        before, after = (values[seen.counts][number == each] for values in (weights, moved))
        assert torch.equal(before.sort().values, after.sort().values)
    assert not torch.equal(moved[seen.counts], weights[seen.counts]) and not moved[~seen.counts].any()
    # The places of one bin are next to each other in what it is made of.
    ordered = seen.position[seen.counts] if bins is by.by_position else seen.stats.divergence[seen.counts]
    tops = [ordered[number == each].max() for each in number.unique()]
    lows = [ordered[number == each].min() for each in number.unique()]
    assert all(top <= low for top, low in zip(tops[:-1], lows[1:], strict=True))


def test_rivals_without_a_verifier_by_hand():
    where = place()
    jsd = exact(where, "jsd")["divergence"]
    weights = torch.zeros(ROWS, LENGTH)
    for row in range(ROWS):
        count = int(where.counts[row].sum())
        weights[row][where.counts[row]] = torch.linspace(1.0, 0.1, count)
    assert loss("JSD x position", where).item() == pytest.approx(mean(weights * jsd, where), rel=1e-5)
    own = place(labels=False)
    assert loss("JSD x outcome", own).item() == pytest.approx(mean(own.solved * jsd, own), rel=1e-5)
    assert loss("JSD x wrong outcome", own).item() == pytest.approx(mean(~own.solved * jsd, own), rel=1e-5)


def test_with_an_outcome_the_written_tokens_of_correct_solutions_are_verified():
    where = place(labels=False)
    student = logits()[0].detach().double()
    label = where.written.clamp(min=0)[..., None]
    ce = torch.where(
        where.solved & (where.written >= 0), -student.log_softmax(-1).gather(-1, label)[..., 0], 0.0
    )
    both = 0.5 * mean(exact(where, "jsd")["divergence"], where) + 0.5 * mean(ce, where)
    assert 0 < mean((ce > 0).double(), where) < 1
    assert loss("outcome + CE", where).item() == pytest.approx(both, rel=1e-5)


def test_each_method_asks_its_own_source_of_verdicts():
    def refuses(*_):
        raise AssertionError("asked")

    for method in methods():
        if how.OWN not in method.regimes:
            continue
        where = place(labels=False)
        where.judges = {
            source: random_verdicts if source == method.source else refuses
            for source in ("verifier", "judge", "local")
        }
        loss(method.name, where)


def test_a_verifier_errs_as_often_as_it_should():
    right = torch.rand(200, 500, generator=torch.Generator().manual_seed(1)) < 0.7
    actions = torch.randint(len(data.SYMBOLS), right.shape, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(verifiers.RIGHT(right, actions, generator), right)
    wrong = Verifier(0.2)(right, actions, generator) != right
    assert wrong.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert wrong[right].float().mean().item() == pytest.approx(0.2, abs=0.01)
    tokens = tuple(data.encode("3c"))
    wrong = Verifier(tokens=tokens)(right, actions, generator) != right
    assert torch.equal(wrong, torch.isin(actions, torch.tensor(tokens)))


@pytest.mark.parametrize("family", [underspecified.edits, underspecified.walks, tasks.arithmetic])
def test_a_systematic_verifier_is_wrong_about_the_wanted_share_of_solutions(family):
    verifier = verifiers.systematic(family, 0.2)
    rng = random.Random(11)
    tokens = data.encode("".join(family(rng, False).solution(rng) for _ in range(300)).replace(END, ""))
    share = sum(token in verifier.tokens for token in tokens) / len(tokens)
    assert 0.1 < share < 0.23 and verifier.share == 0
    assert verifier == verifiers.systematic(family, 0.2)  # the same for every method and seed
    assert not set(data.encode(END)) & set(verifier.tokens)


def test_a_verifier_that_errs_ends_what_is_unbroken_earlier():
    """One that is always wrong about "b" rejects it where it is right."""
    problem = Problem("?", Line((f"abab{END}",)))
    batch = data.batch_of([problem], [f"abab{END}"], (1, 1))
    marked = train._marked(batch.part(0))
    for verifier, unbroken in ((verifiers.RIGHT, 5), (Verifier(tokens=tuple(data.encode("b"))), 2)):
        where = train._place(marked, how.OWN, torch.Generator(), verifier, None)
        assert where.unbroken.sum() == unbroken


@pytest.mark.parametrize(("times", "accepts"), [(100.0, False), (3.0, True)])
def test_a_judge_reads_the_solution_and_judges_the_right_tokens(times, accepts, tmp_path, monkeypatch):
    """Its stand-in copies the hint: the next symbol of it is so many times as probable as each other one."""

    class Copies:
        def to(self, device):
            return self

        def __call__(self, tokens):
            found = torch.zeros(*tokens.shape, len(data.SYMBOLS))
            for row, text in enumerate(tokens[0].tolist()):
                hint, _, rest = data.decode(text).partition(judges.AFTER_HINT)
                begins = len(hint) + 1 + rest.index("?")
                for written, symbol in enumerate((hint + END)[: len(text) - begins]):
                    found[0, row, begins + written, data.encode(symbol)[0]] = math.log(times)
            return found

    monkeypatch.setattr(judges, "judge_of", lambda *_: Copies())
    problems = [Problem("12?", Line((f"abc{END}",))), Problem("345?", Line((f"defgh{END}",)))]
    batch = data.batch_of(problems, [f"abc{END}", f"dexgh{END}"])
    actions = batch.labels.clamp(min=0)
    teacher = Stack(Shape(8, 1, 1, len(data.SYMBOLS)))
    judge = judges.judge_for(teacher, None, train.Sizes(), tmp_path / "none")
    written, same = judge(batch, actions, torch.full_like(actions, data.encode("d")[0]))
    expected = batch.counts.float()
    if not accepts:
        expected[1, batch.counts[1].nonzero()[2, 0]] = 0.0  # the "x"
        assert same.sum() == 1
    assert torch.equal(written, expected)


@pytest.mark.parametrize("normalization", ["none", "mass"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_gap_is_a_weighting_of_the_package(normalization, labels):
    """With labels `gap`, with verdicts on both proposals `accepted mass`."""
    where = place(labels=labels)
    student, teacher = logits()
    settings = {"validity": "label"}
    if not labels:
        student_valid, teacher_valid = random_verdicts(None, None)
        settings = {
            "validity": "scores",
            "student_validity": student_valid,
            "teacher_validity": teacher_valid,
        }
    out = vcrd.validity_calibrated_kl(
        student,
        teacher,
        where.labels,
        divergence="jsd",
        weighting="gap",
        sharpness=1.0,
        floor=by.FLOOR,
        ceiling=by.CEILING,
        normalization=normalization,
        mask=where.counts,
        **settings,
    )
    name = "JSD x gap" if labels else "JSD x accepted mass"
    if normalization == "mass":
        name += ", kept"
    assert len(out.weight[where.counts].unique()) > 5
    assert loss(name, where).item() == pytest.approx(mean(out.loss, where), rel=1e-5)
