"""The benchmark of the fused head (loss.py --head) with small sizes: its measurements and comparisons."""

from __future__ import annotations

import json

import pytest
import torch

import head
import head_device
import loss

TOKENS, VOCAB = 1024, 8192


def test_limits_compare_the_fused_head_with_stored_logits():
    stored = {"seconds": [1.0, 2.0, 9.0], "extra_bytes": 800, "error": 0.0}
    fused = {"seconds": [2.2, 0.1, 3.0], "extra_bytes": 100, "error": 2e-5}
    found = list(head.verdicts({head.STORED: stored, head.FUSED: fused}).values())
    assert found == [(1.1, True), (0.125, True), (2e-5, False)]


@pytest.mark.parametrize("teacher", ["dense", "hidden"])
def test_the_parent_reads_the_memory_and_results_equal_those_of_stored_logits(teacher, tmp_path):
    record = tmp_path / "folder" / "head.json"
    command = ["--head", "--shapes", f"{TOKENS}x{VOCAB}", "--hidden", "16", "--chunk-mib", "1"]
    command += ["--teacher", teacher, "--repeats", "1", "--threads", "1", "--json", str(record)]
    assert head.run(loss.parse(command)) in (0, 1)  # depends on time, which a test does not check
    (case,) = json.loads(record.read_text())["cases"]
    assert case["case"]["teacher"] == teacher
    logits = 4 * TOKENS * VOCAB
    extra = {name: result["extra_bytes"] for name, result in case["results"].items()}
    assert extra[head.STORED] > 0.9 * logits, "the parent saw the logits"
    assert max(extra[head.FUSED], extra[head.AGAIN]) < logits / 2, extra
    for result in case["results"].values():
        assert result["error"] <= head.LARGEST_ERROR and len(result["seconds"]) == 1


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_device_part_compares_with_float64(tmp_path, capsys, one_thread, dtype):
    path = tmp_path / "folder" / "head.json"
    command = ["--head", "--device", "cuda", "--shapes", "64x515", "--hidden", "16", "--repeats", "2"]
    cases = head.cases(loss.parse([*command, "--chunk-mib", "0.05"]))
    assert [case.teacher for case in cases] == ["dense", "hidden"]
    assert head_device.run(cases, "cpu", [dtype], {"device": "test"}, path) == 0
    assert "fused / stored: time " in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert [record["case"]["dtype"] for record in written["cases"]] == [dtype] * 2 and not written["wrong"]
    for record in written["cases"]:
        assert set(record["results"]) == {head.STORED, head.FUSED, head.AGAIN}
        for name, result in record["results"].items():
            assert len(result["seconds"]) == 2
            assert set(result["errors"]) == {"loss", "hidden_gradient", "weight_gradient"}
            most = (
                4e-3 if dtype == "bfloat16" and name != head.STORED else 1e-5 if dtype == "float32" else 0.05
            )
            assert 0 < result["error"] < most, (name, result)


def test_a_wrong_gradient_of_the_fused_head_fails_on_the_device(tmp_path, capsys, monkeypatch, one_thread):
    ours = head.methods

    def methods(case, inputs):
        ready = ours(case, inputs)

        def wrong(mask=None):
            loss, of_hidden, of_weight = ready[head.FUSED](mask)
            return loss, of_hidden, 1.1 * of_weight

        def too_large(mask=None):
            raise torch.OutOfMemoryError("no")

        return {**ready, head.STORED: too_large, head.FUSED: wrong}

    monkeypatch.setattr(head_device, "methods", methods)
    case = head.HeadCase(32, 100, 8, "dense", 1, 1, None)
    assert head_device.run([case], "cpu", ["float32"], {}, None) == 1
    printed = capsys.readouterr()
    assert "WRONG RESULT: [32, 100] 8 dense float32, fused: error 1.0e-01" in printed.err
    assert "stored out of memory" in printed.out and "fused / stored" not in printed.out


def test_a_measurement_that_crashes_is_an_error():
    with pytest.raises(RuntimeError, match="the measurement of HeadCase.* failed"):
        head.in_a_process(head.HeadCase(4, 8, -1, "dense", 1, 1, None))
