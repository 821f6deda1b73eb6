"""What a cache lacks, a cache of another teacher, and ranks that cannot go on: one sentence on every rank, no hang."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from answers_jobs import plain, same
from fill_jobs import HEAD, output_layer, states
from link_jobs import Jobs, Layout, true_logits
from ports import free_port
from waiting import wait_until

from vcrd.cache import files
from vcrd.cache.answers import CachedAnswers
from vcrd.cache.files import Cache, CacheError, CacheHeader, CacheWriter, key_of
from vcrd.cache.reading import AnswersMissing
from vcrd.cache.recorder import Recorder
from vcrd.link import HandshakeRefused, LinkError, LinkSettings, TeacherLink, host_rendezvous
from vcrd.link.handshake import Head, Identity, Tokenizer
from vcrd.link.plan import Shard, Span
from vcrd.link.student import StudentLink
from vcrd.settings import TeacherSource

VOCAB = 50
LAYOUT = Layout(vocab=VOCAB)
SETTINGS = LinkSettings(teacher="cache:/x", payload="float32", timeout=30, connect_timeout=30)
TOKENIZER = Tokenizer("words", VOCAB, "a" * 64)
OTHER = Tokenizer("words", VOCAB, "b" * 64)


def batch(number: int) -> torch.Tensor:
    return torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(number))


def fill(folder: Path, numbers: range, run: str = "", other: float = 0.0, **header) -> None:
    """other: added to the logits."""
    with CacheWriter(folder, CacheHeader("float32", VOCAB, **header), run=run) as writer:
        for number in numbers:
            logits = true_logits(batch(number), VOCAB) + other
            for row, tokens in enumerate(batch(number)):
                writer.add(key_of(tokens), [logits[:, row]], Span(0, 8), 8, Shard(0, VOCAB))


def opened(
    folder: Path, settings: LinkSettings = SETTINGS, rank: int = 0, layout=LAYOUT, **other
) -> CachedAnswers:
    return CachedAnswers.connect(
        settings, TeacherSource("", settings.address, str(folder)), **layout.student(rank), **other
    )


@contextmanager
def taught(settings: LinkSettings, weights: int = 7):
    """A teacher job of one rank, in a thread. Yields a list of the tokens that it was asked about."""
    asked: list[torch.Tensor] = []
    hidden = settings.payload == "hidden"

    def teach() -> None:
        link = TeacherLink.connect(
            settings,
            **LAYOUT.teacher(0, 0),
            group=None,
            tensor_group=None,
            identity=Identity(weights=weights, checkpoint="some"),
            head=HEAD if hidden else None,
            head_weight=output_layer() if hidden else None,
        )
        while (requests := link.next_batch(1)) is not None:
            for request in requests:
                asked.append(request.tokens)
                answer = states(request.tokens) if hidden else true_logits(request.tokens, VOCAB)
                link.respond(request, answer)
        link.close()

    rendezvous = host_rendezvous(settings)
    with ThreadPoolExecutor(1) as pool:
        teaching = pool.submit(teach)
        yield asked
        teaching.result(30)
    rendezvous.close()


def test_reading_begins_with_the_request_and_stays_within_the_credits(tmp_path):
    fill(tmp_path, range(5))
    answers = opened(tmp_path, replace(SETTINGS, credits=2))
    for number in range(5):
        assert answers.request(batch(number)) == number
    for number in range(5):
        wait_until(lambda number=number: answers._reading.is_ready(min(4, number + 1)), 30, "two are ready")
        assert not answers._reading.is_ready(number + 2)
        assert torch.equal(answers.receive(number).logits, true_logits(batch(number), VOCAB))
    assert answers.waits.answers == 5 and answers.waits.late == 0 and answers.served_by == (None, 0)
    assert answers.bytes_received == 5 * 2 * 8 * VOCAB * 4
    with pytest.raises(ValueError, match="number: expected the next one, 5, got 4"):
        answers.receive(4)
    with pytest.raises(ValueError, match="number: expected one that was requested, below 5, got 5"):
        answers.receive(5)
    with pytest.raises(ValueError, match=r"tokens: expected integers in \[0, 50\)"):
        answers.request(batch(0) + VOCAB)
    answers.close()
    answers.close()


def test_no_thread_stays_behind_where_the_answers_are_forgotten(tmp_path):
    fill(tmp_path, range(1))
    before = threading.active_count()
    answers = opened(tmp_path)
    answers.request(batch(0))
    answers.receive(0)
    assert threading.active_count() > before
    del answers
    gc.collect()
    wait_until(lambda: threading.active_count() == before, 30, "no thread of the answers is alive")


def test_files_that_are_written_later_are_found(tmp_path):
    fill(tmp_path, range(1))
    answers = opened(tmp_path)
    fill(tmp_path, range(1, 2))
    answers.request(batch(1))
    assert torch.equal(answers.receive(0).logits, true_logits(batch(1), VOCAB))
    answers.close()


def read_twice(rank: int, folder: Path) -> None:
    """A second answer to the same sequences is written while both ranks train."""
    layout = Layout(vocab=VOCAB, student_tensor=2)
    if rank == 1:

        def listed(*_: object) -> None:
            raise AssertionError("only the request leader may look which files there are")

        files.answer_names = listed
    answers = opened(folder, rank=rank, layout=layout, group=dist.group.WORLD)
    if rank == 0:
        fill(folder, range(3), "a", other=1.0)
        for number in (0, 2, 0, 1):
            answers.request(batch(number))
    width = answers.columns.width
    for place, (number, other) in enumerate([(0, 0.0), (2, 1.0), (0, 0.0), (1, 0.0)]):
        wanted = true_logits(batch(number), VOCAB)[..., rank * width : (rank + 1) * width] + other
        assert torch.equal(answers.receive(place).logits, wanted), place
    answers.close()


def test_every_rank_reads_the_same_one_of_two_answers_and_goes_on_reading_it(tmp_path):
    fill(tmp_path / "cache", range(2), "b")
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 2, read_twice, tmp_path / "cache")
        jobs.succeed()


def lack(rank: int, folder: Path) -> None:
    layout = Layout(vocab=VOCAB, student_tensor=2)
    answers = opened(folder, rank=rank, layout=layout, group=dist.group.WORLD)
    if rank == 0:
        answers.request(batch(0))
        answers.request(torch.cat([batch(0)[:1], batch(1)]))
    answers.receive(0)
    for _ in range(2):
        with pytest.raises(AnswersMissing) as error:
            answers.receive(1)
        print(error.value, flush=True)
    answers.close()


def test_every_rank_says_alike_what_is_missing(tmp_path):
    fill(tmp_path / "cache", range(1))
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 2, lack, tmp_path / "cache")
        jobs.succeed()
        sentence, again = jobs.output("rank0").splitlines()
        assert jobs.output("rank1").splitlines() == [sentence, again] and sentence == again
    first = batch(1)[0]
    assert sentence == (
        f"cache {tmp_path / 'cache'}: expected an answer to each sequence of micro-batch 1, got none to 2 of 3, for "
        f"example to the 8 tokens {' '.join(map(str, first.tolist()))} (key {key_of(first).hex()[:16]}); `python -m "
        "vcrd cache` adds answers, and with an address beside the cache the teacher job there is asked"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"payload": "float16"}, "payload: expected float16, got float32"),
        ({"payload": "topk", "top_k": 3}, "payload: expected topk, got float32; top_k: expected 3, got 0"),
        (
            {"identity": "insist"},
            "identity is 'insist', and the student states no tokenizer with a vocabulary; identity",
        ),
    ],
)
def test_another_cache_is_refused(changes, sentence, tmp_path):
    fill(tmp_path, range(1))
    with pytest.raises(HandshakeRefused) as error:
        opened(tmp_path, replace(SETTINGS, **changes))
    assert str(error.value).startswith(f"the cache {tmp_path} is refused: {sentence}")


def test_another_vocabulary_and_no_cache_at_all_are_refused(tmp_path):
    fill(tmp_path / "a", range(1))
    with pytest.raises(HandshakeRefused, match="vocab_size: expected 51, got 50"):
        opened(tmp_path / "a", layout=Layout(vocab=51))
    with pytest.raises(HandshakeRefused, match="cache: expected a folder with header.json"):
        opened(tmp_path / "b")


def test_a_cache_of_hidden_states_needs_the_output_layer(tmp_path):
    """Without it there is no answer. A writer that was killed may have left the folder so."""
    header, settings = (
        CacheHeader("hidden", VOCAB, head=Head(4, "float32")),
        replace(SETTINGS, payload="hidden"),
    )
    states, weight = torch.randn(2, 8, 4), torch.randn(VOCAB, 4)
    with CacheWriter(tmp_path, header) as writer:
        for row, tokens in enumerate(batch(0)):
            writer.add(key_of(tokens), [states[row]], Span(0, 8), 8, Shard(0, VOCAB))
    with pytest.raises(HandshakeRefused, match="is refused: it lacks the output layer of its teacher"):
        opened(tmp_path, settings)
    with CacheWriter(tmp_path, header) as writer:
        writer.add_head(weight, Shard(0, VOCAB))
    answers = opened(tmp_path, settings)
    answers.request(batch(0))
    answer = answers.receive(0)
    assert torch.equal(answer.states, states.transpose(0, 1)) and torch.equal(answer.weight, weight)
    answers.close()


def test_the_identity_of_a_cache_is_checked_as_that_of_a_teacher_job(tmp_path, caplog):
    fill(tmp_path, range(1), tokenizer=TOKENIZER, weights="12")
    with pytest.raises(
        HandshakeRefused, match="tokenizer: expected words .*bbbb.*, got words .*aaaa.*identity 'warn'"
    ):
        opened(tmp_path, tokenizer=OTHER)
    with caplog.at_level(logging.WARNING, "vcrd"):
        opened(tmp_path, tokenizer=TOKENIZER).close()
        opened(tmp_path).close()
        opened(tmp_path, replace(SETTINGS, identity="insist"), tokenizer=TOKENIZER).close()
        assert not caplog.records
        opened(tmp_path, replace(SETTINGS, identity="warn"), tokenizer=OTHER).close()
    assert "tokenizer: expected words" in caplog.text
    fill(tmp_path / "unknown", range(1), tokenizer=TOKENIZER)
    with pytest.raises(HandshakeRefused, match="the cache states no digest of the weights of its teacher"):
        opened(tmp_path / "unknown", replace(SETTINGS, identity="insist"), tokenizer=TOKENIZER)


def test_what_is_missing_is_asked_of_the_teacher_job_and_added(tmp_path):
    settings = replace(SETTINGS, address=f"127.0.0.1:{free_port()}", teacher=None)
    with taught(settings) as asked:
        answers = opened(tmp_path, settings)
        first = [answers.request(batch(number)) for number in (0, 1, 0)]
        live = [plain(answers.receive(number)) for number in first]
        answers.close()
    assert len(asked) == 3 and len(list(Cache(tmp_path).keys())) == 4
    half = torch.stack([batch(0)[0], batch(2)[0]])
    with taught(settings) as asked:
        answers = opened(tmp_path, settings)
        for number, tokens in enumerate([batch(1), half, batch(0)]):
            assert answers.request(tokens) == number
            assert torch.equal(answers.receive(number).logits, true_logits(tokens, VOCAB))
        assert answers.waits.answers == 3 and answers.served_by == (0, 1)
        answers.close()
    assert len(asked) == 1 and torch.equal(asked[0], half)
    answers = opened(tmp_path)
    for number, tokens in enumerate([batch(0), batch(1), half]):
        answers.request(tokens)
        got = plain(answers.receive(number))
        assert number == 2 or same(got, live[number])
    answers.close()


def test_a_teacher_job_with_other_weights_may_not_add_to_a_cache(tmp_path):
    settings = replace(SETTINGS, address=f"127.0.0.1:{free_port()}", teacher=None)
    with taught(settings):
        opened(tmp_path, settings).close()
    with (
        taught(settings, weights=8),
        pytest.raises(HandshakeRefused, match="is refused: weights: expected 0*8 "),
    ):
        opened(tmp_path, settings)


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise CacheError("no space is left")

    monkeypatch.setattr(CacheWriter, "add", full)
    settings = replace(SETTINGS, address=f"127.0.0.1:{free_port()}", teacher=None)
    with caplog.at_level(logging.WARNING, "vcrd"), taught(settings):
        answers = opened(tmp_path, settings)
        for number in range(7):
            answers.request(batch(number))
            assert torch.equal(answers.receive(number).logits, true_logits(batch(number), VOCAB))
        answers.close()
    said = [record.message for record in caplog.records if "adds no more answers" in record.message]
    assert said == ["student data rank 0, tensor rank 0 adds no more answers to the cache: no space is left"]


def test_what_is_written_after_the_link_is_closed_is_whole(tmp_path, monkeypatch, caplog):
    """The output layer too, of which the writer reads the link's."""
    closed, add, close = threading.Event(), Recorder._add, StudentLink.close

    def add_late(*arguments: object) -> None:
        assert closed.wait(60)
        add(*arguments)

    def close_first(link: StudentLink) -> None:
        close(link)
        closed.set()

    monkeypatch.setattr(Recorder, "_add", add_late)
    monkeypatch.setattr(StudentLink, "close", close_first)
    settings = replace(SETTINGS, address=f"127.0.0.1:{free_port()}", teacher=None, payload="hidden")
    with taught(settings):
        answers = opened(tmp_path, settings)
        answers.receive(answers.request(batch(0)))
        answers.close()
    cache = Cache(tmp_path)
    assert torch.equal(cache.head(Span(0, VOCAB)), output_layer())
    assert all(key_of(tokens) in cache for tokens in batch(0)) and not caplog.records


