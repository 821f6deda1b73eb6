"""The fused head's benchmark on a small size: what loss.py --head measures, and which bars it compares with."""

from __future__ import annotations

import json

import pytest

import head
import loss

TOKENS, VOCAB = 1024, 8192


def test_bars_compare_the_fused_head_with_stored_logits():
    stored = {"seconds": [1.0, 2.0, 9.0], "extra_bytes": 800, "error": 0.0}
    fused = {"seconds": [2.2, 0.1, 3.0], "extra_bytes": 100, "error": 2e-5}
    found = list(head.verdicts({head.STORED: stored, head.FUSED: fused}).values())
    assert found == [(1.1, True), (0.125, True), (2e-5, False)]


@pytest.mark.parametrize("teacher", ["dense", "hidden"])
def test_memory_is_read_from_outside_and_results_are_those_of_stored_logits(teacher, tmp_path):
    record = tmp_path / "folder" / "head.json"
    command = ["--head", "--shapes", f"{TOKENS}x{VOCAB}", "--hidden", "16", "--chunk-mib", "1"]
    command += ["--teacher", teacher, "--repeats", "1", "--threads", "1", "--json", str(record)]
    assert head.run(loss.parse(command)) in (0, 1)  # by time as well, of which a test says nothing
    (case,) = json.loads(record.read_text())["cases"]
    assert case["case"]["teacher"] == teacher
    logits = 4 * TOKENS * VOCAB
    extra = {name: result["extra_bytes"] for name, result in case["results"].items()}
    assert extra[head.STORED] > 0.9 * logits, "the parent saw the logits"
    assert max(extra[head.FUSED], extra[head.AGAIN]) < logits / 2, extra
    for result in case["results"].values():
        assert result["error"] <= head.LARGEST_ERROR and len(result["seconds"]) == 1


def test_it_is_refused_on_a_gpu(capsys):
    with pytest.raises(SystemExit):
        loss.parse(["--head", "--device", "cuda"])
    assert "--head is measured on cpu, got --device cuda" in capsys.readouterr().err


def test_a_measurement_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="the measurement of HeadCase.* failed"):
        head.in_a_process(head.HeadCase(4, 8, -1, "dense", 1, 1, None))
