"""The arithmetic verifier compared with brute force, and samples from a JSONL file to Megatron's keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from examples.verified import arithmetic
from examples.verified.arithmetic import SYMBOLS, Chain, correct_next, decode, encode, verifier
from examples.verified.dataset import Samples, provider, write_samples

ROOT = Path(__file__).resolve().parents[2]


def all_responses(value: int, operations: list[tuple[str, int]]) -> list[str]:
    """Every correct response, from Python's arithmetic."""
    if not operations:
        return ["."]
    found = []
    for count in range(1, len(operations) + 1):
        text, result = str(value), value
        for sign, number in operations[:count]:
            text += f"{sign}{number}"
            result = eval(f"({result}){sign}{number}")
        steps = {f"{text}={result};"}
        sign, number = operations[0]
        if count == 1 and sign in "+*":
            steps.add(f"{number}{sign}{value}={result};")
        found += [step + rest for step in steps for rest in all_responses(result, operations[count:])]
    return found


@pytest.mark.parametrize("operations", [0, 1, 2, 3])
def test_the_verifier_finds_every_correct_next_token_and_no_other(operations):
    generator = torch.Generator().manual_seed(operations)
    for _ in range(12):
        chain = Chain.draw(generator, operations)
        assert Chain.parse(chain.prompt) == chain
        responses = all_responses(chain.start, list(chain.operations))
        prefixes = {text[:length] for text in responses for length in range(len(text) + 1)}
        wrong = {prefix[:-1] + other for prefix in list(prefixes)[:40] if prefix for other in "0=;.*-_?"}
        for prefix in prefixes | wrong:
            expected = {text[len(prefix)] for text in responses if text.startswith(prefix) and text != prefix}
            assert correct_next(chain.prompt, prefix) == expected, (chain.prompt, prefix)


def test_verdicts_of_rows_equal_those_of_each_prefix_where_there_is_an_action():
    generator = torch.Generator().manual_seed(3)
    texts = ["7+5-3*2?7+5=12;12-3=9;", "1-4?1-4=-2;.", "9+9?9+9=18;."]
    length = max(map(len, texts))
    tokens = torch.tensor([encode(text.ljust(length, "_")) for text in texts])
    actions = torch.randint(-1, len(SYMBOLS), (2, *tokens.shape), generator=generator)
    # Right proposals, so that both verdicts occur.
    actions[0, :, :-1] = tokens[:, 1:]
    found = verifier(tokens, *actions)
    seen = set()
    for who, validity in zip(actions, found, strict=True):
        for row, text in enumerate(map(decode, tokens.tolist())):
            question = text.index("?") + 1
            for position in range(length):
                action = int(who[row, position])
                if action < 0 or position + 1 < question:
                    expected = 1.0
                else:
                    right = correct_next(text[:question], text[question : position + 1])
                    expected = float(SYMBOLS[action] in right)
                assert validity[row, position] == expected
                seen.add(expected)
    assert seen == {0.0, 1.0}
    for text in ("7+5", "7++5?", "?", "a?", "7+5??"):
        with pytest.raises(ValueError, match="prompt: expected a chain such as"):
            Chain.parse(text)