def be_lost(rank: int, folder: Path, lost: int) -> None:
    """One rank is killed, or cannot read, after the first answer: the others say which."""
    layout = Layout(vocab=VOCAB, student_tensor=3)
    answers = opened(folder, replace(SETTINGS, credits=1), rank, layout, group=dist.group.WORLD)
    if rank == 0:
        answers.request(batch(0))
    answers.receive(0)
    dist.barrier()
    if rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        wait_until(lambda: answers._reading.failure is not None, 30, "the leader knows")
        with pytest.raises(LinkError):
            answers.request(batch(1))
    with pytest.raises(LinkError) as error:
        answers.receive(1) if rank else answers._reading.take(1, 30)
    print(f"got: {error.value}", flush=True)
    answers.close()
    os._exit(0)  # the group lacks a rank


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(lost, tmp_path):
    fill(tmp_path / "cache", range(2))
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 3, be_lost, tmp_path / "cache", lost)
        others = {f"rank{rank}" for rank in range(3)} - {f"rank{lost}"}
        codes = jobs.wait()
        assert codes == {f"rank{lost}": -signal.SIGKILL, **dict.fromkeys(others, 0)}, [
            jobs.output(n) for n in others
        ]
        for name in others:
            assert f"got: student data rank 0, tensor rank {lost} is gone" in jobs.output(name)


