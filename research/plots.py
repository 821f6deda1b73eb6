"""Draws the differences of tables.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from compared import WINNER, methods
from tables import TITLES, Results, difference
from vcrd.report import style

# The groups of methods from top to bottom, and what a picture says about each.
_GROUPS = {
    "baseline": "baselines: other losses, or weights of others",
    "vcrd": "vcrd: its weights",
    "control": "controls: weights shuffled or turned around",
    "idea": "ideas: other weights",
    "variant": "variants: other settings and divergences",
}
# The methods whose gain is drawn by family, and what their weights are. The tables have the others.
_BY_CHOICE = {
    WINNER: "by a verifier: the mass on accepted tokens",
    "JSD x scores": "by a verifier: the default weights",
    "JSD x gate, kept": "only where the verifier accepts the teacher",
    "JSD x position": "no verifier: falls along the solution",
}
# What abbreviations in names of methods mean, for the caption of a picture that has them.
_WORDS = {
    "KL": "KL: KL divergence, teacher to student.",
    "reverse KL": "Reverse KL: student to teacher.",
    "JSD": "JSD: Jensen-Shannon divergence.",
    "CE": "CE: cross-entropy of the written tokens, half of each.",
    "SFT": "SFT: cross-entropy of the verified tokens alone.",
    " x ": "A x B: loss A with the weights B.",
    "label": "Weights without a loss: forward KL with them.",
    "kept": "Kept: times a factor that keeps the sum of the loss.",
}
POINTS = "Points: percentage points of problems solved."
_CAPTION = 74  # characters of a line
INTERVAL = "Lines: interval of 95 %; hollow: it contains 0."
# Colours and markers of lines with names at their ends.
_LINES = tuple(
    zip(
        (
            style.TEACHER,
            style.STUDENT,
            style.GREEN,
            style.PURPLE,
            style.ORANGE,
            style.SKY,
            style.INK,
            style.FAINT,
        ),
        "osD^vPX*",
        strict=True,
    )
)


def draw(results: Results, folder: Path) -> None:
    """Writes methods-REGIME.svg to the folder, and verifiers.svg if there are results with wrong verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(style.RC):
        for regime in TITLES:
            known = results.methods(regime)
            if baseline := _baseline(known):
                style.save(_ranked(results, regime, baseline), folder / f"methods-{regime}.svg")
            if results.choice() is not None and "JSD" in known and set(_BY_CHOICE) & set(known):
                style.save(_by_choice(results, regime), folder / f"choice-{regime}.svg")
        if len(results.shares_wrong()) > 1 and (baseline := _baseline(results.methods("own"))):
            style.save(_by_verifier(results, baseline), folder / "verifiers.svg")


def _baseline(known: list[str]) -> str | None:
    """What the other methods are compared with; None if there is nothing to compare."""
    return next((name for name in ("forward KL", "JSD") if name in known and known[1:]), None)


def ranked(axes: Any, rows: Sequence[tuple[str, tuple[float, float, float]] | str]) -> None:
    """Draws rows from top to bottom: a name with a difference and the ends of its interval, or a heading."""
    places = {}
    for place, row in enumerate(rows):
        if isinstance(row, str):
            heading = axes.annotate(
                *(row, (0.015, place)),
                xycoords=("figure fraction", "data"),
                va="center",
                color=style.TEXT[style.TEACHER],
                fontsize=10.5,
            )
            heading.set_in_layout(False)
        else:
            places[row[0]] = place
            interval(axes, row[1], place)
    axes.axvline(0, color=style.FAINT, linewidth=1, zorder=0.5)
    axes.set_yticks(list(places.values()), list(places))
    axes.tick_params(axis="y", length=0, labelcolor=style.INK, labelsize=10)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")


def interval(axes: Any, found: tuple[float, float, float], place: float, upright: bool = False) -> None:
    """A difference and its interval in points: green above 0, orange below it, grey and hollow in between."""
    mean, low, high = (100 * value for value in found)
    colour = style.GREEN if low > 0 else style.STUDENT if high < 0 else style.SOFT
    line, point = ((low, high), (place, place)), (mean, place)
    axes.plot(*(line[::-1] if upright else line), color=colour, linewidth=1.6)
    inside = low <= 0 <= high
    axes.plot(
        *(point[::-1] if upright else point),
        "o",
        color=colour,
        markersize=5,
        markerfacecolor=style.PAPER if inside else colour,
        markeredgewidth=1.4,
    )


def explained(names: Sequence[str]) -> str:
    """The meaning of the abbreviations in these names of methods."""
    text = " ".join(names)
    return " ".join(said for word, said in _WORDS.items() if word in text)


def caption(figure: Figure, text: str) -> None:
    """Below everything else, in lines. The figure becomes higher by them."""
    lines = style.wrapped(text, _CAPTION)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * (lines.count("\n") + 1))
    figure.supxlabel(lines, x=0.015, ha="left", fontsize=10, color=style.SOFT, linespacing=1.25)


