"""The results of compare.py as tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lm.judged import NAMES
from lm.losses import REGIMES, names_of
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
    wanted = len(names_of(regime))
    complete = {seed: records for seed, records in by_seed.items() if len(records) == wanted}
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
    from vcrd.report import style

    folder.mkdir(parents=True, exist_ok=True)
    for regime in REGIMES:
        results = results_of(content, regime)
        if results is None or len(names := [name for name in results.methods(regime) if name != "JSD"]) < 1:
            continue
        with rc_context(style.RC):
            figure = Figure(figsize=(style.WIDTH, 0.26 * len(names) + 1.3), layout="constrained")
            panels = figure.subplots(1, len(results.tasks), sharex=True, sharey=True, squeeze=False).flatten()
            for number, (axes, task) in enumerate(zip(panels, results.tasks, strict=True)):
                pairs = {
                    name: (results.solved(regime, each)[number : number + 1] for each in (name, "JSD"))
                    for name in names
                }
                plots.ranked(axes, [(name, difference(*pair)) for name, pair in pairs.items()])
                axes.set_title(task)
                axes.set_xlabel("points over JSD")
            figure.suptitle(TITLES[regime], x=0.015, ha="left", fontsize=11, weight="bold")
            plots.caption(figure, f"{plots.POINTS} {plots.INTERVAL} {plots.explained(['JSD', *names])}")
            style.save(figure, folder / f"methods-{regime}.svg")
