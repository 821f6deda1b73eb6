"""The results of compare.py as tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lm.judged import NAMES
from lm.losses import METHODS, REGIMES
from privileged import ABOUT
from tables import TITLES, Results, against, by_task, difference, table

OTHERS = ("JSD", "KL + CE", "forward KL")


def results_of(content: dict, regime: str) -> Results | None:
    """As those of run.py, each family as a task. None if nothing is finished.

    With the seeds for which all methods are finished; before there are any, with what the first seed has.
    """
    by_seed: dict[int, list[dict]] = {}
    for record in content["students"]:
        if record["regime"] == regime:
            by_seed.setdefault(record["seed"], []).append(record)
    complete = {seed: records for seed, records in by_seed.items() if len(records) == len(METHODS)}
    runs = []
    for seed, records in (complete or dict(list(by_seed.items())[:1])).items():
        for number, family in enumerate(content["sizes"]["families"]):
            solved = {
                # There are no longer problems.
                record["method"]: dict.fromkeys(("usual", "longer"), record["solved"][number])
                for record in records
            }
            around = {
                name: {"usual": _share(content, records[0][name][number])} for name in ("before", "teacher")
            }
            place = {"task": family.rpartition(":")[2], "regime": regime, "seed": seed, "wrong": 0.0}
            runs.append({**place, "solved": solved, **around})
    return Results({"runs": runs, "problems": {"usual": content["problems"], "longer": 0}}) if runs else None


def _share(content: dict, packed: str) -> float:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8))[: content["problems"]]
    return float(bits.mean())


def page(content: dict) -> str:
    sizes, done = content["sizes"], len(content["students"])
    parts = [
        f"Configuration `{content['config']}` on {content['device']}: SmolLM2-135M-Instruct with "
        f"{len(sizes['teacher_layers'])} of its layers as the teacher, with {len(sizes['student_layers'])} as the "
        f"student; {content['problems']} held-out problems of each family; {sizes['steps']} steps of "
        f"{sizes['batch']} solutions, about {content['median']['tokens']:,.0f} tokens per student. "
        f"{done} of {content['all_runs']} runs are finished.\n"
    ]
    for regime in REGIMES:
        results = results_of(content, regime)
        if results is None:
            continue
        teacher, before = (100 * results.around(name) for name in ("teacher", "before"))
        parts += [
            f"### {TITLES[regime]}\n",
            f"{len(results.seeds)} seeds. The teacher solves {teacher:.1f} %, the students before the distillation "
            f"{before:.1f} %.\n",
            by_task(results, regime),
            against(results, regime, OTHERS),
        ]
    if content["judged"]:
        parts += ["### The estimators against the exact verifier\n", _judged(content["judged"])]
    return "\n".join(parts)


def _judged(found: dict) -> str:
    """Mean AUROC over the families, by prefixes and by what is judged."""
    columns = [(regime, what) for regime in REGIMES for what in ABOUT]
    rows = [["score", *(f"{regime}: {ABOUT[what]}" for regime, what in columns)]]
    cells = (found[regime][what] for regime, what in columns)
    rows.append(["valid proposals, others", *(f"{one['valid']}, {one['wrong']}" for one in cells)])
    for name in NAMES:
        rows.append([name, *(_shown(found[regime][what]["auroc"].get(name)) for regime, what in columns)])
    return table(rows)


def _shown(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


def draw(content: dict, folder: Path) -> None:
    """Writes methods-REGIME.svg: what each method gains on JSD in each family, with intervals of 95 %."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    import plots

    folder.mkdir(parents=True, exist_ok=True)
    for regime in REGIMES:
        results = results_of(content, regime)
        if results is None or len(names := [name for name in results.methods(regime) if name != "JSD"]) < 1:
            continue
        with rc_context(plots._STYLE):
            figure = Figure(figsize=(7, 0.34 * len(names) + 1))
            axes = figure.subplots()
            for number, (task, colour) in enumerate(zip(results.tasks, ("#1d4ed8", "#d97706"), strict=True)):
                for place, name in enumerate(reversed(names)):
                    pair = (results.solved(regime, each)[number : number + 1] for each in (name, "JSD"))
                    mean, low, high = (100 * value for value in difference(*pair))
                    height = place + 0.16 * (0.5 - number)
                    axes.plot((low, high), (height, height), color=colour, linewidth=1.6)
                    axes.plot(mean, height, "o", color=colour, markersize=4.5, label=None if place else task)
            axes.axvline(0, color="#9ca3af", linewidth=1)
            axes.set_yticks(range(len(names)), names[::-1])
            axes.set_xlabel("percentage points of exact match against JSD, and interval of 95 %")
            axes.set_title(TITLES[regime])
            axes.legend(loc="lower right")
            plots._save(figure, folder / f"methods-{regime}.svg")