def end_early(rank: int, folder: Path) -> None:
    layout = Layout(vocab=VOCAB, student_tensor=2)
    answers = opened(folder, rank=rank, layout=layout, group=dist.group.WORLD)
    if rank == 0:
        answers.request(batch(0))
        wait_until(lambda: answers._reading.is_ready(0), 30, "the answer is read")
        answers.close()
        dist.barrier()
        return
    dist.barrier()
    answers.receive(0)
    with pytest.raises(LinkError, match="tensor rank 0 has ended, so there is no answer to micro-batch 1"):
        answers.receive(1)
    answers.close()


def test_a_request_leader_that_ends_leaves_nobody_waiting(tmp_path):
    """What it had asked for is answered still."""
    fill(tmp_path / "cache", range(1))
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 2, end_early, tmp_path / "cache")
        jobs.succeed()


def cannot_read(rank: int, folder: Path) -> None:
    layout = Layout(vocab=VOCAB, student_tensor=2)
    answers = opened(folder, rank=rank, layout=layout, group=dist.group.WORLD)
    if rank == 1:

        def read(*_: object) -> None:
            raise CacheError("it is damaged")

        answers._reading._cache.read = read
    dist.barrier()
    if rank == 0:
        answers.request(batch(0))  # which it may be able to read before it hears of the other rank
        wait_until(lambda: answers._reading.failure is not None, 30, "the leader knows")
    with pytest.raises(LinkError) as error:
        answers._reading.take(1, 30) if rank == 0 else answers.receive(0)
    print(f"got: {error.value}", flush=True)
    dist.barrier()
    answers.close()


def test_a_rank_that_cannot_read_ends_the_others(tmp_path):
    fill(tmp_path / "cache", range(1))
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 2, cannot_read, tmp_path / "cache")
        jobs.succeed()
        for rank in range(2):
            said = "got: student data rank 0, tensor rank 1 cannot read the cache: it is damaged"
            assert said in jobs.output(f"rank{rank}")


def test_a_folder_that_one_rank_cannot_use_is_refused_on_every_rank(tmp_path):
    fill(tmp_path / "cache", range(1))
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 2, see_another_folder, tmp_path)
        jobs.succeed()


def see_another_folder(rank: int, folder: Path) -> None:
    layout = Layout(vocab=VOCAB, student_context=2)
    with pytest.raises(HandshakeRefused, match="cache: expected a folder with header.json"):
        opened(folder / ("cache" if rank == 0 else "none"), rank=rank, layout=layout, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="group: expected 2 ranks, got None"):
        opened(folder / "cache", rank=rank, layout=layout)
