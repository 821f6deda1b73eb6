"""The picture of the page of performance has the numbers of the committed measurement."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bars

ROOT = bars.ROOT


def texts(svg: str) -> list[str]:
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_the_labels_of_the_committed_picture_are_the_measured_times_and_memory():
    figures, shown = bars.derived(), texts(bars.PICTURE.read_text())
    ends = [text for text in shown if " ms, " in text]
    assert ends == [bars.total(figures[name]) for name, *_ in bars.SHOWN]
    assert ends[0] == "1.81 ms, 1 gradient" and ends[-1] == "26.7 ms, 14 gradients"
    for name, title, what in bars.SHOWN:
        assert title in shown and what in shown
        forward = figures[name]["forward_ms"]
        for part in (forward, figures[name]["forward_backward_ms"] - forward):
            assert (f"{part:.3g}" in shown) == (part > bars._INSIDE)


def test_the_page_shows_the_picture_and_its_table_the_same_times():
    page = (ROOT / "docs/performance.md").read_text()
    assert "(images/performance.svg)" in page.split("## GPU")[1]
    (row,) = re.findall(r"^\| 4096 x 131072 \| .*$", page, re.MULTILINE)
    for name, *_ in bars.SHOWN:
        time, _ = bars.total(bars.derived()[name]).split(" ms, ")
        assert re.search(rf"[ *]{re.escape(time)}[ *|]", row), name


def test_it_is_drawn_again_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    bars.draw(tmp_path / "performance.svg")
    assert texts((tmp_path / "performance.svg").read_text()) == texts(bars.PICTURE.read_text())
