"""Draws the differences of tables.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from compared import methods
from tables import TITLES, Results, difference

_COLOURS = {
    "baseline": "#6b7280",
    "vcrd": "#1d4ed8",
    "control": "#d97706",
    "idea": "#059669",
    "variant": "#7c3aed",
}
# The methods whose gain is drawn by family.
_BY_CHOICE = (
    *("KL + CE", "JSD x position", "JSD x gate, kept", "JSD x scores"),
    *("JSD x soft scores, kept", "JSD x accepted mass, kept"),
)
# Without the salt the names of the parts of a picture would differ each time.
_STYLE = {
    "svg.hashsalt": "vcrd",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw(results: Results, folder: Path) -> None:
    """Writes methods-REGIME.svg to the folder, and verifiers.svg if there are results with wrong verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        for regime in TITLES:
            known = results.methods(regime)
            if baseline := _baseline(known):
                _save(_ranked(results, regime, baseline), folder / f"methods-{regime}.svg")
            if results.choice() is not None and "JSD" in known and set(_BY_CHOICE) & set(known):
                _save(_by_choice(results, regime), folder / f"choice-{regime}.svg")
        if len(results.shares_wrong()) > 1 and (baseline := _baseline(results.methods("own"))):
            _save(_by_verifier(results, baseline), folder / "verifiers.svg")


def _baseline(known: list[str]) -> str | None:
    """What the other methods are compared with; None if there is nothing to compare."""
    return next((name for name in ("forward KL", "JSD") if name in known and known[1:]), None)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def _ranked(results: Results, regime: str, baseline: str) -> Figure:
    """The difference of every method from the baseline, the best on top."""
    groups = {method.name: method.group for method in methods()}
    plain = results.solved(regime, baseline)
    found = {
        name: difference(results.solved(regime, name), plain)
        for name in results.methods(regime)
        if name != baseline
    }
    order = sorted(found, key=lambda name: found[name][0])
    figure = Figure(figsize=(7, 0.24 * len(order) + 1))
    axes = figure.subplots()
    for place, name in enumerate(order):
        mean, low, high = (100 * value for value in found[name])
        colour = _COLOURS[groups[name]]
        axes.plot((low, high), (place, place), color=colour, linewidth=1.6)
        axes.plot(mean, place, "o", color=colour, markersize=4.5)
    axes.axvline(0, color="#9ca3af", linewidth=1)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel(f"percentage points of exact match against {baseline}, and interval of 95 %")
    axes.set_title(TITLES[regime])
    present = [group for group in _COLOURS if group in {groups[name] for name in order}]
    shown = {group: Line2D([], [], color=_COLOURS[group], marker="o") for group in present}
    axes.legend(shown.values(), shown.keys(), loc="lower right")
    return figure


def _by_choice(results: Results, regime: str) -> Figure:
    """The gain of some methods on JSD in each family, the one with the least entropy of its correct next symbols
    first.
    """
    choice, jsd = results.choice(), results.solved(regime, "JSD")
    order = np.argsort(choice, kind="stable")
    names = [name for name in _BY_CHOICE if name in results.methods(regime)]
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(8, 1.6 * rows + 1.6), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        solved = results.solved(regime, name)
        for place, task in enumerate(order):
            mean, low, high = (
                100 * value for value in difference(*(x[task : task + 1] for x in (solved, jsd)))
            )
            axes.plot((place, place), (low, high), color="#1d4ed8", linewidth=1.4)
            axes.plot(place, mean, "o", color="#1d4ed8", markersize=4)
        axes.axhline(0, color="#9ca3af", linewidth=1)
        axes.set_title(name, loc="left", fontsize=9)
    labels = [f"{results.tasks[task].replace('_', ' ')}  {choice[task]:.2f}" for task in order]
    for axes in panels[-2:]:
        axes.set_xticks(range(len(order)), labels, rotation=50, ha="right", rotation_mode="anchor")
    figure.supxlabel("family, and the mean entropy of its correct next symbols, nats", fontsize=9)
    figure.supylabel("points against JSD, and interval of 95 %", fontsize=9)
    return figure


def _by_verifier(results: Results, baseline: str) -> Figure:
    """The gain of each method on the student's own prefixes, by share of wrong verdicts."""
    plain = results.solved("own", baseline)
    shares = results.shares_wrong()
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    names = results.methods("own", shares[-1])
    for number, name in enumerate(names):
        found = [difference(results.solved("own", name, wrong=share), plain) for share in shares]
        mean, low, high = (100 * np.array(column) for column in zip(*found, strict=True))
        apart = [100 * share + 0.6 * (number - len(names) / 2) for share in shares]
        axes.errorbar(
            apart,
            mean,
            (mean - low, high - mean),
            marker="o",
            markersize=4.5,
            linewidth=1.4,
            capsize=2,
            label=name,
        )
    axes.axhline(0, color="#9ca3af", linewidth=1)
    axes.set_xticks([100 * share for share in shares])
    axes.set_xlabel("verdicts that are wrong, %")
    axes.set_ylabel(f"points against {baseline}")
    axes.legend(fontsize=8, ncols=2)
    return figure