def _ranked(results: Results, regime: str, baseline: str) -> Figure:
    """The difference of every method from the baseline, by group, the best of each on top."""
    groups = {method.name: method.group for method in methods()}
    plain = results.solved(regime, baseline)
    found = {
        name: difference(results.solved(regime, name), plain)
        for name in results.methods(regime)
        if name != baseline
    }
    rows: list[Any] = []
    for group, heading in _GROUPS.items():
        names = sorted((name for name in found if groups[name] == group), key=lambda name: -found[name][0])
        rows += [heading] * bool(names) + [(name, found[name]) for name in names]
    figure = Figure(figsize=(style.WIDTH, 0.23 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    ranked(axes, rows)
    axes.set_xlabel(f"points over {baseline}")
    figure.suptitle(TITLES[regime], x=0.015, ha="left", fontsize=11, weight="bold")
    caption(figure, f"{POINTS} {INTERVAL} {explained([baseline, *found])}")
    return figure


def _by_choice(results: Results, regime: str) -> Figure:
    """The gain of some methods on JSD in each family, the one with the least entropy of its correct next symbols
    first, and the mean over the families where one next step is correct and where several are.
    """
    choice, jsd = results.choice(), results.solved(regime, "JSD")
    order = np.argsort(choice, kind="stable")
    names = [name for name in _BY_CHOICE if name in results.methods(regime)]
    one = int((choice == 0).sum())
    figure = Figure(figsize=(style.WIDTH, 1.55 * len(names) + 2.7), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=True):
        solved = results.solved(regime, name)
        for place, task in enumerate(order):
            interval(axes, difference(*(x[task : task + 1] for x in (solved, jsd))), place, upright=True)
        axes.axhline(0, color=style.FAINT, linewidth=1, zorder=0.5)
        for first, last in ((0, one), (one, len(order))):
            if first == last:
                continue
            mean, low, high = (100 * x for x in difference(*(x[order[first:last]] for x in (solved, jsd))))
            reach = (first - 0.42, last - 0.58)
            axes.fill_between(reach, low, high, color=style.TEACHER, alpha=0.15, linewidth=0)
            axes.plot(reach, (mean, mean), color=style.TEACHER, linewidth=1.2, alpha=0.6)
            axes.text(
                *((first + last - 1) / 2, 0.98, f"mean {mean:+.1f}"),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                color=style.TEXT[style.TEACHER],
                fontsize=10,
            )
        axes.set_title(name, pad=19)
        axes.annotate(
            *(_BY_CHOICE[name], (0, 1), (0, 5)),
            xycoords="axes fraction",
            textcoords="offset points",
            color=style.SOFT,
            fontsize=10,
        )
    labels = [f"{results.tasks[task].replace('_', ' ')}, {choice[task]:.2f}" for task in order]
    panels[-1].set_xticks(range(len(order)), labels, rotation=40, ha="right", rotation_mode="anchor")
    arrow = "\N{RIGHTWARDS ARROW}"
    label = f"one next step is correct  {arrow}  several next steps are correct"
    panels[-1].set_xlabel(label if one else f"more next steps are correct  {arrow}")
    low, high = (
        pick(getattr(axes.dataLim, end) for axes in panels) for pick, end in ((min, "y0"), (max, "y1"))
    )
    panels[-1].set_ylim(low - 1, high + 4)  # room for the means
    panels[-1].yaxis.set_major_locator(MultipleLocator(5))
    figure.supylabel("points over JSD", fontsize=11, color=style.SOFT)
    words = "Number of a family: mean entropy of its correct next symbols, nats. Blue: mean of the families."
    caption(figure, f"{POINTS} {words} {INTERVAL} {explained(names)}")
    return figure


def _by_verifier(results: Results, baseline: str) -> Figure:
    """The gain of each method on the student's own prefixes, by share of wrong verdicts."""
    plain = results.solved("own", baseline)
    shares = results.shares_wrong()
    names = results.methods("own", shares[-1])
    figure = Figure(figsize=(style.WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    ends = []
    for number, (name, (colour, marker)) in enumerate(zip(names, itertools.cycle(_LINES))):
        found = [difference(results.solved("own", name, wrong=share), plain) for share in shares]
        mean, low, high = (100 * np.array(column) for column in zip(*found, strict=True))
        apart = [100 * share + 0.5 * (number - len(names) / 2) for share in shares]
        axes.vlines(apart, low, high, color=colour, linewidth=1.2, alpha=0.7)
        axes.plot(apart, mean, color=colour, marker=marker, markersize=5.5, linewidth=1.6)
        ends.append((style.wrapped(name, 22), mean[-1], colour))
    axes.axhline(0, color=style.FAINT, linewidth=1, zorder=0.5)
    axes.set_xticks([100 * share for share in shares])
    axes.set_xlabel("verdicts that are wrong, %")
    axes.set_ylabel(f"points over {baseline}")
    caption(figure, f"{POINTS} Upright lines: interval of 95 %. {explained([baseline, *names])}")
    style.label_ends(axes, ends, size=10)
    return figure
