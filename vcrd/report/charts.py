"""The charts of the page, each an inline SVG with real text."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from vcrd.report import style

# The parts of a step are grey, and the waits are orange.
COMPUTE, REPLICAS = style.GREYS, style.ORANGES
VERIFIER, IDLE = style.PURPLE, style.GRID
_RC = {**style.RC, "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10}
# Inches. A wide chart is drawn a second time for narrow screens, on which its text would be too small.
_NARROW, _WIDE = (4.0, 2.5), (11.6, 3.1)
_LEGEND_ROW = 0.2  # inches
_LABEL = 13  # characters of a line of a label beside a chart
_EACH = 8  # at most so many ranks have a line each; more ranks are a band
_FEW = 60  # a curve of fewer points has a marker on each
_HEAT = LinearSegmentedColormap.from_list("weights", ["#e3eff7", "#8fc1de", style.TEACHER, "#00314d"])


def chart(title: str, unit: str, draw: Callable[[Any], str | None], wide: bool = False) -> str:
    """A figure of the page. draw: draws on matplotlib axes, and returns the text under the chart."""
    pictures = []
    for size in (_WIDE, _NARROW) if wide else (_NARROW,):
        with mpl.rc_context({**_RC, "svg.hashsalt": f"{title} {size}"}):
            figure = Figure(figsize=size, layout="constrained")
            said = draw(figure.subplots())
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True, dpi=96)
        pictures.append(_cleaned(out.getvalue(), f"{title}, {unit}"))
    under = f'<p class="soft">{html.escape(said)}</p>' if said else ""
    heading = f"<h3>{html.escape(title)} <span>{html.escape(unit)}</span></h3>"
    return f'<figure class="{"wide" if wide else ""}">{heading}{"".join(pictures)}{under}</figure>'


def lines(
    title: str,
    unit: str,
    x: np.ndarray,
    curves: Sequence[tuple[str, str, np.ndarray]],
    band: tuple[str, np.ndarray, np.ndarray] | None = None,
    least: float | None = None,
) -> str:
    """curves: (name, colour, values over iterations x). band: (name, lower, upper) behind the first curve.

    Several curves, or a curve and a band, have their names at their ends.
    """

    def draw(axes: Any) -> None:
        if all(np.isnan(values).all() for _, _, values in curves):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "all values are NaN", ha="center", color=style.SOFT, transform=axes.transAxes)
            return
        if band:
            axes.fill_between(x, band[1], band[2], color=curves[0][1], alpha=0.18, linewidth=0)
        for _, colour, values in curves:
            marks = {"marker": "o", "markersize": 3} if len(x) < _FEW else {}
            axes.plot(x, values, color=colour, linewidth=1.8, **marks)
        _iterations(axes)
        if least is not None:
            axes.set_ylim(bottom=least)
        if len(curves) > 1 or band:
            ends = [(name, _end(values), colour) for name, colour, values in curves]
            if band:
                ends.append((band[0], (_end(band[1]) + _end(band[2])) / 2, style.FAINT))
            _label(axes, ends)

    return chart(title, unit, draw)


def bands(
    title: str,
    unit: str,
    groups: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
    said: str = "",
    most: float | None = None,
) -> str:
    """groups: (name, colour, hours, [ranks, hours]). Draws the mean over ranks, and each rank or a band over all."""
    end = max(float(hours[-1]) for _, _, hours, _ in groups)
    factor, word = (60, "minutes") if end < 2 else (1, "hours")
    factor, word = (3600, "seconds") if end < 1 / 20 else (factor, word)

    def draw(axes: Any) -> str:
        for _, colour, hours, rows in groups:
            x = hours * factor
            if len(rows) > _EACH:
                axes.fill_between(
                    x, np.nanmin(rows, 0), np.nanmax(rows, 0), color=colour, alpha=0.2, linewidth=0
                )
            elif len(rows) > 1:
                axes.plot(x, rows.T, color=colour, linewidth=0.7, alpha=0.45)
            marks = {"marker": "o", "markersize": 3} if len(x) < _FEW else {}
            axes.plot(x, np.nanmean(rows, 0), color=colour, linewidth=1.8, **marks)
        axes.set_xlabel(f"{word} since the start")
        axes.set_ylim(0, most)
        axes.margins(x=0.02)
        _label(axes, [(name, _end(np.nanmean(rows, 0)), colour) for name, colour, _, rows in groups])
        return said

    return chart(title, unit, draw)


def stacked(
    title: str,
    unit: str,
    x: np.ndarray,
    parts: Sequence[tuple[str, str, np.ndarray]],
    label: str,
    said: str | None = None,
    wide: bool = False,
    most: float | None = None,
) -> str:
    """parts: (name, colour, values over x), from bottom to top."""

    def draw(axes: Any) -> str | None:
        edges = _edges(x)
        bottom = np.zeros(len(x))
        for name, colour, values in parts:
            top = bottom + np.nan_to_num(values)
            axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=name)
            bottom = top
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, most)
        axes.set_xlabel(label)
        if label == "iteration":
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(axes)
        return said

    return chart(title, unit, draw, wide)


def heat(
    title: str, unit: str, x: np.ndarray, counts: np.ndarray, low: float, per_octave: int, mean: np.ndarray
) -> str:
    """counts: [bins, len(x)] tokens. A bin is 1 / per_octave octave wide; the first begins at 2^low. mean: a line,
    which the unit explains.
    """

    def draw(axes: Any) -> str:
        share = 100 * counts / np.maximum(1.0, counts.sum(axis=0))
        full = np.flatnonzero(counts.any(axis=1))
        first, last = max(0, full[0] - 2), min(len(counts), full[-1] + 3)
        edges = _edges(x)
        extent = (edges[0], edges[-1], low + first / per_octave, low + last / per_octave)
        found = np.ma.masked_equal(share[first:last], 0.0)
        least = max(1e-3, float(found.min()))
        norm = LogNorm(least, max(float(found.max()), 1.01 * least))
        image = axes.imshow(
            found,
            origin="lower",
            extent=extent,
            aspect="auto",
            cmap=_HEAT,
            norm=norm,
            interpolation="nearest",
        )
        with np.errstate(divide="ignore"):
            axes.plot(x, np.log2(mean), color=style.STUDENT, linewidth=1.8)
        octaves = np.arange(np.ceil(extent[2]), np.floor(extent[3]) + 1)
        axes.yaxis.set_major_locator(FixedLocator(octaves))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda octave, _: f"{2.0**octave:g}"))
        axes.set_ylim(extent[2:])
        axes.set_ylabel("weight")
        axes.grid(False)
        _iterations(axes)
        axes.set_xlim(edges[0], edges[-1])
        bar = axes.figure.colorbar(image, ax=axes, pad=0.015, aspect=16)
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        bar.ax.minorticks_off()

    return chart(title, unit, draw, wide=True)


def _iterations(axes: Any) -> None:
    axes.set_xlabel("iteration")
    low, high = axes.get_xlim()
    if high - low < 1:  # a single iteration: show the neighbouring ticks too
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)


def _label(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    style.label_ends(
        axes,
        [(style.wrapped(name, _LABEL), value, colour) for name, value, colour in ends if not np.isnan(value)],
    )


def _end(values: np.ndarray) -> float:
    """The last value that is a number."""
    found = values[~np.isnan(values)]
    return float(found[-1]) if len(found) else float("nan")


def _legend(axes: Any) -> None:
    """Above the chart, where it covers nothing: parts may be too thin for labels. The figure grows by its rows."""
    handles, names = axes.get_legend_handles_labels()
    figure = axes.figure
    width, height = figure.get_size_inches()
    columns = len(handles)
    while columns > 1 and columns * (0.35 + 0.085 * max(map(len, names))) > width - 0.6:
        columns -= 1
    figure.set_size_inches(width, height + _LEGEND_ROW * (-(-len(handles) // columns) - 1))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _edges(x: np.ndarray) -> np.ndarray:
    """The interval of each point, from the previous point to this one."""
    first = x[0] - (x[1] - x[0] if len(x) > 1 else 1.0)
    return np.concatenate([[first], x])


def _cleaned(svg: str, label: str) -> str:
    """The <svg> element alone, without unused parts, with the colours of the page and a label for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Shortens numbers in attributes, not in text.
    svg = re.sub(r'"[^"]*"', lambda quoted: re.sub(r"(\d+\.\d\d)\d+", r"\1", quoted[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page sets its own font
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = style.with_variables(svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