def sample(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    prompt, number = 1 + seed % 4, 1 + seed % 6
    return {
        "prompt": torch.randint(1, 90, (prompt,), generator=generator).tolist(),
        "tokens": torch.randint(1, 90, (number,), generator=generator).tolist(),
        "steps": torch.randint(-1, 3, (number,), generator=generator).tolist(),
        "student_validity": torch.rand(number, generator=generator).tolist(),
        "teacher_validity": torch.rand(number, generator=generator).tolist(),
        "note": "é, and anything else",
    }


def test_samples_become_megatrons_keys(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_samples(path, map(sample, range(9)))
    data = Samples(path, 8, padding=99, attention_mask=True)
    assert len(data) == 9
    for number in range(9):
        written, item = sample(number), data[number]
        sequence = (written["prompt"] + written["tokens"])[:9]
        rows = {key: value.tolist() for key, value in item.items()}
        assert rows["tokens"] == (sequence + [99] * 9)[:8]
        assert rows["labels"] == (sequence[1:] + [99] * 9)[:8]
        assert rows["position_ids"] == list(range(8))
        for position in range(8):
            entry = position + 1 - len(written["prompt"])
            spoken = 0 <= entry < len(written["tokens"])
            assert rows["loss_mask"][position] == spoken
            assert rows["vcrd_steps"][position] == (written["steps"][entry] if spoken else -1)
            for name in ("student_validity", "teacher_validity"):
                expected = written[name][entry] if spoken else 1.0
                assert rows[f"vcrd_{name}"][position] == pytest.approx(expected)
    mask = data[0]["attention_mask"]
    assert (
        mask.shape == (1, 8, 8)
        and mask.dtype == torch.bool
        and mask[0, 2].tolist() == [False] * 3 + [True] * 5
    )
    with pytest.raises(IndexError):
        data[9]
    plain = Samples(path, 8, steps=False, scores=False)
    assert set(plain[0]) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert int(Samples(path, 4)[5]["loss_mask"].sum()) == 3, "two tokens of prompt, five of which three fit"


def test_a_longer_data_set_repeats_the_file_in_another_order(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_samples(path, map(sample, range(7)))
    data = Samples(path, 12, samples=20, seed=5)
    loader = DataLoader(data, batch_size=4, num_workers=2)
    tokens = [tuple(row) for batch in loader for row in batch["tokens"].tolist()]
    once = [tuple(item["tokens"].tolist()) for item in Samples(path, 12)]
    assert sorted(tokens[:7]) == sorted(tokens[7:14]) == sorted(once)
    assert tokens[:7] != tokens[7:14] and tokens[:7] != once
    again = Samples(path, 12, samples=20, seed=5)
    assert [tuple(again[i]["tokens"].tolist()) for i in (19, 0, 8)] == [tokens[i] for i in (19, 0, 8)]


def test_the_index_is_used_again_and_rebuilt_after_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl"
    write_samples(path, map(sample, range(5)))
    first = Samples(path, 12)
    read = []
    monkeypatch.setattr(Samples, "_parse", lambda self, text, line: read.append(line) or json.loads(text))
    assert torch.equal(Samples(path, 12)[4]["tokens"], first[4]["tokens"])
    assert set(read) == {5}, "only the requested line"
    write_samples(path, map(sample, range(6)))
    assert len(Samples(path, 12)) == 6
    index = tmp_path / "samples.jsonl.index"
    for broken in (b"", b"short", index.read_bytes()[:-8]):
        index.write_bytes(broken)
        assert len(Samples(path, 12)) == 6
    assert sorted(os.listdir(tmp_path)) == ["samples.jsonl", "samples.jsonl.index"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("{", "line 3: expected a JSON object, got another text"),
        ("[1]", "line 3: expected a JSON object, got list"),
        ({"prompt": []}, r"line 3: prompt: expected a list of at least one token id, got \[\]"),
        ({"tokens": ["a"]}, r"line 3: tokens: expected a list of at least one token id, got \['a'\]"),
        ({"tokens": [1, 100]}, "line 3: tokens: expected token ids from 0 to 99, got 100"),
        ({"tokens": [1, -2]}, "line 3: tokens: expected token ids from 0 to 99, got -2"),
        ({"prompt": [1] * 13}, "line 3: prompt: expected at most 12 tokens, so that one follows, got 13"),
        ({"steps": [0]}, r"line 3: steps: expected 3 integers, one for each of the tokens, got 1: \[0\]"),
        ({"steps": [0, 1, -2]}, "line 3: steps: expected values from -1 to 2147483647, got -2"),
        ({"student_validity": None}, "line 3: student_validity: expected 3 numbers, .* got None"),
        ({"teacher_validity": [0, 1, 1.5]}, "line 3: teacher_validity: expected values from 0 to 1, got 1.5"),
        ({"teacher_validity": [0, 1, float("nan")]}, "line 3: teacher_validity: .* got nan"),
    ],
)
def test_a_bad_line_is_an_error_with_file_and_line(tmp_path, change, sentence):
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps(sample(2)) for _ in range(4)]
    lines[2] = change if isinstance(change, str) else json.dumps({**sample(2), **change})
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"samples.jsonl, {sentence}") as error:
        Samples(path, 12, vocab_size=100)
    assert "\n" not in str(error.value)
    path.write_text("")
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        Samples(path, 12)


def test_megatrons_loader_reads_the_samples(tmp_path):
    pytest.importorskip("megatron.training", reason="megatron.training is not in this wheel of megatron-core")
    from types import SimpleNamespace

    from megatron.training import global_vars
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    path = tmp_path / "samples.jsonl"
    write_samples(path, map(sample, range(6)))
    before = global_vars._GLOBAL_ARGS
    global_vars._GLOBAL_ARGS = SimpleNamespace(seq_length=8, seed=3, create_attention_mask_in_dataloader=True)
    try:
        train, valid, test = provider(path, padding=99)((10, 0, 0))
    finally:
        global_vars._GLOBAL_ARGS = before
    assert valid is None and test is None and len(train) == 10
    sampler = MegatronPretrainingSampler(
        total_samples=10, consumed_samples=4, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    )
    batches = list(DataLoader(train, batch_sampler=sampler))
    assert len(batches) == 3
    assert torch.equal(batches[0]["tokens"][0], train[4]["tokens"])
    assert batches[0]["attention_mask"].shape == (2, 1, 8, 8)


def test_the_script_samples_scores_and_learns(tmp_path):
    out = tmp_path / "samples.jsonl"
    arguments = ["--samples", "12", "--warm-up", "30", "--steps", "2", "--batch", "4", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "examples.verified", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert "12 samples, for example" in run.stdout and "step   1: loss" in run.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        prompt, response = decode(line["prompt"]), decode(line["tokens"])
        Chain.parse(prompt)
        assert line["steps"] == arithmetic.step_ids(response)
        assert set(line["student_validity"] + line["teacher_validity"]) <= {0.0, 1.0}
