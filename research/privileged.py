"""Measures whether a teacher that sees a solution judges proposals better than the estimators that see none.

    python research/privileged.py --out evidence

For each family and seed: the teacher and the student of run.py, and two judges. The first is the teacher after a
further training on `hint % problem ? solution`, where the hint is a correct solution, drawn independently of the one
to be continued. The second is the first after a further training in which one hint in five is faulty: half of these are
cut short, half have one wrong symbol. The teacher itself is trained without hints and sees none.

At each prefix of solutions that were sampled from the student and from the teacher, up to the first wrong symbol, both
models propose their most probable symbol. The exact verifier says whether a correct continuation begins with it. The
AUROC of a score is the chance that it is higher for a valid proposal than for one that is not, ties counted half; for
"which of the two" the score is log V of the teacher's proposal minus that of the student's, where exactly one is valid.
The mean is over families. Intervals of 95 % come from a bootstrap over problems, seeds together, in each family.

Writes OUT/privileged.json. OUT/models keeps the models, so the command continues after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))

import vcrd
from configs import CONFIGS
from data import batch_of, draw, solved, unbroken
from estimators import ESTIMATORS
from judges import hinted, judge_of
from methods import OWN, TRACES
from models import Stack
from problems import Family
from runs import TASKS, family_of, model
from tables import TITLES, table
from train import Sizes, longest, share_solved

FAULTY = 0.2  # share of the hints that are partial or wrong, half of them each
# Name in the tables: share of faulty hints in the judge's training, and in the measurement; or one kind of hint.
JUDGES: dict[str, tuple[float, float | str]] = {
    "privileged, hints right": (0.0, 0.0),
    "privileged, 1 hint in 5 faulty": (FAULTY, FAULTY),
    "the same judge, right hints only": (FAULTY, "right"),
    "the same judge, partial hints only": (FAULTY, "partial"),
    "the same judge, wrong hints only": (FAULTY, "wrong"),
    "the same judge, no hints": (FAULTY, "none"),
}
ABOUT = {
    "teacher": "the teacher's proposal",
    "student": "the student's proposal",
    "relative": "which of the two",
}
_PLAIN = "the teacher's own probability"
_DRAWS = 1000


@dataclass(frozen=True)
class Options:
    """sizes: of the models. steps: of the two trainings of the judges, with the batches of the teacher's."""

    sizes: Sizes
    steps: tuple[int, int]

    def name(self) -> str:
        """Of the folder of the judges: it depends on everything that their training does."""
        return hashlib.sha256(repr((self, "judges")).encode()).hexdigest()[:16]


def solves(model: Stack, family: Family, shown: float | str | None) -> float:
    """The share of held-out problems that a model solves; shown: their hints, None for none and no mark of it."""
    rng = random.Random(3)
    held = draw(family, random.Random(2), 100, held=True)
    return share_solved(model, held if shown is None else [hinted(problem, rng, shown) for problem in held])


@dataclass
class Proposals:
    """Of each token up to the first wrong one: the number of its problem, whether the proposals are valid, log V of
    both by the name of the score.
    """

    problem: np.ndarray
    valid: dict[str, np.ndarray]  # "teacher", "student"
    scores: dict[str, tuple[np.ndarray, np.ndarray]]  # scores of the student's proposal and of the teacher's

    def about(self, what: str) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """What a score should tell, the scores, and the problems."""
        if what != "relative":
            place = ("student", "teacher").index(what)
            return self.valid[what], {name: pair[place] for name, pair in self.scores.items()}, self.problem
        one = self.valid["teacher"] != self.valid["student"]
        scores = {
            name: (of_teacher - of_student)[one] for name, (of_student, of_teacher) in self.scores.items()
        }
        return self.valid["teacher"][one], scores, self.problem[one]


