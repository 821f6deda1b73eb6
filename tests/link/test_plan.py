"""The plan against brute force, over layouts drawn at random."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcrd.link.plan import Roster, Shard, overlaps, replica_of, responses, students_of, vocab_shards

layouts = st.tuples(
    st.integers(1, 9), st.integers(0, 40)
)  # tensor size, columns of padding beyond what is needed


def padded(vocab_size: int, tensor_size: int, extra: int) -> int:
    return -(-(vocab_size + extra) // tensor_size) * tensor_size


@given(vocab_size=st.integers(1, 200), layout=layouts)
def test_shards_are_the_true_columns_in_rank_order(vocab_size, layout):
    tensor_size, extra = layout
    padded_vocab_size = padded(vocab_size, tensor_size, extra)
    width = padded_vocab_size // tensor_size
    shards = vocab_shards(vocab_size, padded_vocab_size, tensor_size)
    for rank, shard in enumerate(shards):
        held = [column for column in range(rank * width, (rank + 1) * width) if column < vocab_size]
        assert list(range(shard.start, shard.stop)) == held


@given(vocab_size=st.integers(1, 200), teacher=layouts, student=layouts)
def test_every_true_column_of_every_student_shard_arrives_exactly_once(vocab_size, teacher, student):
    held = vocab_shards(vocab_size, padded(vocab_size, *teacher), teacher[0])
    wanted = vocab_shards(vocab_size, padded(vocab_size, *student), student[0])
    arrived = {
        (rank, column): 0 for rank, shard in enumerate(wanted) for column in range(shard.start, shard.stop)
    }
    for piece in overlaps(held, wanted):
        assert piece.width > 0
        for column in range(piece.start, piece.stop):
            assert held[piece.sender].start <= column < held[piece.sender].stop
            arrived[piece.receiver, column] += 1  # KeyError for a column that is not wanted there
    assert all(count == 1 for count in arrived.values())


@given(vocab_size=st.integers(1, 60), teacher=layouts, student=layouts)
def test_every_student_rank_hears_of_every_response(vocab_size, teacher, student):
    held = vocab_shards(vocab_size, padded(vocab_size, *teacher), teacher[0])
    wanted = vocab_shards(vocab_size, padded(vocab_size, *student), student[0])
    pieces = responses(held, wanted)
    assert {piece.receiver for piece in pieces} == set(range(student[0]))
    assert len({(piece.sender, piece.receiver) for piece in pieces}) == len(pieces)
    assert [piece for piece in pieces if piece.width] == list(overlaps(held, wanted))


@given(data_size=st.integers(1, 60), data=st.data())
def test_replicas_share_the_students_evenly(data_size, data):
    replicas = data.draw(st.integers(1, data_size))
    served = [students_of(replica, data_size, replicas) for replica in range(replicas)]
    assert [rank for group in served for rank in group] == list(range(data_size))
    assert max(map(len, served)) - min(map(len, served)) <= 1
    assert all(replica_of(rank, data_size, replicas) == r for r, group in enumerate(served) for rank in group)


@given(
    data_ranks=st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True),
    student_tensor_size=st.integers(1, 5),
    teacher_tensor_size=st.integers(1, 5),
    data=st.data(),
)
def test_the_roster_seats_everyone_once(data_ranks, student_tensor_size, teacher_tensor_size, data):
    intake_sender = data.draw(st.integers(-1, teacher_tensor_size - 1))
    roster = Roster(tuple(data_ranks), student_tensor_size, teacher_tensor_size, intake_sender)
    students = [roster.student(d, t) for d in data_ranks for t in range(student_tensor_size)]
    senders = [roster.sender(t) for t in range(teacher_tensor_size)]
    intake = [] if intake_sender >= 0 else [roster.intake]
    assert students == list(roster.students)
    assert senders + intake == list(roster.teachers)
    assert students + senders + intake == list(range(roster.size))
    assert intake_sender < 0 or roster.intake == senders[intake_sender]
    assert [roster.seat(rank) for rank in students] == [
        (d, t) for d in data_ranks for t in range(student_tensor_size)
    ]
    assert len({roster.describe(rank) for rank in range(roster.size)}) == roster.size


def test_a_shard_of_padding_only_is_empty():
    assert vocab_shards(5, 12, 4) == (Shard(0, 3), Shard(3, 5), Shard(5, 5), Shard(5, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vocab_shards(0, 4, 2), "vocab_size must be at least 1, got 0"),
        (lambda: vocab_shards(5, 4, 2), "padded_vocab_size must be at least vocab_size 5, got 4"),
        (lambda: vocab_shards(5, 8, 3), "tensor_size must divide padded_vocab_size 8, got 3"),
        (lambda: replica_of(2, 2, 1), r"data_rank must be in \[0, 2\), got 2"),
        (lambda: replica_of(0, 2, 3), "replicas must be from 1 to the student's data-parallel size 2, got 3"),
        (lambda: students_of(1, 2, 1), r"replica must be in \[0, 1\), got 1"),
    ],
)
def test_impossible_layouts_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
