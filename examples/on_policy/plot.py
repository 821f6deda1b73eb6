"""How many more problems the students solve, as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from vcrd.report import style

# By where the prefixes come from, which begins the name of a method. The rest is what decides the weights.
_PANELS = {
    "off-policy": "Off-policy: trained on right solutions",
    "on-policy": "On-policy: trained on the student's own samples",
}
_COLOURS = {
    "uniform": (style.SOFT, "o"),
    "label": (style.GREEN, "D"),
    "confidence": (style.PURPLE, "s"),
    "scores": (style.TEACHER, "^"),
}


def draw(path: Path, results: dict[str, Any]) -> None:
    """Writes each method's gain since the start of the distillation: the median over the seeds, and the range.

    results: as in results.json. The gain, because students of different seeds start far apart.
    """
    interval = results["sizes"]["interval"]
    curves: dict[str, list[list[float]]] = {}
    for run in results["runs"]:
        curves.setdefault(run["method"], []).append(
            [100 * (share - run["solved"][0]) for share in run["solved"]]
        )
    with rc_context(style.RC):
        # Not pyplot, which needs a screen.
        figure = Figure(figsize=(style.WIDTH, 5.8), layout="constrained")
        panels = figure.subplots(len(_PANELS), sharex=True, sharey=True)
        ends: dict[str, list[tuple[str, float, str]]] = {where: [] for where in _PANELS}
        for name, each in curves.items():
            where, _, weights = name.partition(", ")
            colour, marker = _COLOURS[weights]
            axes, apart = panels[list(_PANELS).index(where)], 0.06 * interval * (len(ends[where]) - 1)
            updates = [interval * number for number in range(len(each[0]))]
            middle, low, high = (list(map(pick, zip(*each, strict=True))) for pick in (median, min, max))
            axes.vlines(
                [update + apart for update in updates], low, high, color=colour, linewidth=1.2, alpha=0.7
            )
            axes.plot(
                *([update + apart for update in updates], middle),
                color=colour,
                marker=marker,
                markersize=5.5,
                linewidth=1.8,
            )
            ends[where].append((f"{weights} {middle[-1]:+.1f}", middle[-1], colour))
        for axes, (where, title) in zip(panels, _PANELS.items(), strict=True):
            axes.axhline(0, color=style.FAINT, linewidth=1, zorder=0.5)
            axes.set_title(title)
            axes.set_xticks(updates)
            style.label_ends(axes, ends[where])
        panels[-1].set_xlabel("updates")
        figure.supylabel("gain in held-out problems solved, points", fontsize=11, color=style.SOFT)
        said = (
            "Names: what decides the weight of a token; uniform: nothing.\n"
            f"Marks: median of {len(each)} seeds; upright lines: from the least to the most."
        )
        figure.supxlabel(said, x=0.015, ha="left", fontsize=10, color=style.SOFT, linespacing=1.25)
        style.save(figure, path)
