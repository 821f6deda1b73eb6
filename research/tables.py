"""The results of run.py as tables: means, and differences with bootstrap intervals.

    python research/tables.py evidence/small.json --plots evidence

A difference is paired: the same task, the same initial student, the same problem. For its interval, the seeds and
problems of each task are drawn a thousand times with replacement. It holds 95 % of these differences.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compared import CONTROLS, WINNER, methods

LENGTHS = ("usual", "longer")
TITLES = {"traces": "Prefixes of the teacher's solutions", "own": "Prefixes of the student's own"}
# Baselines for each method.
OTHERS = {
    "traces": ("forward KL", "KL + CE", "JSD"),
    "own": ("forward KL", "KL + CE", "JSD", "scores, gate"),
}
# Baselines for wrong verdicts: methods without a verifier.
UNJUDGED = ("forward KL", "JSD")
# Where families leave a choice of the next step: baselines, and the methods whose gain is shown by family.
RIVALS = ("JSD", "KL + CE", "JSD x position")
BY_CHOICE = (
    *("forward KL", "label", "JSD x label"),
    *("KL + CE", "JSD x position", "JSD x confidence, kept"),
    *("JSD x until the first error, kept", "JSD x gate, kept", "JSD x scores"),
    *("JSD x gap, kept", "JSD x soft scores, kept", "JSD x accepted mass, kept"),
)
# The columns of the summary: title, results, kind of prefixes, verifier, and whether the families leave a choice.
SUMMARY = (
    ("good teachers, a choice", "choice", "own", 0.0, True),
    ("no choice", "choice", "own", 0.0, False),
    ("worse teachers, a choice", "choice-worse-teacher", "own", 0.0, True),
    ("no choice", "choice-worse-teacher", "own", 0.0, False),
    ("good teachers, a choice, 20 % of the verdicts wrong", "choice-erring", "own", 0.2, True),
    ("always wrong about some symbols", "choice-erring", "own", "symbols 0.2", True),
    ("the teacher's solutions, a choice", "choice-solutions", "traces", 0.0, True),
)
# What the held-out families check: the prefixes, a method, and the loss whose tokens it weighs.
CHECKED = (
    ("own", "JSD x scores", "JSD"),
    ("own", WINNER, "JSD"),
    ("traces", "label", "forward KL"),
    ("traces", "JSD x label", "JSD"),
    ("traces", "JSD x scores", "JSD"),
)
# Gains of the calibration and its rivals, for the map.
GAINS = (
    ("label", "forward KL"),
    ("label", "label, shuffled"),
    ("label, sharpness 16", "label"),
    ("label x own", "forward KL"),
    ("confidence", "forward KL"),
    ("confidence", "confidence, shuffled"),
    ("scores, tokens", "forward KL"),
    ("scores, tokens", "scores, shuffled"),
    ("scores x own", "forward KL"),
    ("scores, gate", "forward KL"),
    ("KL + CE", "forward KL"),
    ("JSD", "forward KL"),
    ("JSD x confidence", "JSD"),
    ("JSD x label", "JSD"),
    ("JSD x label", "JSD x label, shuffled"),
    ("JSD x scores", "JSD"),
    ("JSD x scores", "JSD x scores, shuffled"),
    ("JSD x gate", "JSD"),
)
_DRAWS = 1000


class Results:
    """solved(regime, method, length): float [tasks, seeds, problems], for one verifier: its share of wrong verdicts, or
    "symbols SHARE" if it is always wrong about the same symbols.
    """

    def __init__(self, content: dict) -> None:
        self.content = content
        self.tasks = list(dict.fromkeys(run["task"] for run in content["runs"]))
        self.seeds = sorted({run["seed"] for run in content["runs"]})
        self._bits: dict[tuple, np.ndarray] = {}
        for run in content["runs"]:
            for method, solved in run["solved"].items():
                for length in LENGTHS:
                    place = (run["regime"], _verifier(run), method, length, run["task"], run["seed"])
                    bits = np.unpackbits(np.frombuffer(bytes.fromhex(solved[length]), dtype=np.uint8))
                    self._bits[place] = bits[: content["problems"][length]]

    def methods(self, regime: str, wrong: float | str = 0.0) -> list[str]:
        return list(dict.fromkeys(m for r, w, m, *_ in self._bits if (r, w) == (regime, wrong)))

    def solved(self, regime: str, method: str, length: str = "usual", wrong: float | str = 0.0) -> np.ndarray:
        return np.array(
            [
                [self._bits[regime, wrong, method, length, task, seed] for seed in self.seeds]
                for task in self.tasks
            ],
            dtype=np.float64,
        )

    def shares_wrong(self) -> list[float]:
        """Shares of verdicts that are wrong at random, 0 first."""
        return sorted({run["wrong"] for run in self.content["runs"] if not run.get("systematic")})

    def systematic(self) -> list[str]:
        """The verifiers that are always wrong about the same symbols."""
        return sorted({_verifier(run) for run in self.content["runs"] if run.get("systematic")})

    def choice(self) -> np.ndarray | None:
        """The mean entropy of the correct next symbols of each task, in nats; None if it was not measured."""
        measured = self.content.get("underspecified")
        return None if measured is None else np.array([measured[task]["entropy"] for task in self.tasks])

    def around(self, what: str, length: str = "usual") -> float:
        """The mean of "before" (the students) or "teacher", over tasks and seeds."""
        found = {(run["task"], run["seed"]): run[what][length] for run in self.content["runs"]}
        return float(np.mean(list(found.values())))


def _verifier(run: dict) -> float | str:
    return f"symbols {run['wrong']}" if run.get("systematic") else run["wrong"]


@functools.lru_cache(8)
def _draws(seed: int, tasks: int, seeds: int, problems: int) -> list[tuple[np.ndarray, ...]]:
    """For each task, how often each seed and problem is drawn, float [draws, seeds] and [draws, problems]."""
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.multinomial(n, [1 / n] * n, size=_DRAWS).astype(np.float64) for n in (seeds, problems))
        for _ in range(tasks)
    ]


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b, each [tasks, seeds, problems], and the ends of its interval."""
    paired = a - b
    drawn = np.zeros(_DRAWS)
    for task, (rows, columns) in zip(paired, _draws(seed, *paired.shape), strict=True):
        drawn += (rows @ task * columns).sum(1) / task.size / len(paired)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(paired.mean()), float(low), float(high)


