"""Answers from a cache are those of the live link, bit for bit."""

from __future__ import annotations

import random

import draw
import pytest
from answers_jobs import draw_case, run

PAYLOADS = ("float16", "float32", "logits_8bit", "topk", "hidden")


def test_every_payload_over_another_layout_and_order_equals_the_live_link(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "MOST_RANKS", 4)
    dice = random.Random(20)
    run([draw_case(dice, payload) for payload in PAYLOADS], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("payload", PAYLOADS)
def test_random_layouts_equal_the_live_link(payload, tmp_path):
    dice = random.Random(f"{payload} 20")
    run([draw_case(dice, payload) for _ in range(6)], tmp_path)
