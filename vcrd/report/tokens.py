"""A run's own text, every token coloured by its weight: what `tokens.json` in its folder holds."""

from __future__ import annotations

import html
from typing import Any

_LOW, _HIGH = (221, 122, 43), (59, 111, 182)  # the student the more valid, the teacher
_SHOWN = 2  # samples: a page is no data set


def colour(part: float) -> str:
    """part: from 0, the smallest weight, to 1, the largest; white in the middle, where distillation is plain."""
    end = _LOW if part < 0.5 else _HIGH
    strength = 0.68 * abs(2 * min(1.0, max(0.0, part)) - 1) ** 0.8
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in end)


def scale() -> str:
    return f"linear-gradient(90deg, {', '.join(colour(step / 20) for step in range(21))})"


def section(content: dict[str, Any]) -> str:
    """content: floor, ceiling: weights; samples: [{name, text, stages: {stage: [[token's text, weight], ..]}}, ..]."""
    low, high = content["floor"], content["ceiling"]
    parts = [
        "<h2>Where the teacher pulls</h2>",
        '<p class="soft">Solutions that were held out of the training, as they were written. Blue: a large weight, '
        "for the teacher is the more valid one. Orange: a small one, for the student is. White: as in plain "
        "distillation.</p>",
        '<section class="card"><div class="scale"></div><div class="ends">',
        f"<span>weight {low:g}</span><span>{(low + high) / 2:g}</span><span>{high:g}</span></div>",
    ]
    for sample in content["samples"][:_SHOWN]:
        name, text = html.escape(sample["name"]), html.escape(sample["text"])
        parts.append(f'<p class="question"><b>{name}</b>{text}</p>')
        for stage, rows in sample["stages"].items():
            mean = sum(weight for _, weight in rows) / max(1, len(rows))
            parts.append(f"<h3>{html.escape(stage)} <span>mean weight {mean:.2f}</span></h3>")
            spans = "".join(_span(text, weight, low, high) for text, weight in rows)
            parts.append(f'<div class="tokens">{spans}</div>')
    return "\n".join([*parts, "</section>"])


def _span(text: str, weight: float, low: float, high: float) -> str:
    part = 0.5 if high == low else (weight - low) / (high - low)
    shown = html.escape(text)
    return f'<span style="background:{colour(part)}" title="weight {weight:.2f}">{shown}</span>'
