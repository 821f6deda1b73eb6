"""The benchmark of a cache, small: it measures every payload, and what it reads is what was written."""

from __future__ import annotations

import json

import pytest
import torch

import cache
from vcrd.cache.files import Cache


@pytest.mark.parametrize(
    ("payload", "size"), [("float16", 2 * 80), ("topk", 64 * 8 + 4), ("hidden", 2 * 4096)]
)
def test_it_measures_reading_and_steps(payload, size, tmp_path):
    sizes = {"vocab": 80, "tokens": 8, "hidden": 4, "repeats": 2, "blocks": 1, "steps": 2}
    given = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    threads = torch.get_num_threads()
    try:
        path = tmp_path / "found.json"
        assert cache.main(["--payload", payload, "--folder", str(tmp_path), "--json", str(path), *given]) == 0
    finally:
        torch.set_num_threads(threads)
    (found,) = json.loads(path.read_text()).values()
    assert found["bytes_per_token"] == size
    assert all(number > 0 for number in found.values())
    assert found["least_ratio"] <= found["ratio"] <= found["largest_ratio"]


def test_its_cache_has_an_answer_to_each_micro_batch(tmp_path):
    bench = cache.Bench(tmp_path, "logits_8bit", 80, 8)
    assert len(list(Cache(tmp_path).keys())) == len(bench.batches) == cache.SEQUENCES
