"""A cache that is filled over the link holds the teacher's answers, whoever fills it and whenever it is killed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fill_jobs
import numpy as np
import pytest
import torch
from fill_jobs import LAYOUT, asked, environment, output_layer, read, samples, settings, states, teach
from link_jobs import Jobs, true_logits
from ports import free_port
from safetensors.numpy import save_file
from waiting import wait_until

from vcrd.__main__ import main
from vcrd.cache.files import Cache, CacheHeader, CacheWriter, key_of
from vcrd.cache.fill import Lacking, Progress, _Filling, fill
from vcrd.cache.samples import questions_of
from vcrd.errors import OptionError
from vcrd.link.errors import LinkError
from vcrd.link.handshake import Handshake
from vcrd.link.payload import encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard, Span
from vcrd.link.question import Question
from vcrd.teacher_logits import DenseLogits


def answer(payload: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the link delivers about one sequence [n]."""
    whole = payload_named(payload).sized(top_k=4, state_size=fill_jobs.SIZE)
    if payload == "hidden":
        return [states(tokens[None]).squeeze(1)]
    logits = true_logits(tokens[None], LAYOUT.vocab)
    if payload == "topk":
        return [t.squeeze(1) for t in top_k_of(logits, 4, Shard(0, LAYOUT.vocab), None)]
    return [encode(whole, logits, row_max(logits)).squeeze(1)]


def assert_holds(folder: Path, payload: str, rows: torch.Tensor, edges: tuple[int, ...] = (0, 16)) -> None:
    """Exactly the answers about the sequences of these rows, bit for bit but for the sums of top-k, which are those of
    two shards."""
    cache, expected = Cache(folder), {}
    for row in rows:
        for start, stop in pairwise(edges):
            expected[key_of(row[start:stop])] = [tensor[start:stop] for tensor in answer(payload, row)]
    assert set(cache.keys()) == set(expected)
    for key, tensors in expected.items():
        for got, right in zip(read(cache, key), tensors, strict=True):
            if payload == "topk" and got.is_floating_point():
                torch.testing.assert_close(got, right, atol=1e-5, rtol=0)
            else:
                assert torch.equal(got, right)


def fill_all(
    port: int, payloads: tuple[str, ...], folder: str, tokens: torch.Tensor, edges: list[int]
) -> None:
    """Two packed micro-batches, and the first once more."""
    first, second = (Question(row[None], torch.tensor(edges)) for row in tokens)
    for payload in payloads:
        own = settings(port, payload, name=payload)
        print(fill([first, second, first], f"{folder}/{payload}", own), flush=True)


def serve_all(rank: int, port: int, payloads: tuple[str, ...], log: str) -> None:
    for payload in payloads:
        teach(rank, settings(port, payload, name=payload).link, log)


@pytest.mark.parametrize(
    "payloads",
    [("logits_8bit", "topk", "hidden"), pytest.param(("float16", "float32"), marks=pytest.mark.slow)],
)
def test_every_payload_is_written_once_as_the_link_delivers_it(payloads, tmp_path):
    port, tokens = free_port(), samples(2)
    with Jobs(tmp_path) as processes:
        processes.world("teacher", 2, serve_all, port, payloads, str(tmp_path / "log"))
        processes.start("fill", fill_all, port, payloads, str(tmp_path), tokens, [0, 7, 7, 16])
        processes.succeed()
        said = processes.output("fill").splitlines()
    for payload in payloads:
        assert_holds(tmp_path / payload, payload, tokens, (0, 7, 16))
    if "hidden" in payloads:
        assert torch.equal(Cache(tmp_path / "hidden").head(Shard(0, LAYOUT.vocab)), output_layer())
    assert all(line.startswith("4 sequences written (2 more were there)") for line in said), said
    assert len(asked(tmp_path / "log")) == 2 * len(payloads)


def fill_slowly(port: int, folder: str, tokens: torch.Tensor) -> None:
    """Each answer is a file."""
    fill([Question(row[None]) for row in tokens], folder, settings(port), file_bytes=1)


