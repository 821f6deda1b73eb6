"""The picture of a run: its curves and the histogram of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

TEACHER, STUDENT, INK, FAINT = "#3b6fb6", "#dd7a2b", "#22262b", "#9aa3ad"
_BINS = 24


def draw(path: Path, results: dict[str, Any], solutions: dict[str, Any]) -> None:
    """Writes a PNG. results: as in results.json. solutions: as in logs/held_out.json."""
    # Not pyplot, which needs a screen.
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": "#e6e9ed",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(14, 4.1), layout="constrained")
        losses, judgement, weights = figure.subplots(1, 3)
        _draw_losses(losses, results)
        _draw_judgement(judgement, results)
        _draw_weights(weights, results, solutions)
        figure.savefig(path, dpi=130)


def _draw_losses(axes: Any, results: dict[str, Any]) -> None:
    steps = [step["number"] + 1 for step in results["training"]]
    before, after = results["held_out"]["before"], results["held_out"]["after"]
    for name, label, colour in (
        ("cross_entropy", "cross-entropy", FAINT),
        ("divergence", "KL(teacher || student)", TEACHER),
    ):
        values = [step["figures"][name] for step in results["training"]]
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label)
        axes.plot([0, steps[-1]], [before[name], after[name]], "o", color=colour, markersize=7, clip_on=False)
        for x, value, offset, side in (
            (0, before[name], (9, -4), "left"),
            (steps[-1], after[name], (0, 9), "right"),
        ):
            axes.annotate(
                f"{value:.2f}",
                (x, value),
                offset,
                textcoords="offset points",
                ha=side,
                color=colour,
                weight="bold",
            )
    axes.plot([], [], "o", color=INK, markersize=6, label="on held-out problems")
    axes.set(
        title="The student approaches the teacher", xlabel="step", ylabel="nats per token", ylim=(0, None)
    )
    axes.set_xlim(-0.03 * steps[-1], None)
    axes.legend(loc="upper right")


def _draw_judgement(axes: Any, results: dict[str, Any]) -> None:
    steps = [step["number"] + 1 for step in results["training"]]
    for name, label, colour in (
        ("student_more_valid", "student the more valid", STUDENT),
        ("agreement", "both prefer the same token", TEACHER),
    ):
        values = [100 * step["figures"][name] for step in results["training"]]
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label)
        ends = [100 * results["held_out"][stage][name] for stage in ("before", "after")]
        axes.plot([0, steps[-1]], ends, "o", color=colour, markersize=7, clip_on=False)
    axes.set(title="... and is more valid more often", xlabel="step", ylabel="% of tokens")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left")


def _draw_weights(axes: Any, results: dict[str, Any], solutions: dict[str, Any]) -> None:
    column = solutions["fields"].index("weight")
    low, high = sorted((results["method"]["floor"], results["method"]["ceiling"]))
    values = {
        stage: [row[column] for rows in solutions[stage].values() for row in rows]
        for stage in ("before", "after")
    }
    share = {stage: [100 / max(1, len(found))] * len(found) for stage, found in values.items()}
    options = {"bins": _BINS, "range": (low, high)}
    _, _, bars = axes.hist(values["after"], weights=share["after"], **options)
    for bar in bars:
        middle = (bar.get_x() + bar.get_width() / 2 - low) / (high - low)
        bar.set(color=STUDENT if middle < 0.5 else TEACHER, alpha=0.25 + 0.65 * abs(2 * middle - 1))
    axes.hist(
        values["before"],
        weights=share["before"],
        histtype="step",
        color=INK,
        linewidth=1.4,
        **options,
    )
    axes.axvline((low + high) / 2, ymax=0.85, color=INK, linewidth=1, linestyle=":")
    axes.set(
        title="Weights of the held-out tokens",
        xlabel="weight of the token",
        ylabel="% of tokens (log)",
    )
    axes.set_yscale("log")
    axes.set_ylim(None, 6 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter("{x:g}")
    handles = [
        Patch(color=STUDENT, alpha=0.9, label="after: student more valid"),
        Patch(color=TEACHER, alpha=0.9, label="after: teacher more valid"),
        Line2D([], [], color=INK, linewidth=1.4, label="before training"),
        Line2D([], [], color=INK, linewidth=1, linestyle=":", label="plain distillation"),
    ]
    axes.legend(handles=handles, loc="upper center", fontsize=9, ncols=2)
