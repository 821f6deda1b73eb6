"""The files of a cache: what is written comes back bit for bit, in any cut; what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import struct
import threading
from dataclasses import replace

import cache_jobs
import pytest
import torch
from cache_jobs import HEADERS, SMALL, TOKENIZER, VOCABULARY, add, answer, key, read, same, tokens_of
from safetensors import safe_open

from vcrd.cache import files
from vcrd.cache.files import Cache, CacheError, CacheHeader, CacheWriter, key_of
from vcrd.cache.header import VERSION
from vcrd.link.handshake import Handshake, Head
from vcrd.link.plan import Shard, Span
from vcrd.link.question import Context


def random_cuts(draw: random.Random, size: int) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(draw.randrange(size + 1) for _ in range(draw.randrange(4)))})
    return list(zip(edges, edges[1:], strict=False))


@pytest.mark.parametrize("payload", HEADERS)
def test_any_reader_finds_what_any_writers_have_added(tmp_path, payload):
    """Writers with random parts of the rows and columns, readers with random others."""
    draw, header = random.Random(payload), HEADERS[payload]
    whole = header.content().whole
    for number in range(12):
        columns = [(0, VOCABULARY)] if whole else random_cuts(draw, VOCABULARY)
        full = answer(header, number)
        rows = len(full[0])
        pieces = [(r, c) for r in random_cuts(draw, rows) for c in columns]
        draw.shuffle(pieces)
        writers = [
            CacheWriter(tmp_path, header, draw.choice([1, 1 << 20]), f"run {number}") for _ in range(2)
        ]
        for (first, last), (left, right) in pieces:
            part = [t[first:last] if whole else t[first:last, left:right] for t in full]
            draw.choice(writers).add(key(number), part, Span(first, last), rows, Shard(left, right))
        for writer in writers:
            writer.close()
    cache = Cache(tmp_path, header)
    assert sorted(cache.keys()) == sorted(map(key, range(12)))
    for number in range(12):
        full = answer(header, number)
        rows = len(full[0])
        assert cache.rows_of(key(number)) == rows
        for _ in range(5):
            spans = [Span(a, b) for a, b in random_cuts(draw, rows) if draw.random() < 0.7]
            draw.shuffle(spans)
            columns = Shard(*draw.choice([*random_cuts(draw, VOCABULARY), (3, 3)]))
            index = torch.tensor(
                [row for span in spans for row in range(span.start, span.stop)], dtype=torch.int64
            )
            expected = [t[index] if whole else t[index, columns.start : columns.stop] for t in full]
            # Not contiguous, as a row of a micro-batch [s, b, columns].
            out = [torch.empty(len(index), 2, *t.shape[1:], dtype=t.dtype)[:, 1] for t in expected]
            cache.read(key(number), spans, columns, out)
            assert same(out, expected)


def test_a_part_of_an_answer_is_none(tmp_path):
    tensors = answer(SMALL, 4)
    rows = len(tensors[0])
    with CacheWriter(tmp_path, SMALL, 1) as writer:
        cache = Cache(tmp_path, SMALL)
        parts = [(0, 3, 0, 20), (3, rows, 20, VOCABULARY), (0, 3, 15, VOCABULARY), (2, rows, 0, 20)]
        for count, (first, last, left, right) in enumerate(parts, 1):
            assert key(4) not in cache and not list(cache.keys()) and cache.sizes().entries == 0
            with pytest.raises(KeyError, match=key(4).hex()):
                read(cache, 4)
            part = [t[first:last, left:right] for t in tensors]
            writer.add(key(4), part, Span(first, last), rows, Shard(left, right))
            assert key(4) not in cache, "a file is seen after refresh() only"
            assert cache.refresh() == 1 and cache.sizes().files == count
    assert same(read(cache, 4), tensors)


def test_an_answer_is_never_put_together_from_two_runs(tmp_path):
    first, second = answer(SMALL, 0), answer(SMALL, 5)  # two answers to the same question
    second = [t[: len(first[0])] for t in second]
    rows = Span(0, len(first[0]))
    parts = (
        ("1", first, Shard(0, 9)),
        ("2", second, Shard(9, VOCABULARY)),
        ("1", first, Shard(12, VOCABULARY)),
        ("2", second, Shard(0, 9)),
    )
    for count, (run, tensors, columns) in enumerate(parts, 1):
        with CacheWriter(tmp_path, SMALL, run=run) as writer:
            part = [t[:, columns.start : columns.stop] for t in tensors]
            writer.add(key(0), part, rows, rows.stop, columns)
        assert (key(0) in Cache(tmp_path)) == (count == 4)
    assert same(read(Cache(tmp_path), 0), second)


def test_two_writers_of_the_same_answers_do_no_harm(tmp_path):
    writers = [CacheWriter(tmp_path, SMALL) for _ in range(2)]
    for writer in writers:
        for number in (0, 1, 0):  # and a sequence that is there twice is stored once
            add(writer, number)
        writer.close()
        writer.close()
    cache = Cache(tmp_path)
    assert [cache.sizes().entries, cache.sizes().files] == [2, 2]
    assert [len(file.keys) for file in cache.files] == [2, 2]
    assert same(read(cache, 0), answer(SMALL, 0)) and same(read(cache, 1), answer(SMALL, 1))


def test_what_is_there_is_not_written_again(tmp_path):
    cache_jobs.fill(tmp_path, range(0, 6), 2)
    before = sorted(os.listdir(tmp_path))
    cache_jobs.fill(tmp_path, range(0, 6), 2)
    assert sorted(os.listdir(tmp_path)) == before
    cache_jobs.fill(tmp_path, range(4, 9), 2)
    assert sorted(map(key, range(9))) == sorted(k for file in Cache(tmp_path).files for k in file.keys)


def test_a_file_is_written_when_the_limit_is_reached(tmp_path):
    one = sum(t.nbytes for t in answer(SMALL, 0))
    writer = CacheWriter(tmp_path, SMALL, limit_bytes=2 * one + 1)
    for number, written in ((0, 0), (5, 0), (10, 1), (15, 1)):
        tensors = answer(SMALL, 0)
        writer.add(key(number), tensors, Span(0, 3), 3, Shard(0, VOCABULARY))
        assert len(files.answer_names(tmp_path)) == written
        tensors[0].zero_()  # add() copies
    writer.flush()
    cache = Cache(tmp_path)
    assert cache.sizes().entries == 4 and all(same(read(cache, n), answer(SMALL, 0)) for n in (0, 5, 10, 15))


def test_a_piece_that_is_added_again_counts_once(tmp_path):
    """Otherwise the files would become smaller and smaller."""
    one = sum(t.nbytes for t in answer(SMALL, 0))
    writer = CacheWriter(tmp_path, SMALL, limit_bytes=3 * one)
    for numbers, written in (((0, 0, 0, 5), 0), ((10,), 1), ((0, 0, 5), 1), ((10,), 2)):
        for number in numbers:
            add(writer, number)
        assert len(files.answer_names(tmp_path)) == written, numbers
    assert [len(file.keys) for file in Cache(tmp_path).files] == [3, 3]


def test_the_output_layer_is_stored_with_hidden_states(tmp_path):
    header = HEADERS["hidden"]
    weight = torch.randn(VOCABULARY, 5).bfloat16()
    with CacheWriter(tmp_path, header) as writer:
        add(writer, 0)
        writer.add_head(weight[20:], Shard(20, VOCABULARY))
        writer.flush()
        cache = Cache(tmp_path)
        with pytest.raises(CacheError, match="expected one with the output layer of its teacher"):
            cache.head(Shard(0, 4))
        writer.add_head(weight[:20], Shard(0, 20))
    cache = Cache(tmp_path, header)
    assert torch.equal(cache.head(Shard(7, 30)), weight[7:30]) and cache.head(Shard(4, 4)).shape == (0, 5)
    assert list(cache.keys()) == [key(0)] and cache.sizes()[:2] == (1, 3) and cache.sizes().incomplete == 0
    with (
        CacheWriter(tmp_path / "other", SMALL) as writer,
        pytest.raises(ValueError, match="head: expected none"),
    ):
        writer.add_head(weight, Shard(0, VOCABULARY))


def test_nothing_is_stored_for_a_rank_that_holds_only_padding(tmp_path):
    with CacheWriter(tmp_path, SMALL) as writer:
        writer.add(key(0), [torch.empty(3, 0, dtype=torch.float16)], Span(0, 3), 3, Shard(37, 37))
    assert os.listdir(tmp_path) == ["header.json"]


@pytest.mark.parametrize("payload", HEADERS)
def test_the_library_safetensors_reads_the_files(tmp_path, payload):
    header = HEADERS[payload]
    with CacheWriter(tmp_path, header, run="seven") as writer:
        add(writer, 0)
        add(writer, 6)
    (name,) = files.answer_names(tmp_path)
    names = {"topk": ["logprobs", "ids", "log_tail"], "hidden": ["states"]}.get(payload, ["logits"])
    with safe_open(tmp_path / name, framework="pt") as file:
        assert sorted(file.keys()) == sorted(["keys", "rows", *names])
        assert file.get_tensor("keys").numpy().tobytes() == key(0) + key(6)
        assert file.get_tensor("rows").tolist() == [[0, 3, 3], [0, 4, 4]]
        assert same([file.get_slice(n)[3:] for n in names], answer(header, 6))
        metadata = file.metadata()
    header_text = (tmp_path / "header.json").read_bytes()
    assert metadata == {
        "format": "vcrd-answers-1",
        "header": hashlib.sha256(header_text).hexdigest(),
        "run": "seven",
        "columns": f"0:{VOCABULARY}",
        "digest": metadata["digest"],
    }
    data = (tmp_path / name).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    described = json.loads(data[8:start])
    del described["__metadata__"]["digest"]
    hashed = json.dumps(described, sort_keys=True, separators=(",", ":")).encode() + data[start:]
    assert metadata["digest"] == hashlib.sha256(hashed).hexdigest() and start % 64 == 0


def test_more_files_than_are_mapped_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_MAPPED", 3)
    cache_jobs.fill(tmp_path, range(8))
    before = len(os.listdir("/proc/self/fd"))
    cache: Cache | None = Cache(tmp_path)
    wrong = []

    def check(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            number = draw.randrange(8)
            if not same(read(cache, number), answer(SMALL, number)):
                wrong.append(number)

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(os.listdir("/proc/self/fd")) <= before + 3
    cache = None
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_look_for_new_files_while_others_read(tmp_path):
    class Watched(Cache):
        def _opened(self, names):
            assert self._refreshing.locked(), "two threads may add the same file"
            return super()._opened(names)

    cache_jobs.fill(tmp_path, range(2))
    cache, wrong = Watched(tmp_path), []

    def look(turns: int) -> None:
        for _ in range(turns):
            cache.refresh()
            known = [number for number in range(30) if key(number) in cache]
            wrong.extend(number for number in known if not same(read(cache, number), answer(SMALL, number)))
            cache.sizes()

    threads = [threading.Thread(target=look, args=(15,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    cache_jobs.fill(tmp_path, range(2, 30))
    for thread in threads:
        thread.join()
    cache.refresh()
    assert not wrong and sorted(file.path.name for file in cache.files) == files.answer_names(tmp_path)


# The key.


def test_a_key_depends_on_the_tokens_and_the_context_alone():
    tokens = torch.tensor([5, 0, 70_000])
    hashed = b"vcrd answer 1" + struct.pack("<q3iqq", 3, 5, 0, 70_000, 0, 0)
    assert key_of(tokens) == hashlib.sha256(hashed).digest(), "no cache that exists has these keys"
    assert key_of(tokens.to(torch.int32)) == key_of(tokens) == key_of(torch.stack([tokens, tokens], 1)[:, 0])
    hint, places = torch.tensor([1, 2]), torch.tensor([0, 3])
    others = [
        key_of(tokens[:2]),
        key_of(tokens.flip(0)),
        key_of(torch.cat([tokens, torch.tensor([0])])),
        key_of(tokens, Context(hint, places)),
        key_of(tokens, Context(hint.flip(0), places)),
        key_of(tokens, Context(hint, torch.tensor([0, 2]))),
        key_of(tokens, Context(hint[:1], places[:1])),
        key_of(torch.cat([tokens, hint])),
    ]
    assert len({key_of(tokens), *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(0).long(), torch.zeros(2, 2).long(), torch.zeros(3), torch.tensor([1 << 31])]
)
def test_a_key_of_no_sequence_is_refused(tokens):
    with pytest.raises(ValueError, match="tokens: expected integers of"):
        key_of(tokens)


# The header.


def test_the_header_of_a_handshake():
    own = dict(vocab_size=9, sequence_length=4, max_tokens=8, padded_vocab_size=16, tensor_size=1, copies=1)
    head = Head(4, "float32")
    teacher = Handshake(payload="hidden", head=head, weights="f0", checkpoint="x", tokenizer=TOKENIZER, **own)
    assert CacheHeader.of(teacher) == CacheHeader("hidden", 9, 0, head, "f0", "x", TOKENIZER)


@pytest.mark.parametrize("payload", HEADERS)
def test_a_header_comes_back(payload):
    assert CacheHeader.read(HEADERS[payload].text()) == HEADERS[payload]


OTHER = {
    "payload": (replace(SMALL, payload="float32"), "payload: expected float32, got float16"),
    "vocab_size": (replace(SMALL, vocab_size=38), "vocab_size: expected 38, got 37"),
    "weights": (
        replace(SMALL, weights="cd", checkpoint="b"),
        "weights: expected cd (b), got ab12 (a teacher)",
    ),
    "tokenizer": (
        replace(SMALL, tokenizer=replace(TOKENIZER, digest="d" * 64)),
        "tokenizer: expected WordTokenizer of 37 tokens (vocabulary dddddddddddd), "
        "got WordTokenizer of 37 tokens (vocabulary cccccccccccc)",
    ),
}


@pytest.mark.parametrize("field", OTHER)
def test_a_cache_of_another_teacher_is_refused(tmp_path, field):
    wanted, sentence = OTHER[field]
    cache_jobs.fill(tmp_path, range(1))
    before = sorted(os.listdir(tmp_path))
    for opened in (Cache, CacheWriter):
        with pytest.raises(CacheError) as refused:
            opened(tmp_path, wanted)
        assert str(refused.value) == f"the cache {tmp_path} is refused: {sentence}"
    assert sorted(os.listdir(tmp_path)) == before


def test_a_cache_with_other_sizes_is_refused(tmp_path):
    for payload, wanted, sentence in (
        ("topk", {"top_k": 4}, "top_k: expected 4, got 3"),
        ("hidden", {"head": Head(6, "bfloat16")}, "head: expected Head(size=6, dtype='bfloat16'"),
    ):
        CacheWriter(tmp_path / payload, HEADERS[payload]).close()
        with pytest.raises(CacheError, match=re.escape(sentence)):
            Cache(tmp_path / payload, replace(HEADERS[payload], **wanted))


def test_a_reader_may_know_less_than_the_header_and_a_writer_may_not(tmp_path):
    CacheWriter(tmp_path, HEADERS["hidden"]).close()
    little = CacheHeader("hidden", VOCABULARY)
    assert Cache(tmp_path, little).header == HEADERS["hidden"] == Cache(tmp_path).header
    with pytest.raises(CacheError, match="weights: expected weights that are not known, got ab12"):
        CacheWriter(tmp_path, replace(HEADERS["hidden"], weights=""))
    renamed = replace(HEADERS["hidden"], checkpoint="another name", tokenizer=None)
    assert CacheWriter(tmp_path, renamed).header == HEADERS["hidden"], "the header of the folder counts"
    with pytest.raises(ValueError, match="head: expected the output layer of the teacher"):
        CacheWriter(tmp_path / "new", little)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Expecting value"),
        ('{"version": 1', "Expecting"),
        ("[1]", "version: expected 1, got None"),
        (json.dumps({"version": VERSION + 1}), f"version: expected 1, got {VERSION + 1}"),
        (json.dumps({"version": VERSION, "payload": "topk"}), "fields: expected payload, vocab_size"),
        (SMALL.text().replace("float16", "float8"), "payload: expected one of float16"),
        (SMALL.text().replace("37,", '"37",', 1), "vocab_size: expected an integer"),
        (SMALL.text().replace('"ab12"', "12"), "weights: expected a text, got int"),
        (HEADERS["hidden"].text().replace("bfloat16", "int4"), "dtype: expected one of float32"),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, text, sentence):
    (tmp_path / "header.json").write_text(text)
    for opened in (Cache, lambda folder: CacheWriter(folder, SMALL)):
        with pytest.raises(
            CacheError, match=f"header.json: expected the header of a cache, got one with {sentence}"
        ):
            opened(tmp_path)


def test_a_folder_without_a_header_is_no_cache(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            CacheError, match="cache: expected a folder with header.json, which `python -m vcrd cache`"
        ):
            Cache(folder)


# Arguments.


def test_pieces_that_do_not_fit_are_refused(tmp_path):
    tensors = answer(SMALL, 0)
    with CacheWriter(tmp_path, SMALL) as writer:
        for arguments, sentence in (
            ((key(0)[1:], tensors, Span(0, 3), 3, Shard(0, 37)), "key: expected 32 bytes, got 31"),
            ((key(0), tensors, Span(0, 3), 2, Shard(0, 37)), r"rows: expected a span within \[0, 2\)"),
            ((key(0), tensors, Span(0, 3), 3, Shard(1, 38)), r"columns: expected a span within \[0, 37\)"),
            (
                (key(0), tensors, Span(0, 2), 3, Shard(0, 37)),
                r"expected torch.float16 \[2, 37\], got .* \[3, 37\]",
            ),
            ((key(0), [tensors[0].float()], Span(0, 3), 3, Shard(0, 37)), "tensors: expected torch.float16"),
            ((key(0), [], Span(0, 3), 3, Shard(0, 37)), "tensors: expected"),
        ):
            with pytest.raises(ValueError, match=sentence):
                writer.add(*arguments)
    assert files.answer_names(tmp_path) == []


def test_reads_that_do_not_fit_are_refused(tmp_path):
    cache_jobs.fill(tmp_path, range(1))
    cache, out = Cache(tmp_path), answer(SMALL, 0)
    for arguments, sentence in (
        (([Span(0, 4)], Shard(0, 37), out), r"rows: expected spans within \[0, 3\)"),
        (([Span(0, 3)], Shard(0, 38), out), r"columns: expected a span within \[0, 37\)"),
        (
            ([Span(0, 2)], Shard(0, 37), out),
            r"out: expected torch.float16 \[2, 37\], got torch.float16 \[3, 37\]",
        ),
        (
            ([Span(0, 3)], Shard(0, 37), [out[0].float()]),
            r"out: expected torch.float16 \[3, 37\], got torch.float32",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            cache.read(key(0), *arguments)
    assert len(tokens_of(0)) == 3