def test_a_fill_that_is_killed_goes_on_where_it_was(tmp_path):
    port, tokens, log, folder = free_port(), samples(9), tmp_path / "log", tmp_path / "cache"
    with Jobs(tmp_path) as processes:
        processes.world("teacher", 2, teach, settings(port).link, str(log), 7, 5, True)
        processes.start("killed", fill_slowly, port, str(folder), tokens)
        wait_until(lambda: len(list(folder.glob("answers-*"))) >= 3, 60, "three answers are written")
        processes.kill("killed")
        (tmp_path / "log.go").touch()
        there, before = len(list(Cache(folder).keys())), len(asked(log))
        processes.start("again", fill_slowly, port, str(folder), tokens)
        processes.processes["again"].join(60)
        assert processes.processes["again"].exitcode == 0, processes.output("again")
    assert 3 <= there <= 5
    assert_holds(folder, "float16", tokens)
    # The teacher may have taken up to three more requests of the killed one, but answered none of them twice for us.
    assert len(asked(log)) - before >= 9 - there
    assert len(asked(log)[-(9 - there) :]) == 9 - there
    assert set(asked(log)[-(9 - there) :]) <= {f"0 1 {row[None].tolist()}" for row in tokens[there:]}


def test_ranks_and_jobs_fill_one_folder_side_by_side(tmp_path):
    """Two ranks with one teacher, and beside them a job with another one of the same weights."""
    ports, folder = (free_port(), free_port()), tmp_path / "cache"
    for name, rows in (("one", samples(6, 1)), ("two", samples(4, 2))):
        np.save(tmp_path / name, rows.numpy().astype(np.int32))
    command = ["cache", "--write", str(folder), "--micro-batch", "2", "--data"]
    with Jobs(tmp_path) as processes:
        for name, port in zip(("one", "two"), ports, strict=True):
            link = settings(port, "topk").link
            processes.world(f"teacher-{name}-", 2, teach, link, str(tmp_path / f"log-{name}"))
        store = free_port()
        for rank in range(2):
            variables = environment(ports[0], "topk", RANK=str(rank), WORLD_SIZE="2")
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store), "USE_LIBUV": "0"}
            processes.start(f"rank{rank}", fill_jobs.run, [*command, str(tmp_path / "one.npy")], variables)
        two = environment(ports[1], "topk")
        processes.start("other", fill_jobs.run, [*command, str(tmp_path / "two.npy")], two)
        processes.succeed()
        said = [processes.output(name).splitlines() for name in ("rank0", "rank1", "other")]
    assert_holds(folder, "topk", torch.cat([samples(6, 1), samples(4, 2)]))
    assert [lines[-1] for lines in said] == ["status 0"] * 3
    assert [len(lines) for lines in said] == [2, 1, 2]
    assert said[0][0].startswith(f"{folder}: 6 sequences written (0 more were there), 3.456e-06 GB")
    assert sorted(line.split()[0] for line in asked(tmp_path / "log-one")) == ["0", "0", "1"]