def shown(found: tuple[float, float, float]) -> str:
    """In percentage points; bold where zero is outside the interval."""
    mean, low, high = (100 * value for value in found)
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def by_task(results: Results, regime: str) -> str:
    """Exact match of each method on each task, %, best first."""
    means = {method: results.solved(regime, method).mean((1, 2)) for method in results.methods(regime)}
    order = sorted(means, key=lambda method: -means[method].mean())
    rows = [["method", *results.tasks, "mean"]]
    rows += [
        [name, *(f"{100 * share:.1f}" for share in means[name]), f"{100 * means[name].mean():.1f}"]
        for name in order
    ]
    return table(rows)


def against(results: Results, regime: str, others: Sequence[str]) -> str:
    """The difference of each method from these, and from its shuffled weights if they exist."""
    methods = results.methods(regime)
    others = [name for name in others if name in methods]
    compared = [(f"against {other}", {name: other for name in methods}, "usual") for other in others]
    shuffled = {name: f"{name}, shuffled" for name in methods} | {"scores, tokens": "scores, shuffled"}
    compared.append(("against its weights shuffled", shuffled, "usual"))
    if others and any(results.solved(regime, name, "longer").any() for name in methods):
        compared.append((f"longer, against {others[0]}", {name: others[0] for name in methods}, "longer"))
    rows = [["method", *(title for title, _, _ in compared)]]
    for name in methods:
        row = [name]
        for _, control, length in compared:
            other = control.get(name, name)
            if other == name or other not in methods:
                row.append("")
                continue
            row.append(shown(difference(*(results.solved(regime, each, length) for each in (name, other)))))
        rows.append(row)
    return table(rows)


def worse_verifiers(results: Results, baseline: str) -> str:
    """Differences from a baseline without a verifier on the student's own prefixes, by share of wrong verdicts."""
    shares = results.shares_wrong()
    same = results.systematic()
    names = results.methods("own", [*shares, *same][-1])
    plain = results.solved("own", baseline)
    titles = [f"{100 * share:.0f} %" for share in shares]
    titles += [f"{100 * float(verifier.split()[1]):.0f} %, always the same symbols" for verifier in same]
    rows = [[f"against {baseline}, of verdicts wrong", *titles]]
    rows += [
        [
            name,
            *(shown(difference(results.solved("own", name, wrong=each), plain)) for each in (*shares, *same)),
        ]
        for name in names
    ]
    return table(rows)


def families(results: Results, regime: str) -> str:
    """What each family leaves open, the least first, and there the gains of some methods on JSD."""
    measured, known = results.content["underspecified"], results.methods(regime)
    names = [name for name in BY_CHOICE if name in known]
    rows = [["family", "correct next steps", "symbols", "entropy, nats", *names]]
    for place in np.argsort(results.choice(), kind="stable"):
        task = results.tasks[place]
        gains = (
            difference(*(results.solved(regime, each)[place : place + 1] for each in (name, "JSD")))
            for name in names
        )
        seen = [f"{measured[task][what]:.2f}" for what in ("steps", "symbols", "entropy")]
        rows.append([task, *seen, *map(shown, gains)])
    return table(rows)


def by_choice(results: Results, regime: str) -> str:
    """The differences from RIVALS over families that leave a choice, and over those that leave none."""
    known, choice = results.methods(regime), results.choice() > 0
    rivals = [name for name in RIVALS if name in known]
    places = {"with a choice": choice, "without": ~choice}
    places = {title: those for title, those in places.items() if those.any()}
    rows = [["method", *(f"{title}, against {rival}" for rival in rivals for title in places)]]
    for name in known:
        row = [name]
        for rival in rivals:
            both = [results.solved(regime, each) for each in (name, rival)]
            for those in places.values():
                row.append("" if name == rival else shown(difference(*(each[those] for each in both))))
        rows.append(row)
    return table(rows)


