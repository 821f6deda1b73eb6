"""What may happen to a cache: killed writers, a full disk, half a file, another bit, a file that goes."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import cache_jobs
import fork_server
import pytest
import torch
from cache_jobs import HEADERS, SMALL, add, answer, key, read, same
from waiting import wait_until

from vcrd.__main__ import main
from vcrd.cache import atomic, files
from vcrd.cache.answer_file import AnswerFile
from vcrd.cache.files import Cache, CacheError, CacheWriter
from vcrd.cache.header import CacheHeader
from vcrd.cache.verify import verify


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def process(target, *arguments):
    started = fork_server.context().Process(target=target, args=arguments)
    started.start()
    return started


# Killed writers.


@pytest.mark.parametrize("step", ["half", "fsync", "rename", "renamed"])
def test_a_file_is_whole_or_absent_at_whatever_step_its_writer_is_killed(tmp_path, step):
    killed = process(cache_jobs.fill_and_be_killed, tmp_path, step)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    sizes, damaged = verify(tmp_path)
    assert damaged == [] and sizes.entries == (2 if step == "renamed" else 1)
    assert len(temporaries(tmp_path)) == (step != "renamed")
    cache_jobs.fill(tmp_path, range(3))
    assert temporaries(tmp_path) == [] and sorted(Cache(tmp_path).keys()) == sorted(map(key, range(3)))


def kills(folder: Path, count: int) -> int:
    """Kills a process that fills the cache, that many times, and returns how many kills left a temporary file."""
    draw, interrupted = random.Random(count), 0
    for _ in range(count):
        more = (len(os.listdir(folder)) if folder.exists() else 0) + draw.randrange(1, 20)
        writing = process(cache_jobs.fill, folder, range(10**6))
        wait_until(lambda: folder.exists() and len(os.listdir(folder)) >= more, 120, "new files")  # noqa: B023
        for _ in range(draw.randrange(3000)):
            pass
        os.kill(writing.pid, signal.SIGKILL)
        writing.join(60)
        assert writing.exitcode == -signal.SIGKILL
        interrupted += bool(temporaries(folder))
        sizes, damaged = verify(folder)
        assert damaged == [] and sizes.incomplete == 0
        cache = Cache(folder)
        assert all(same(read(cache, number), answer(SMALL, number)) for number in range(sizes.entries))
    cache_jobs.fill(folder, range(sizes.entries + 5))
    assert temporaries(folder) == []
    found = sorted(k for file in Cache(folder).files for k in file.keys)
    assert found == sorted(map(key, range(sizes.entries + 5))), "something is missing, or was written again"
    return interrupted


def test_kills_at_random_moments(tmp_path):
    kills(tmp_path / "cache", 3)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    assert kills(tmp_path / "cache", 20) >= 5


@pytest.mark.parametrize("writers", [2, 6])
def test_writers_side_by_side(tmp_path, writers):
    """They start at the same time in a folder that is not there yet, and their parts overlap."""
    folder = tmp_path / "cache"
    started = [process(cache_jobs.fill, folder, range(5 * n, 5 * n + 10), 3) for n in range(writers)]
    for each in started:
        each.join(120)
    assert [each.exitcode for each in started] == [0] * writers
    sizes, damaged = verify(folder)
    assert damaged == [] and sizes.entries == 5 * writers + 5 and temporaries(folder) == []
    cache = Cache(folder, SMALL)
    assert all(same(read(cache, n), answer(SMALL, n)) for n in range(5 * writers + 5))


def test_of_two_teachers_that_start_at_once_one_is_refused(tmp_path, monkeypatch):
    """The other one writes its header after this writer has seen that there is none."""
    create = atomic.create

    def late(folder, name, data):
        monkeypatch.setattr(atomic, "create", create)
        CacheWriter(folder, replace(SMALL, weights="cd")).close()
        return create(folder, name, data)

    monkeypatch.setattr(atomic, "create", late)
    with pytest.raises(CacheError, match="weights: expected ab12 .*, got cd"):
        CacheWriter(tmp_path, SMALL)
    assert Cache(tmp_path).header.weights == "cd" and temporaries(tmp_path) == []


def test_temporary_files_of_writers_that_live_or_may_live_stay(tmp_path):
    CacheWriter(tmp_path, SMALL)
    here, day = atomic._place(), 24 * 3600
    ended = process(print)
    ended.join()
    cases = {
        f".answers-a.{os.getpid()}@{here}": (True, day - 60),
        f".answers-b.{ended.pid}@{here}": (False, 0),
        f".answers-c.{ended.pid}@another.1": (True, day - 60),
        f".answers-d.{os.getpid()}@another.1": (False, day + 60),
        f".answers-h.{os.getpid()}@{here}": (False, day + 60),  # the number has gone to another process
        f".answers-e.{os.getpid()}@{here[:-1]}0": (True, 0),  # the same number in another name space
        ".answers-f": (True, 9 * day),
        ".notes.1@another.1": (True, 9 * day),
    }
    cases[f".answers-g.{1 << 40}@{here}"] = (True, 0)  # no number of a process, so nobody's
    for name, (_, age) in cases.items():
        path = tmp_path / f"{name}.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    CacheWriter(tmp_path, SMALL)
    assert re.fullmatch(r"[\w-]+\.[0-9a-f]{8}\.\d+", here)
    assert sorted(temporaries(tmp_path)) == sorted(
        f"{name}.tmp" for name, (stays, _) in cases.items() if stays
    )
    assert files.answer_names(tmp_path) == []


# A disk that is full, a folder that cannot be written to.


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk(tmp_path, monkeypatch, call):
    """The sentence says what is lost, nothing is left on disk, and the writer goes on when there is space again."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CacheWriter(tmp_path, SMALL) as writer:
        add(writer, 0)
        add(writer, 1)
        with monkeypatch.context() as patched:
            if call == "write":
                write = atomic._write_temporary
                patched.setattr(
                    atomic,
                    "_write_temporary",
                    lambda path, fill: write(path, lambda f: (f.write(b"half"), full())),
                )
            else:
                patched.setattr(f"os.{call}", full)
            with pytest.raises(CacheError) as said:
                writer.flush()
        assert str(said.value) == (
            f"the cache {tmp_path}: 630 bytes of answers are not stored: expected enough space on the file "
            "system, got No space left on device (errno 28)"
        )
        assert os.listdir(tmp_path) == ["header.json"]
        add(writer, 0)
    assert Cache(tmp_path).sizes().entries == 1


