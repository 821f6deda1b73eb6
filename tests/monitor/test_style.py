"""The colours of pictures and pages can be read, and labels do not overlap."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from vcrd.report import style

ROOT = Path(__file__).parents[2]


def contrast(one: str, other: str) -> float:
    """The contrast of WCAG 2.2, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_of_known_colours():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colour", sorted({style.INK, style.SOFT, *style.TEXT.values()}))
def test_text_can_be_read_on_light_and_on_dark_pages(colour):
    page, card = "#f6f7f9", style.PAPER
    for ground in (page, card):
        assert contrast(colour, ground) >= 4.5
        assert contrast(style.on_dark(colour), style.on_dark(ground)) >= 4.5


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_text_can_be_read_on_the_strongest_background_of_a_token(part):
    *channels, strength = map(float, re.findall(r"[0-9.]+", style.token_background(part)))
    for ink, ground in (
        (style.INK, style.PAPER),
        (style.on_dark(style.INK), style.on_dark(style.PAPER)),
    ):
        below = [int(ground[place : place + 2], 16) for place in (1, 3, 5)]
        mixed = [round(strength * a + (1 - strength) * b) for a, b in zip(channels, below, strict=True)]
        assert contrast(ink, "#" + "".join(f"{part:02x}" for part in mixed)) >= 4.5


def test_every_colour_of_a_chart_is_a_variable_of_the_page():
    shown = style.with_variables(
        f'<text style="fill: {style.TEXT[style.TEACHER]}"/><path style="fill: #123456"/>'
    )
    assert shown == '<text style="fill: var(--teacher-text)"/><path style="fill: #123456"/>'
    css = style.css()
    light, dark = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media"))
    assert set(light) == set(dark) and light["teacher"] == style.TEACHER
    for page in ("vcrd/report/page.html", "examples/demo/page.html"):
        text = (ROOT / page).read_text()
        assert set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) <= set(light)
        assert not re.search(r"#[0-9a-f]{3,6}[;\s]", text), "a colour that does not change on a dark page"


@pytest.mark.parametrize(
    ("wanted", "heights", "places"),
    [
        ([], [], []),
        ([0.5], [0.1], [0.5]),
        ([0.2, 0.8], [0.1, 0.1], [0.2, 0.8]),
        ([0.5, 0.5], [0.1, 0.1], [0.45, 0.55]),
        ([0.5, 0.5, 0.9], [0.1, 0.3, 0.1], [0.4, 0.6, 0.9]),
        ([-0.2, 0.1, 0.5], [0.2, 0.2, 0.2], [0.1, 0.3, 0.5]),
        ([0.5, 0.52, 0.54], [0.1, 0.1, 0.1], [0.42, 0.52, 0.62]),
    ],
)
def test_labels_are_moved_apart_as_little_as_possible(wanted, heights, places):
    found = style.spread(wanted, heights)
    assert found == pytest.approx(places)
    for (low, high), (below, above) in zip(
        itertools.pairwise(found), itertools.pairwise(heights), strict=True
    ):
        assert high - low >= (below + above) / 2 - 1e-9


def test_a_saved_picture_is_the_same_each_time_and_names_fonts_of_a_browser(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    for name in ("a.svg", "b.svg"):
        with matplotlib.rc_context(style.RC):
            figure = Figure(figsize=(3, 2), layout="constrained")
            axes = figure.subplots()
            axes.plot([0, 1], [0, 1], color=style.TEACHER)
            axes.plot([0, 1], [0, 1.05], color=style.STUDENT)
            style.label_ends(axes, [("teacher", 1.0, style.TEACHER), ("student", 1.05, style.STUDENT)])
            style.save(figure, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    fonts = set(re.findall(r"font: [^;\"]*|font-family: [^;\"]*", text))
    assert fonts and all("sans-serif" in font and font.count("sans-serif") == 1 for font in fonts)
    assert ">teacher<" in text and ">student<" in text
    bottom, top = (axes.texts[number].get_position()[1] for number in (0, 1))
    assert top - bottom >= 0.08, "the labels do not overlap"