def against_controls(places: dict[str, Results]) -> str:
    """What the weighting that has controls gains on each of them, by title of the results; empty where none has any."""
    rows = [["control", *places]]
    for control in CONTROLS:
        gains = [
            shown(difference(*(results.solved("own", each) for each in (WINNER, control))))
            if {WINNER, control} <= set(results.methods("own"))
            else ""
            for results in places.values()
        ]
        if any(gains):
            rows.append([control, *gains])
    return table(rows) if len(rows) > 1 else ""


def check(results: Results) -> str:
    """What each of CHECKED gains on its loss without weights, on its weights shuffled if they ran, and on `KL + CE`."""
    rows = [
        ["prefixes", "method", "loss", "against it alone", "against its weights shuffled", "against KL + CE"]
    ]
    for regime, name, plain in CHECKED:
        gains = [
            shown(difference(*(results.solved(regime, each) for each in (name, other))))
            if other in results.methods(regime)
            else ""
            for other in (plain, f"{name}, shuffled", "KL + CE")
        ]
        rows.append([TITLES[regime].removeprefix("Prefixes of the "), name, plain, *gains])
    return table(rows)


def where(places: dict[str, Sequence[Results]]) -> str:
    """Each of GAINS in each setting, from the first file of a configuration that has both methods."""
    columns = [(place, regime) for place in places for regime in TITLES]
    rows = [["gain", *(f"{place}, {regime}" for place, regime in columns)]]
    for what in ("teacher", "before"):
        found = (places[place][0].around(what) for place, _ in columns)
        title = {"teacher": "the teachers solve, %", "before": "the students before, %"}[what]
        rows.append([title, *(f"{100 * share:.1f}" for share in found)])
    for a, b in GAINS:
        row = [f"{a}, against {b}"]
        for place, regime in columns:
            both = [each for each in places[place] if {a, b} <= set(each.methods(regime))]
            found = (both[0].solved(regime, name) for name in (a, b)) if both else ()
            row.append(shown(difference(*found)) if both else "")
        rows.append(row)
    return table(rows)


def summary(known: dict[str, Results]) -> str:
    """What each of the methods that the summary shows gains on JSD, by SUMMARY. A method that asks for no verdicts is
    the same whether or not these are right.
    """
    columns = [(title, known[name], *rest) for title, name, *rest in SUMMARY if name in known]
    without_verdicts = {method.name for method in methods() if not method.asks}
    rows = [["method", *(title for title, *_ in columns)]]
    rows.append(["families, seeds"])
    for _, results, _, _, choice in columns:
        rows[-1].append(f"{int(((results.choice() > 0) == choice).sum())}, {len(results.seeds)}")
    rows.append(["JSD solves, %"])
    for _, results, regime, _, choice in columns:
        solved = results.solved(regime, "JSD")[(results.choice() > 0) == choice]
        rows[-1].append(f"{100 * solved.mean():.1f}")
    for name in BY_CHOICE:
        rows.append([name])
        for _, results, regime, verifier, choice in columns:
            judged = name in results.methods(regime, verifier)
            cell = ""
            if judged or (verifier and name in without_verdicts and name in results.methods(regime)):
                its = results.solved(regime, name, wrong=verifier if judged else 0.0)
                pair = (
                    each[(results.choice() > 0) == choice] for each in (its, results.solved(regime, "JSD"))
                )
                cell = shown(difference(*pair))
            rows[-1].append(cell)
    return table(rows)


def page(results: Results) -> str:
    sizes = results.content["sizes"]
    seen = {
        (what, length): f"{100 * results.around(what, length):.1f} %"
        for what in ("teacher", "before")
        for length in LENGTHS
    }
    parts = [
        f"Configuration `{results.content['config']}`: {len(results.tasks)} tasks, {len(results.seeds)} seeds, "
        f"{sizes['problems']} held-out problems, {sizes['steps']} steps of {sizes['batch']} solutions. The teachers "
        f"solve {seen['teacher', 'usual']} of the problems, the students before the distillation "
        f"{seen['before', 'usual']}; of longer ones {seen['teacher', 'longer']} and {seen['before', 'longer']}. Every "
        "number is a percentage of problems that are solved, or a difference of two in percentage points with its "
        "interval of 95 %; bold: zero is outside.\n"
    ]
    for regime, title in TITLES.items():
        if results.methods(regime):
            parts += [f"## {title}\n", by_task(results, regime), against(results, regime, OTHERS[regime])]
            if results.choice() is not None and "JSD" in results.methods(regime):
                parts += [
                    families(results, regime),
                    by_choice(results, regime),
                    against_controls({f"gain of {WINNER} on it": results}) if regime == "own" else "",
                ]
    if len(results.shares_wrong()) > 1 or results.systematic():
        parts.append("## Verifiers that err\n")
        parts += [worse_verifiers(results, name) for name in UNJUDGED if name in results.methods("own")]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the plots, as SVG")
    options = parser.parse_args(arguments)
    results = Results(json.loads(options.results.read_text()))
    print(page(results))
    if options.plots:
        import plots

        plots.draw(results, options.plots)


if __name__ == "__main__":
    main()
