"""How many more problems the students solve, as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

_COLOURS = ("#9aa3ad", "#22262b", "#4c9a6a", "#dd7a2b", "#3b6fb6")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "vcrd",
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
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")  # not pyplot, which needs a screen
        axes = figure.subplots()
        for colour, (name, each) in zip(_COLOURS, curves.items(), strict=False):
            updates = [interval * number for number in range(len(each[0]))]
            middle, low, high = (list(map(pick, zip(*each, strict=True))) for pick in (median, min, max))
            axes.plot(updates, middle, color=colour, linewidth=2, label=name)
            axes.fill_between(updates, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.axhline(0, color="#22262b", linewidth=1, linestyle=":")
        axes.set(xlabel="updates", ylabel="held-out problems solved, gain in points")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path, metadata={"Date": None})
