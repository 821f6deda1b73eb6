"""The plan's price of a cache equals files on disk."""

from __future__ import annotations

import json

import pytest
import torch
from scenarios import TEACHER, scenario

from vcrd.__main__ import main
from vcrd.cache import fill
from vcrd.cache.files import CacheHeader, CacheWriter
from vcrd.link.handshake import Head
from vcrd.link.payload import PAYLOADS, payload_named
from vcrd.link.plan import Shard, Span
from vcrd.plan import disk
from vcrd.plan.costs import costs

SEQUENCE, SEQUENCES = 100, 7


@pytest.mark.parametrize("name", [payload.name for payload in PAYLOADS])
@pytest.mark.parametrize("limit", [256 << 20, 300_000])
def test_bytes_and_files_are_those_on_disk(name, limit, tmp_path, monkeypatch):
    """Exactly, but for the headers of the files, of which each takes at most a kilobyte."""
    monkeypatch.setattr(disk, "FILE_BYTES", limit)
    head = Head(TEACHER.hidden, "bfloat16") if name == "hidden" else None
    top_k = 10 if name == "topk" else 0
    header = CacheHeader(name, TEACHER.vocab, top_k, head, "a" * 16)
    payload, whole = header.content(), Shard(0, TEACHER.vocab)
    with CacheWriter(tmp_path, header, limit) as writer:
        if head:
            writer.add_head(torch.zeros(TEACHER.vocab, head.size, dtype=torch.bfloat16), whole)
            writer.flush()
        for number in range(SEQUENCES):
            tensors = [t.squeeze(1) for t in payload.blank(SEQUENCE, 1, TEACHER.vocab, empty=torch.zeros)]
            writer.add(number.to_bytes(32, "big"), tensors, Span(0, SEQUENCE), SEQUENCE, whole)
    found = [path.stat().st_size for path in tmp_path.glob("answers-*")]
    planned = scenario(cache_tokens=SEQUENCES * SEQUENCE, batch=1, sequence=SEQUENCE)
    price = next(each for each in disk.stored(planned) if each.payload == name)
    assert price.files == len(found)
    assert 0 <= price.total_bytes - sum(found) < disk.HEADER_BYTES * len(found)
    assert price.sequence_bytes == sum(tensor.nbytes for tensor in tensors) + disk.INDEX_BYTES


def test_by_hand():
    """Two data ranks of 3 micro-batches of 200 tokens; the loss of 8 bits takes 0.1 us for 200 x 1000 bytes, twice."""
    planned = scenario(student_data=2, cache_tokens=10_050, disk=1e9)
    got = {each.payload: each for each in disk.stored(planned)}
    assert {name: each.token_bytes for name, each in got.items()} == {
        "float16": 2000,
        "float32": 4000,
        "logits_8bit": 1000,
        "topk": 84,
        "hidden": 1024,
    }
    eight = got["logits_8bit"]
    assert eight.sequence_bytes == 100 * 1000 + 56
    assert eight.total_bytes == 101 * 100_056 + 1024 and eight.files == 1  # 10050 tokens are 101 sequences
    assert eight.step_bytes == 2 * 3 * 200 * 1000
    assert eight.read_seconds == pytest.approx(1.2e-3)
    assert eight.step_seconds == pytest.approx(3 * (3 * 4_204_800 * 200 / 0.25e15 + 2 * 200_000 / 4e12))
    assert eight.disk_share == pytest.approx(eight.read_seconds / eight.step_seconds)
    assert eight.fill_gpu_seconds == pytest.approx(20_614_400 * 10_050 / 0.5e15)
    assert got["hidden"].total_bytes == 101 * (102_400 + 56) + 1024 + 1000 * 1024 + 56 + 1024
    assert got["hidden"].files == 2


def test_constants_equal_those_of_the_writer():
    assert disk.FILE_BYTES == fill.FILE_BYTES


def test_teachers_are_idle_where_they_wait_or_have_bubbles():
    """tp 2 x pp 2 in 3 replicas for 4 data ranks: two of them have one, one has two."""
    for changes in (
        dict(teacher_tensor=2, teacher_pipeline=2, student_data=4, replicas=3, network=1e15),
        dict(student_data=1, network=1e6),
    ):
        for cost in costs(scenario(**changes)):
            flops = 20_614_400 - (2 * 1000 * 512 if cost.payload == "hidden" else 0)
            gpus = cost.replicas * changes.get("teacher_tensor", 1) * changes.get("teacher_pipeline", 1)
            busy = changes["student_data"] * flops * 200 / 0.5e15
            assert cost.idle == pytest.approx(1 - busy / (gpus * cost.round_seconds)) and 0 < cost.idle < 1


def test_the_command_prices_a_cache(capsys):
    options = ["plan", "--teacher", "Qwen3-32B,tp=8", "--student", "Qwen3-4B,tp=2,dp=8", "--cache", "1e9"]
    assert main([*options, "--disk", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["cache"]
    assert values["topk"]["token_bytes"] == 516 and values["logits_8bit"]["token_bytes"] == 151_936
    assert payload_named("topk").sized(top_k=64).bytes(1, 151_936) == 516
    assert values["topk"]["read_seconds"] == pytest.approx(64 * 4096 * 516 / 4e9)
    assert main(options) == 0
    text = capsys.readouterr().out
    assert (
        "about 1,000,000,000 tokens" in text and "516 GB" in text and max(map(len, text.splitlines())) <= 120
    )
    assert main(options[:-2]) == 0
    assert "A cache" not in capsys.readouterr().out
