"""The pictures of a run: its curves and the histogram of the weights, as files and in a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from vcrd.report import charts, style

_BINS = 24
_LABEL = 15  # characters of a line of a label beside a chart
# Inches of a chart in a file.
_HEIGHT = 2.7


def draw(path: Path, results: dict[str, Any], solutions: dict[str, Any], across: bool = True) -> None:
    """Writes the three charts into one PNG or SVG. results: as in results.json. solutions: as in logs/held_out.json.

    across: side by side instead of below each other.
    """
    # Not pyplot, which needs a screen.
    with rc_context({**style.RC, "axes.titlepad": 10}):
        size = (2.8 * style.WIDTH, 3.9) if across else (style.WIDTH, 3 * _HEIGHT)
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
        shape = (1, 3) if across else (3, 1)
        for axes, (title, unit, drawn) in zip(
            figure.subplots(*shape), _charts(results, solutions), strict=True
        ):
            axes.set(title=title, ylabel=unit)
            drawn(axes)
        style.save(figure, path)


def in_page(results: dict[str, Any], solutions: dict[str, Any]) -> str:
    """The charts as elements of a page with the colours of `style.css`."""
    return "".join(charts.chart(*each) for each in _charts(results, solutions))


def _charts(
    results: dict[str, Any], solutions: dict[str, Any]
) -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    """Title, unit and drawing of each."""
    yield "The student approaches the teacher", "nats per token", lambda axes: _draw_losses(axes, results)
    yield "... and is more valid more often", "% of tokens", lambda axes: _draw_judgement(axes, results)
    yield (
        "Weights of the held-out tokens",
        "% of tokens, log scale",
        lambda axes: _draw_weights(axes, results, solutions),
    )


def _draw_losses(axes: Any, results: dict[str, Any]) -> None:
    curves = (
        ("cross_entropy", "cross-entropy of the solution", style.FAINT),
        ("divergence", "KL divergence, teacher to student", style.TEACHER),
    )
    _draw_curves(axes, results, curves, 1, "{:.2f}")


def _draw_judgement(axes: Any, results: dict[str, Any]) -> None:
    curves = (
        ("agreement", "both prefer the same token", style.TEACHER),
        ("student_more_valid", "student more valid", style.STUDENT),
    )
    _draw_curves(axes, results, curves, 100, "{:.1f} %")


def _draw_curves(
    axes: Any, results: dict[str, Any], curves: tuple[tuple[str, str, str], ...], factor: float, form: str
) -> None:
    """Lines of the training; points of the held-out problems before and after it."""
    steps = [step["number"] + 1 for step in results["training"]]
    ends = []
    for name, label, colour in curves:
        values = [factor * step["figures"][name] for step in results["training"]]
        before, after = (factor * results["held_out"][stage][name] for stage in ("before", "after"))
        axes.plot(steps, values, color=colour, linewidth=1.8)
        axes.plot([0, steps[-1]], [before, after], "o", color=colour, markersize=7, clip_on=False)
        axes.annotate(
            form.format(before),
            (0, before),
            (-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=style.text_colour(colour),
        )
        ends.append((f"{form.format(after)}\n{style.wrapped(label, _LABEL)}", after, colour))
    axes.set(xlabel="step; points: held-out problems", ylim=(0, None))
    axes.set_xlim(-0.3 * steps[-1], None)  # room for the labels of the first points
    axes.xaxis.set_major_locator(
        FixedLocator([0, *MaxNLocator(3, integer=True).tick_values(1, steps[-1])[1:]])
    )
    style.label_ends(axes, ends)


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
        bar.set(
            color=style.STUDENT if middle < 0.5 else style.TEACHER, alpha=0.25 + 0.65 * abs(2 * middle - 1)
        )
    axes.hist(
        values["before"],
        weights=share["before"],
        histtype="step",
        color=style.INK,
        linewidth=1.4,
        **options,
    )
    axes.axvline((low + high) / 2, ymax=0.8, color=style.INK, linewidth=1, linestyle=":")
    axes.set(xlabel="weight of a token; bars: after training, line: before")
    axes.set_yscale("log")
    axes.set_ylim(None, 12 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    for x, text, side, colour in (
        (0.01, "student\nmore valid", "left", style.STUDENT),
        (0.5, "1: plain\ndistillation", "center", style.INK),
        (0.99, "teacher\nmore valid", "right", style.TEACHER),
    ):
        axes.text(
            *(x, 0.98, text),
            transform=axes.transAxes,
            ha=side,
            va="top",
            color=style.text_colour(colour),
            fontsize=axes.xaxis.label.get_size(),
            linespacing=1.1,
        )