def test_another_teacher_is_refused(tmp_path):
    port, folder = free_port(), tmp_path / "cache"
    (tmp_path / "data.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    command = ["cache", "--write", str(folder), "--data", str(tmp_path / "data.jsonl")]
    with Jobs(tmp_path) as processes:
        for name, weights in (("first", 7), ("other", 8)):
            processes.world(f"{name}-teacher", 2, teach, settings(port).link, str(tmp_path / "log"), weights)
            processes.start(name, fill_jobs.run, command, environment(port, "float16"))
            for process in processes.processes.values():
                process.join(60)
    assert processes.output("first").endswith("status 0\n")
    assert processes.output("other") == (
        f"python -m vcrd cache: the cache {folder} is refused: weights: expected 0000000000000008 "
        "(teacher of the tests), got 0000000000000007 (teacher of the tests)\nstatus 1\n"
    )


def test_a_fill_sees_what_another_job_has_added(tmp_path, monkeypatch):
    monkeypatch.setattr("vcrd.cache.fill.REFRESH_SECONDS", -1.0)
    header, rows = CacheHeader("float16", LAYOUT.vocab), samples(2)
    with CacheWriter(tmp_path, header) as other:
        lacking = Lacking(Cache(tmp_path))
        assert lacking.of(Question(rows[:1]))[1] == {0: key_of(rows[0])}
        other.add(key_of(rows[1]), answer("float16", rows[1]), Span(0, 16), 16, Shard(0, LAYOUT.vocab))
        other.flush()
        assert lacking.of(Question(rows[1:]))[1] == {}


def test_the_answers_of_a_teacher_that_came_back_with_other_weights_are_not_stored(tmp_path):
    """With the setting identity "warn" the link lets it in."""
    first = Handshake(50, 16, "float16", 64, 64, tensor_size=1, copies=1, weights="ab", checkpoint="one")
    link = SimpleNamespace(teacher=first, columns=Shard(0, 50), asked=[])

    def request(tokens: torch.Tensor, *_: object) -> int:
        link.asked.append(tokens)
        return len(link.asked) - 1

    def receive(number: int) -> DenseLogits:
        if number == 2:
            link.teacher = replace(first, weights="cd", checkpoint="two")
        return DenseLogits(true_logits(link.asked[number], 50).half())

    link.request, link.receive = request, receive
    rows = samples(4)
    filling = _Filling(link, tmp_path, 0, 1 << 20, Progress(None), leads=True)
    with pytest.raises(
        LinkError, match=r"came back with the weights cd \(two\), and the cache is of ab \(one\)"
    ):
        filling.run(Question(row[None]) for row in rows)
    assert set(Cache(tmp_path).keys()) == {key_of(row) for row in rows[:2]}


WRONG = {
    "no list": (
        "a.jsonl",
        '{"tokens": 3}\n',
        """a.jsonl, line 1: expected {"tokens": [..]} with integers, got b'{"token""",
    ),
    "no field": ("a.jsonl", '{"tokens": [1]}\n\n{"text": []}\n', "a.jsonl, line 3: expected 1 to 16 tokens"),
    "a context": (
        "a.jsonl",
        '{"tokens": [1], "vcrd_teacher_context": [50]}',
        "line 1: expected token ids in [0, 50), got",
    ),
    "a context's length": (
        "a.jsonl",
        '{"tokens": [1], "vcrd_teacher_context": [2, 3], "vcrd_teacher_context_positions": [0]}',
        "line 1, vcrd_teacher_context_positions: expected a position of each token of the context, got 1 for 2",
    ),
    "a context's place": (
        "a.jsonl",
        '{"tokens": [1, 2], "vcrd_teacher_context": [2, 3], "vcrd_teacher_context_positions": [1, 0]}',
        "line 1, vcrd_teacher_context_positions: expected positions in [0, 2) that do not descend, got [1, 0]",
    ),
    "no JSON": ("a.jsonl", "1, 2\n", "a.jsonl, line 1: expected {"),
    "a boolean": ("a.jsonl", '{"tokens": [1, true]}\n', "a.jsonl, line 1: expected {"),
    "a fraction": ("a.jsonl", '{"tokens": [1, 1.5]}\n', "a.jsonl, line 1: expected {"),
    "a huge number": ("a.jsonl", f'{{"tokens": [{1 << 70}]}}\n', "a.jsonl, line 1: expected {"),
    "no token": (
        "a.jsonl",
        '{"tokens": []}\n',
        "a.jsonl, line 1: expected 1 to 16 tokens (sequence_length), got 0",
    ),
    "too long": (
        "a.npy",
        np.zeros((2, 17), int),
        "a.npy, row 0: expected 1 to 16 tokens (sequence_length), got 17",
    ),
    "beyond": (
        "a.npy",
        np.array([[1, 2], [3, 50]]),
        "a.npy, row 1: expected token ids in [0, 50), got 3 to 50",
    ),
    "negative": ("a.npy", np.array([[-1]]), "a.npy, row 0: expected token ids in [0, 50), got -1 to -1"),
    "one axis": ("a.npy", np.zeros(3, int), "a.npy: expected an array of integers [n, s], got int64 [3]"),
    "floats": (
        "a.safetensors",
        {"tokens": np.zeros((2, 3))},
        "a.safetensors: expected an array of integers [n, s], got",
    ),
    "a name": (
        "a.safetensors",
        {"ids": np.zeros((2, 3), int)},
        "a.safetensors: expected safetensors with 'tokens', got",
    ),
    "no array": ("a.npy", "text", "a.npy: expected an array of numpy, got"),
    "no safetensors": ("a.safetensors", "text", "a.safetensors: expected safetensors with 'tokens', got"),
    "a kind": ("a.txt", "1 2 3", "--data: expected a file .jsonl, .npy, .safetensors, got"),
}


def store(path: Path, content: object) -> Path:
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, dict):
        save_file(content, path)
    else:
        np.save(path, content)
    return path


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sample_is_one_sentence(name, tmp_path):
    file, content, sentence = WRONG[name]
    path = store(tmp_path / file, content)
    with pytest.raises(OptionError) as refused:
        list(questions_of(path, 2, LAYOUT.vocab, LAYOUT.sequence))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(
        OptionError, match="--data: expected a file that can be read, got .*a.npy: No such file"
    ):
        list(questions_of(tmp_path / "a.npy", 2, LAYOUT.vocab, LAYOUT.sequence))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_micro_batches_of_a_file_do_not_depend_on_the_number_of_ranks(size, tmp_path):
    lines = [[1, 2], [3, 4], [5, 6], [7], [8, 9]]
    text = "".join(json.dumps({"tokens": line, "more": "text"}) + "\n" for line in lines)
    path = store(tmp_path / "a.jsonl", text)
    shares = [[q.tokens.tolist() for q in questions_of(path, 2, 50, 16, rank, size)] for rank in range(size)]
    whole = [[[1, 2], [3, 4]], [[5, 6]], [[7]], [[8, 9]]]
    assert shares == [whole[rank::size] for rank in range(size)]