@torch.no_grad()
def proposals(
    teacher: Stack,
    student: Stack,
    judges: dict[float, Stack],
    family: Family,
    regime: str,
    seed: int,
    count: int,
) -> Proposals:
    """Those of `count` held-out problems, with solutions sampled from the teacher or from the student."""
    asked = draw(family, random.Random(9000 + seed), count, held=True)
    chances = torch.rand(count, longest(asked), generator=torch.Generator().manual_seed(seed))
    (texts,) = solved(teacher if regime == TRACES else student, [asked], chances.shape[1], chances)
    batch = batch_of(asked, texts)
    written, before = unbroken(batch)
    p_logits, q_logits = (one(batch.tokens[None])[0][before] for one in (teacher, student))
    # A label counts where it is verified. The student's own samples have no verified token, so all that it wrote count.
    labels = torch.where(written | (regime == OWN), batch.labels, -1)[before]
    stats = vcrd.vocab_parallel_divergence(q_logits, p_logits, labels)
    scores = {name: _log_validities(stats, name) for name in ESTIMATORS}
    scores[_PLAIN] = (stats.teacher_logprob_of_student_action, stats.teacher_logprob_of_teacher_action)
    for name, (trained, shown) in JUDGES.items():
        rng = random.Random(seed)
        seen = batch_of([hinted(problem, rng, shown) for problem in asked], texts)
        logits = judges[trained](seen.tokens[None])[0][
            seen.counts
        ]  # the same tokens as of `batch`, in this order
        log_p = logits[before[batch.counts]].log_softmax(-1)
        scores[name] = tuple(
            log_p.gather(-1, action[:, None])[:, 0] for action in (stats.student_action, stats.teacher_action)
        )
    rows = torch.arange(count)[:, None].expand_as(batch.tokens)[before]
    actions = {"teacher": stats.teacher_action, "student": stats.student_action}
    allowed = batch.allowed[before]
    return Proposals(
        (rows + count * seed).numpy(),
        {name: allowed.gather(-1, action[:, None])[:, 0].numpy() for name, action in actions.items()},
        {name: tuple(each.double().numpy() for each in pair) for name, pair in scores.items()},
    )


def _log_validities(stats: vcrd.DivergenceStats, name: str) -> tuple[Tensor, Tensor]:
    from vcrd.loss import reference

    return reference.log_validities(stats._asdict(), name)


def together(parts: Sequence[Proposals]) -> Proposals:
    join = np.concatenate
    return Proposals(
        join([part.problem for part in parts]),
        {name: join([part.valid[name] for part in parts]) for name in parts[0].valid},
        {
            name: tuple(join([part.scores[name][place] for part in parts]) for place in (0, 1))
            for name in parts[0].scores
        },
    )


def aurocs(score: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """For each row of weights [draws, n], float: how often each item counts. NaN without both kinds of items."""
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(
        np.diff(score[order], prepend=np.nan) != 0
    )  # of equal scores; NaN differs from all
    weights = weights[:, order]
    of_right, of_wrong = (
        np.add.reduceat(weights * mask[order], first, axis=1) for mask in (right.astype(float), 1.0 - right)
    )
    below = of_wrong.cumsum(1) - of_wrong / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (of_right * below).sum(1) / (of_right.sum(1) * of_wrong.sum(1))


def drawn_aurocs(
    found: Proposals, what: str, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], int, int]:
    """Per score the AUROC, and after it those of the bootstrap; the numbers of valid proposals and of others."""
    right, scores, problem = found.about(what)
    names, place = np.unique(problem, return_inverse=True)
    if not 0 < right.sum() < len(right):
        return {}, int(right.sum()), int((~right).sum())
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=_DRAWS)
    counts = np.concatenate([np.ones((1, len(names))), drawn])
    parts = np.array_split(counts, 10)
    values = {
        name: np.concatenate([aurocs(score, right, part[:, place]) for part in parts])
        for name, score in scores.items()
    }
    return values, int(right.sum()), int((~right).sum())


def interval(values: np.ndarray) -> list[float]:
    """The value and the ends of its interval, from values of which the first is without bootstrap."""
    return [float(values[0]), *map(float, np.nanpercentile(values[1:], [2.5, 97.5]))]


def summary(found: dict[str, Proposals]) -> dict:
    """By what is judged: per task and on average the AUROC of each score, and what the judges gain on others."""
    content: dict[str, dict] = {}
    for what in ABOUT:
        rng, tasks, each = np.random.default_rng(0), {}, []
        for task, those in found.items():
            values, valid, wrong = drawn_aurocs(those, what, rng)
            tasks[task] = {
                "valid": valid,
                "wrong": wrong,
                "auroc": {name: interval(one) for name, one in values.items()},
            }
            if values:
                each.append(values)
        means = {name: np.mean([values[name] for values in each], 0) for name in (each[0] if each else ())}
        content[what] = {
            "tasks": tasks,
            "mean": {name: interval(one) for name, one in means.items()},
            "gain": {
                judge: {name: interval(means[judge] - means[name]) for name in (*ESTIMATORS, _PLAIN)}
                for judge in list(JUDGES)[:2]
                if means
            },
        }
    return content