def test_a_full_disk_loses_one_file_of_several(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensors = answer(SMALL, 0)
    writer = CacheWriter(tmp_path, SMALL)
    for left, right in ((0, 20), (20, 37)):
        writer.add(key(0), [t[:, left:right] for t in tensors], files.Span(0, 3), 3, files.Shard(left, right))
    with monkeypatch.context() as patched:
        patched.setattr("os.rename", full)
        with pytest.raises(CacheError, match=f"{3 * 17 * 2 + 56} bytes of answers are not stored"):
            writer.flush()
    writer.close()
    assert [file.columns for file in Cache(tmp_path).files] == [files.Shard(0, 20)]


def test_a_file_that_cannot_grow(tmp_path):
    """The same by the kernel: RLIMIT_FSIZE fails within the contents."""
    big = CacheHeader("float32", 1000)
    writer, before = CacheWriter(tmp_path, big), resource.getrlimit(resource.RLIMIT_FSIZE)
    writer.add(key(0), answer(big, 0), files.Span(0, 3), 3, files.Shard(0, 1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(CacheError, match="12,056 bytes of answers are not stored: expected enough space"):
            writer.flush()
        assert os.listdir(tmp_path) == ["header.json"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.close()
    assert os.listdir(tmp_path) == ["header.json"], "what could not be stored was kept in memory"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="the cache .*: expected a folder that can be written to, got Not a"):
        CacheWriter(tmp_path / "file" / "cache", SMALL)


# Damaged files.


@pytest.fixture
def one_file(tmp_path):
    """The path of a file with the answers 0 and 1."""
    cache_jobs.fill(tmp_path, range(2), 2)
    return tmp_path / files.answer_names(tmp_path)[0]


def damaged_sentence(path: Path, reason: str) -> str:
    expected = f"{path}: expected a whole file of answers of this cache, got one with {reason}"
    return f"{expected}; delete it, and fill the cache again"


def test_a_file_that_is_cut_anywhere_is_noticed_when_it_is_opened(one_file):
    whole = one_file.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        one_file.write_bytes(whole[:length])
        with pytest.raises(
            CacheError, match=r"a whole file of answers of this cache, got one with \w+.*; delete it"
        ):
            Cache(one_file.parent)
    one_file.write_bytes(whole + b"\0")
    with pytest.raises(CacheError) as said:
        Cache(one_file.parent)
    assert str(said.value) == damaged_sentence(
        one_file, f"length: expected {len(whole)} bytes, got {len(whole) + 1}"
    )


def test_every_flipped_bit_is_noticed(tmp_path):
    """One bit of each byte in turn: verify() finds all of them."""
    header = CacheHeader("logits_8bit", 5)
    with CacheWriter(tmp_path, header) as writer:
        add(writer, 0)
        add(writer, 1)
    (name,) = files.answer_names(tmp_path)
    whole, draw, unseen = (tmp_path / name).read_bytes(), random.Random(0), 0
    (tmp_path / name).unlink()
    cache = Cache(tmp_path)
    for place in range(len(whole)):
        other, name = bytearray(whole), f"answers-{place:016x}-000001.safetensors"
        other[place] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(other)
        try:
            cache._open(name)
            unseen += 1
        except CacheError as error:
            assert name in str(error) and str(error).endswith("; delete it, and fill the cache again")
    sizes, damaged = verify(tmp_path)
    assert sizes.files == 0 and len(damaged) == len(whole)
    # Opening does not read the contents, and cannot know that a key or a digest is another one.
    contents = sum(t.nbytes for n in range(2) for t in answer(header, n))
    assert contents + 2 * 32 + 64 <= unseen < contents + 2 * 32 + 64 + 30


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff" * 100,
        b"PK\x03\x04 not answers",
        bytes(8) + b"{}",
        b"\2" + bytes(7) + b"{}",
        b"\2" + bytes(7) + b"[]",
    ],
)
def test_a_file_of_another_kind_under_such_a_name_is_refused(one_file, text):
    shutil.copy(one_file, one_file.parent / "answers-0123456789abcdef-000001.safetensors")
    one_file.write_bytes(text)
    with pytest.raises(CacheError, match=f"{one_file.name}: expected a whole file"):
        Cache(one_file.parent)
    sizes, damaged = verify(one_file.parent)
    assert sizes.entries == 2 and len(damaged) == 1


def test_other_files_in_the_folder_are_left_alone(one_file):
    folder = one_file.parent
    others = [
        "notes.txt",
        "answers.safetensors",
        "model.safetensors",
        "answers-1-000001.safetensors",
        ".answers.tmp",
    ]
    for name in others:
        (folder / name).write_text("not of a cache")
    (folder / "answers-0123456789abcdef-000001.safetensors.d").mkdir()
    cache_jobs.fill(folder, range(3))
    assert Cache(folder).sizes().entries == 3 and all((folder / name).exists() for name in others)
    assert verify(folder)[1] == []


def test_a_file_of_another_cache_is_refused(one_file, tmp_path):
    other = tmp_path / "other"
    CacheWriter(other, replace(SMALL, weights="cd")).close()
    shutil.copy(one_file, other)
    with pytest.raises(
        CacheError, match="header: expected [0-9a-f]{12} as the header of the cache, got [0-9a-f]{12};"
    ):
        Cache(other)


def test_a_file_that_goes_before_it_is_opened_is_no_error(one_file, monkeypatch):
    names = files.answer_names(one_file.parent)
    monkeypatch.setattr(files, "answer_names", lambda folder: names)
    one_file.unlink()
    cache = Cache(one_file.parent)
    assert key(0) not in cache and cache.files == []


def test_a_file_that_cannot_be_opened_is_not_called_damaged(one_file):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with pytest.raises(CacheError) as said:
            AnswerFile(one_file, SMALL.content(), SMALL, "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert str(said.value) == f"{one_file}: expected a file that can be read, got Too many open files"


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("what", ["gone", "cut"])
def test_a_file_that_goes_while_it_is_read(one_file, mapped, what):
    """A sentence, where reading the mapping of a file that was cut would end the process."""
    cache = Cache(one_file.parent)
    if mapped:
        assert same(read(cache, 0), answer(SMALL, 0))
    length = one_file.stat().st_size
    if what == "gone":
        one_file.unlink()
        sentence = f"{one_file}: expected a file that can be read, got No such file or directory"
    else:
        os.truncate(one_file, 100)
        sentence = damaged_sentence(one_file, f"length: expected {length} bytes, got 100")
    with pytest.raises(CacheError) as said:
        read(cache, 0)
    assert str(said.value) == sentence


# The command.


def test_verify_and_info(tmp_path, capsys):
    folder, header = tmp_path / "cache", HEADERS["hidden"]
    with CacheWriter(folder, header) as writer:
        for number in (0, 1):
            add(writer, number)
            writer.flush()
        writer.add_head(torch.zeros(37, 5).bfloat16(), files.Shard(0, 37))
        writer.add(key(2), [t[:2] for t in answer(header, 2)], files.Span(0, 2), 5, files.Shard(0, 37))
    size = sum(path.stat().st_size for path in folder.glob("answers-*"))
    holds = f"2 entries (and parts of 1 more), 7 tokens, {size:,} bytes in 3 files"
    assert main(["cache", "--verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: {holds}; no file is damaged\n"
    (folder / f".answers-x.{1 << 22}@{atomic._place()}.tmp").write_text("half")
    assert main(["cache", "--info", str(folder)]) == 0
    lines = dict(
        line.split(None, 1) for line in capsys.readouterr().out.replace("output layer", "output").splitlines()
    )
    assert lines["payload"] == "hidden" and lines["teacher"] == "a teacher" and lines["weights"] == "ab12"
    assert lines["output"] == "states of 5 bfloat16, scale 0.5, softcap 30" and lines["holds"] == holds

    first = Cache(folder).files[0]
    with open(first.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert main(["cache", "--verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"1 file is damaged: {first.path}: expected a whole file" in said
    assert "digest: expected" in said and "bytes in 2 files are right" in said


def test_the_command_without_a_cache(tmp_path, capsys):
    for option in ("--verify", "--info"):
        assert main(["cache", option, str(tmp_path)]) == 1
        assert capsys.readouterr().out.startswith("cache: expected a folder with header.json")
    with pytest.raises(SystemExit) as ended:
        main(["cache"])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(
        "options: expected --write, --info or --verify, got none\n"
    )