def test_contexts_of_a_file_are_those_of_its_micro_batches(tmp_path):
    lines = [
        {"tokens": [1, 2], "vcrd_teacher_context": [7, 8], "vcrd_teacher_context_positions": [0, 1]},
        {"tokens": [3, 4]},
        {"tokens": [5, 6], "vcrd_teacher_context": [9]},
    ]
    path = store(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    (question,) = questions_of(path, 3, 50, 16)
    assert question.context.tokens.tolist() == [7, 8, 9] and question.context.places.tolist() == [0, 1, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_arrays_of_any_integers_are_the_same_samples(dtype, tmp_path):
    array = samples(1500, length=3).numpy().astype(dtype)  # more than are read at once
    for path in (store(tmp_path / "a.npy", array), store(tmp_path / "a.safetensors", {"tokens": array})):
        questions = list(questions_of(path, 7, LAYOUT.vocab, LAYOUT.sequence))
        assert torch.equal(torch.cat([q.tokens for q in questions]), samples(1500, length=3))


@pytest.mark.parametrize(
    ("options", "variables", "sentence"),
    [
        ([], {}, "--data: expected files of samples, got none"),
        (
            ["--data", "a.npy", "--micro-batch", "0"],
            {},
            "--micro-batch: expected an integer of at least 1, got '0'",
        ),
        (
            ["--data", "a.npy", "--file-size", "x"],
            {},
            "--file-size: expected an integer of at least 1, got 'x'",
        ),
        (
            ["--data", "a.npy"],
            {"VCRD_PAYLOAD": "mp3"},
            "VCRD_PAYLOAD (--vcrd-payload): expected one of float16",
        ),
        (["--data", "a.npy"], {}, "VCRD_VOCAB_SIZE (--vcrd-vocab-size): expected the teacher's, because"),
        (
            ["--data", "a.npy"],
            {"VCRD_VOCAB_SIZE": "9", "VCRD_SEQUENCE_LENGTH": "9", "VCRD_ADDRESS": "a=h:1,b=h:2"},
            "VCRD_ADDRESS (--vcrd-address): expected the address of one teacher job, without a name, got 'a=h:1,b=h:2'",
        ),
    ],
)
def test_a_wrong_option_or_setting_is_one_sentence(
    options, variables, sentence, monkeypatch, capsys, tmp_path
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "--write", str(tmp_path / "cache"), *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith(f"python -m vcrd cache: {sentence}") and said.count("\n") == 1
    assert not (tmp_path / "cache").exists()