def page(content: dict) -> str:
    """The results as tables."""
    parts = [
        f"Configuration `{content['config']}`, {content['seeds']} students in each of {len(content['tasks'])} "
        f"families, {content['problems']} held-out problems for each student.\n",
        table(
            [
                ["held-out problems that it solves, %", *content["tasks"]],
                *(
                    [name, *(f"{100 * share:.0f}" for share in each)]
                    for name, each in content["solved"].items()
                ),
            ]
        ),
    ]
    for regime, title in TITLES.items():
        found = content["regimes"][regime]
        parts.append(f"{title}: mean AUROC over the families.\n")
        rows = [["score", *ABOUT.values()]]
        count = ["valid proposals, others"]
        for what in ABOUT:
            those = found[what]["tasks"].values()
            count.append(f"{sum(one['valid'] for one in those)}, {sum(one['wrong'] for one in those)}")
        rows.append(count)
        for name in (*ESTIMATORS, _PLAIN, *JUDGES):
            rows.append([name, *(_shown(found[what]["mean"].get(name)) for what in ABOUT)])
        parts.append(table(rows))
        parts.append(f"{title}: AUROC of `which of the two`, by family.\n")
        tasks = found["relative"]["tasks"]
        rows = [["score", *tasks]]
        rows.append(
            ["teacher right, student right", *(f"{one['valid']}, {one['wrong']}" for one in tasks.values())]
        )
        for name in (*ESTIMATORS, _PLAIN, *JUDGES):
            cells = (one["auroc"].get(name) for one in tasks.values())
            rows.append([name, *(f"{cell[0]:.2f}" if cell else "" for cell in cells)])
        parts.append(table(rows))
        parts.append(f"{title}: what a judge gains in mean AUROC.\n")
        rows = [["judge", "against", *ABOUT.values()]]
        for judge in list(JUDGES)[:2]:
            for name in (*ESTIMATORS, _PLAIN):
                gains = (found[what]["gain"].get(judge, {}).get(name) for what in ABOUT)
                rows.append([judge, name, *map(_gain, gains)])
        parts.append(table(rows))
    return "\n".join(parts)


def _shown(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


def _gain(found: list[float] | None) -> str:
    if found is None:
        return ""
    text = f"{found[0]:+.3f} ({found[1]:+.3f} to {found[2]:+.3f})"
    return f"**{text}**" if found[1] > 0 or found[2] < 0 else text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of the results")
    parser.add_argument("--config", choices=CONFIGS, default="light", help="sizes, as of run.py")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="students of each family")
    parser.add_argument("--problems", type=int, default=96, help="held-out problems for each student")
    parser.add_argument(
        "--judge-steps", type=int, nargs=2, default=(150, 60), help="of the two trainings of the judges"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    options = Options(CONFIGS[given.config], tuple(given.judge_steps))
    tasks = given.tasks.split(",")
    shares: dict[str, list[float]] = {name: [] for name in ("teacher", "students", *JUDGES)}
    found: dict[str, dict[str, Proposals]] = {regime: {} for regime in TITLES}
    for task in tasks:
        family = family_of(task)
        say = lambda text, task=task: print(  # noqa: E731
            f"{task}: {text}; {time.process_time() - cpu:.0f} s of CPU", flush=True
        )
        teacher = model(task, None, options.sizes, given.out, say)
        students = [model(task, seed, options.sizes, given.out, say) for seed in range(given.seeds)]
        folder = given.out / "models" / options.name()
        first = judge_of(teacher, family, 0.0, options.sizes, options.steps[0], folder / f"{task}-right.pt")
        judges = {
            0.0: first,
            FAULTY: judge_of(
                first, family, FAULTY, options.sizes, options.steps[1], folder / f"{task}-faulty.pt"
            ),
        }
        shares["teacher"].append(solves(teacher, family, None))
        shares["students"].append(float(np.mean([solves(student, family, None) for student in students])))
        for name, (trained, shown) in JUDGES.items():
            shares[name].append(solves(judges[trained], family, shown))
        say(", ".join(f"{name} {each[-1]:.0%}" for name, each in shares.items()))
        for regime in TITLES:
            found[regime][task] = together(
                [
                    proposals(teacher, student, judges, family, regime, seed, given.problems)
                    for seed, student in enumerate(students)
                ]
            )
    content = {
        "config": given.config,
        "tasks": tasks,
        "seeds": given.seeds,
        "problems": given.problems,
        "judge_steps": options.steps,
        "solved": shares,
        "regimes": {regime: summary(those) for regime, those in found.items()},
        # Of this call, without what an interrupted one has trained.
        "seconds": {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "privileged.json").write_text(json.dumps(content, indent=0) + "\n")
    print(page(content))


if __name__ == "__main__":
    main()
