"""The look of every picture and page: colours, the parameters of matplotlib, and labels at the ends of lines.

The hues are those of Okabe and Ito, which colour-blind people distinguish. Imports no matplotlib.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEACHER, STUDENT = "#0072b2", "#d55e00"
GREEN, PURPLE, ORANGE, SKY = "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
INK, SOFT, FAINT, GRID, PAPER = "#22262b", "#59636e", "#8b959f", "#e3e7ec", "#ffffff"
# Ramps whose parts differ in lightness, the strongest first.
GREYS = ("#3b444d", "#6d7781", "#a1aab3", "#d3d8de")
ORANGES = ("#8a3c00", "#d45f02", "#f0a063", "#f8d5b8")
# Darker shades for text: a contrast of 4.5 to white at least.
TEXT = {
    TEACHER: "#00598c",
    STUDENT: "#a34700",
    GREEN: "#00694d",
    PURPLE: "#8f3d6b",
    ORANGE: "#825900",
    SKY: "#1b6a99",
    FAINT: SOFT,
}
# The variable of a page for each colour, and its value on a dark page.
_VARIABLES = {
    INK: ("ink", "#e8ebee"),
    SOFT: ("soft", "#aab4be"),
    FAINT: ("faint", "#7d8893"),
    GRID: ("line", "#383f47"),
    PAPER: ("card", "#1d2126"),
    "#f6f7f9": ("page", "#131619"),
    "#eef1f5": ("shade", "#2b3138"),
    TEACHER: ("teacher", "#56b4e9"),
    STUDENT: ("student", "#f08a3c"),
    GREEN: ("green", "#2fbf95"),
    PURPLE: ("purple", "#e0a3c5"),
    ORANGE: ("orange", "#f0b73a"),
    SKY: ("sky", "#8fcdf2"),
    TEXT[TEACHER]: ("teacher-text", "#7cc6f2"),
    TEXT[STUDENT]: ("student-text", "#ffa55f"),
    TEXT[GREEN]: ("green-text", "#5ad1ae"),
    TEXT[PURPLE]: ("purple-text", "#e8b7d2"),
    TEXT[ORANGE]: ("orange-text", "#f5c75f"),
    TEXT[SKY]: ("sky-text", "#a9daf6"),
    **{
        light: (f"grey-{number}", dark)
        for number, (light, dark) in enumerate(
            zip(GREYS, ("#dde2e7", "#a3adb7", "#6f7a85", "#48515a"), strict=True)
        )
    },
    **{
        light: (f"orange-{number}", dark)
        for number, (light, dark) in enumerate(
            zip(ORANGES, ("#ffc79b", "#e8813a", "#b0571c", "#713a14"), strict=True)
        )
    },
}
# Inches of a picture on a page of docs/. On a screen of 390 pixels its text has ten pixels.
WIDTH = 5.6
RC = {
    "font.family": "DejaVu Sans",  # matplotlib includes it; it warns of a missing font
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Without the salt the names of the parts of a picture would differ each time.
    "svg.hashsalt": "vcrd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 6),
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
}
_FONTS = "'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif"


def text_colour(colour: str) -> str:
    """The shade of a colour for text."""
    return TEXT.get(colour, colour)


def on_dark(colour: str) -> str:
    """What a colour becomes on a dark page."""
    return _VARIABLES[colour][1]


def css() -> str:
    """The colours of a page as CSS variables, also for a dark page."""
    light = " ".join(f"--{name}: {colour};" for colour, (name, _) in _VARIABLES.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in _VARIABLES.values())
    # The heat map is an image, so its lightness is turned around.
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"  @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} "
        "svg image { filter: invert(1) hue-rotate(180deg); } }"
    )


def with_variables(svg: str) -> str:
    """The picture with the variables of css() in place of colours."""

    def variable(found: re.Match) -> str:
        return f"var(--{_VARIABLES[found[0]][0]})" if found[0] in _VARIABLES else found[0]

    return re.sub(r"#[0-9a-f]{6}\b", variable, svg)


def token_background(part: float) -> str:
    """The colour behind a token. part: from 0 for the smallest weight to 1 for the largest; none in the middle."""
    end = STUDENT if part < 0.5 else TEACHER
    channels = " ".join(str(int(end[place : place + 2], 16)) for place in (1, 3, 5))
    strength = 0.66 * abs(2 * min(1.0, max(0.0, part)) - 1) ** 0.8
    return f"rgb({channels}/{strength:.2f})"


def save(figure: Any, path: Path) -> None:
    """Writes a figure as SVG, the same bytes each time, with fonts that a browser has."""
    figure.savefig(path, metadata={"Date": None})
    if path.suffix == ".svg":
        path.write_text(re.sub(r"'DejaVu Sans'(, [a-z-]+)?", _FONTS, path.read_text()))


def wrapped(text: str, characters: int) -> str:
    return "\n".join(textwrap.wrap(text, characters, break_long_words=False))


def label_ends(axes: Any, labels: Sequence[tuple[str, float, str]], size: float | None = None) -> None:
    """Writes names to the right of the axes, each beside the end of its line.

    labels: (text, value on the y axis, colour of the line). Call it last, because it needs the limits of the axes.
    Labels that would overlap are moved apart.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    points = axes.bbox.height * 72 / figure.dpi
    size = size or axes.xaxis.label.get_size()
    order = sorted(labels, key=lambda label: label[1])
    ends = [axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1] for _, y, _ in order]
    heights = [1.35 * size * (text.count("\n") + 1) / points for text, _, _ in order]
    for (text, _, colour), place in zip(order, spread(ends, heights), strict=True):
        axes.text(
            *(1.02, place, text),
            transform=axes.transAxes,
            color=text_colour(colour),
            va="center",
            fontsize=size,
            linespacing=1.1,
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """The middles of labels that do not overlap, as near to the wanted ones as possible.

    wanted: ascending. None reaches below 0. The least sum of squared moves, by pooling neighbours that are too close.
    """
    between = [(a + b) / 2 for a, b in itertools.pairwise(heights)]
    offsets = list(itertools.accumulate(between, initial=0.0))[: len(wanted)]
    pools: list[list[float]] = []
    for place, offset in zip(wanted, offsets, strict=True):
        pools.append([place - offset])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    middles = [_mean(pool) for pool in pools for _ in pool]
    least = heights[0] / 2 if heights else 0.0
    return [max(least, middle) + offset for middle, offset in zip(middles, offsets, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
