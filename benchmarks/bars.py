"""Draws docs/images/performance.svg from docs/performance/loss-h100.json: time and extra memory of the losses.

    python benchmarks/bars.py

Needs matplotlib. The labels are the numbers of the table in docs/performance.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that was only built in place

from vcrd.report import style

ROOT = Path(__file__).resolve().parent.parent
MEASURED, PICTURE = ROOT / "docs/performance/loss-h100.json", ROOT / "docs/images/performance.svg"
TOKENS, COLUMNS = 4096, 131072
# Names of the record, and what the picture says.
SHOWN = (
    ("vcrd", "vcrd", "KL divergence, teacher to student"),
    ("compiled KL", "compiled KL", "the same, by torch.compile"),
    ("Megatron CE", "Megatron's cross-entropy", "of hard labels, no teacher"),
    ("Liger KL", "Liger KL", "KL divergence"),
    ("ModelOpt", "ModelOpt", "KL divergence"),
)
_HEIGHT = 0.42  # height of a bar; two bars are 1 apart
_INSIDE = 4.0  # ms; shorter parts have no label


def derived() -> dict[str, dict[str, float]]:
    """The figures of each loss at [TOKENS, COLUMNS]."""
    for case in json.loads(MEASURED.read_text())["cases"]:
        if (case["case"]["tokens"], case["case"]["columns"]) == (TOKENS, COLUMNS):
            return case["derived"]
    raise ValueError(f"{MEASURED}: expected a case of [{TOKENS}, {COLUMNS}], got none")


def total(figures: dict[str, float]) -> str:
    """The label at the end of a bar."""
    extra = round(figures["extra_gradients"])
    return f"{figures['forward_backward_ms']:.3g} ms, {extra} {'gradient' if extra == 1 else 'gradients'}"


def draw(path: Path) -> None:
    figures = derived()
    with rc_context(style.RC):
        figure = Figure(figsize=(style.WIDTH, 4.6), layout="constrained")
        axes = figure.subplots()
        for place, (name, title, what) in enumerate(SHOWN):
            _draw_bar(axes, place, figures[name], style.GREEN if name == "vcrd" else style.SOFT)
            line = axes.annotate(title, (0, place - 0.28), va="bottom", weight="bold")
            axes.annotate(
                *(what, (1, 0), (7, 0)),
                xycoords=line,
                textcoords="offset points",
                va="bottom",
                color=style.SOFT,
            )
        longest = max(figures[name]["forward_backward_ms"] for name, *_ in SHOWN)
        axes.set(xlim=(0, 1.45 * longest), ylim=(len(SHOWN) - 0.5, -0.75))
        axes.set_xlabel(
            "milliseconds; dark: forward, light: backward\ngradients: memory beyond the logits, 1 GiB each"
        )
        axes.set_xticks(range(0, int(longest) + 1, 5))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.set_title(f"Forward and backward, [{TOKENS}, {COLUMNS}] bfloat16, one H100")
        style.save(figure, path)


def _draw_bar(axes: Any, place: int, figures: dict[str, float], colour: str) -> None:
    forward, both = figures["forward_ms"], figures["forward_backward_ms"]
    for left, width, alpha, ink in (
        (0, forward, 1.0, style.PAPER),
        (forward, both - forward, 0.45, style.INK),
    ):
        axes.barh(place, width, _HEIGHT, left, color=colour, alpha=alpha, linewidth=0)
        if width > _INSIDE:
            axes.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", color=ink)
    axes.annotate(total(figures), (both, place), (6, 0), textcoords="offset points", va="center")


if __name__ == "__main__":
    draw(PICTURE)
