"""The plan against brute force, over layouts drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vcrd.link.plan import (
    Piece,
    Place,
    Shard,
    Span,
    check_boundaries,
    context_rows,
    overlaps,
    pieces_of,
    places,
    replica_of,
    responses,
    students_of,
    vocab_shards,
)

layouts = st.tuples(
    st.integers(1, 9), st.integers(0, 40)
)  # tensor size, columns of padding beyond what is needed


def padded(vocab_size: int, tensor_size: int, extra: int) -> int:
    return -(-(vocab_size + extra) // tensor_size) * tensor_size


def positions(spans: tuple[Span, ...]) -> list[int]:
    return [position for span in spans for position in range(span.start, span.stop)]


# What the ranks of a context-parallel group hold, by the rules of those who split the batches.


def megatron_positions(sequence: int, rank: int, size: int) -> list[int]:
    """As Megatron's get_batch_on_this_cp_rank: view as 2 size chunks, pick two."""
    if size == 1:
        return list(range(sequence))
    chunks = torch.arange(sequence).view(2 * size, sequence // (2 * size))
    return chunks.index_select(0, torch.tensor([rank, 2 * size - 1 - rank])).flatten().tolist()


def packed_positions(boundaries: list[int], rank: int, size: int) -> list[int]:
    """As Transformer Engine's thd_get_partitioned_indices: by where a local token falls in the shortened sequences."""
    if size == 1:
        return list(range(boundaries[-1]))
    local_edges = [edge // size for edge in boundaries]
    found = []
    for token in range(local_edges[-1]):
        which = max(i for i, edge in enumerate(local_edges[:-1]) if edge <= token)
        length = local_edges[which + 1] - local_edges[which]
        within = token - local_edges[which]
        chunk = rank if within < length // 2 else (size - 1) * 2 - rank
        found.append(within + local_edges[which] * size + length // 2 * chunk)
    return found


@st.composite
def packings(draw, most_sequences: int = 5) -> tuple[int, list[int]]:
    """A context-parallel size, and edges of packed sequences that it can cut; sequences may be empty."""
    size = draw(st.integers(1, 5))
    unit = 2 * size if size > 1 else 1
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=most_sequences).filter(any))
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + unit * length)
    return size, edges


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
    context_size=st.integers(1, 5),
    tensor_size=st.integers(1, 5),
)
def test_places_are_every_rank_once_and_one_of_each_data_rank_asks(data_ranks, context_size, tensor_size):
    found = places(data_ranks, context_size, tensor_size)
    # Megatron's order of ranks: tensor fastest, then context, then data.
    assert [((d.data, d.context), d.tensor) for d in found] == [
        ((data, rank // tensor_size), rank % tensor_size)
        for data in data_ranks
        for rank in range(context_size * tensor_size)
    ]
    assert [place.data for place in found if place.is_request_leader] == data_ranks
    assert len({str(place) for place in found}) == len(found)


@given(size=st.integers(1, 6), chunk=st.integers(1, 5))
def test_context_ranks_hold_what_megatron_gives_them(size, chunk):
    sequence = 2 * size * chunk
    for rank in range(size):
        assert positions(context_rows(sequence, rank, size)) == megatron_positions(sequence, rank, size)


@given(packings())
def test_context_ranks_hold_what_transformer_engine_gives_them_of_packed_sequences(packing):
    size, edges = packing
    for rank in range(size):
        assert positions(context_rows(edges[-1], rank, size, edges)) == packed_positions(edges, rank, size)


@given(packings())
def test_context_ranks_hold_every_position_once_and_as_many_each(packing):
    size, edges = packing
    held = [positions(context_rows(edges[-1], rank, size, edges)) for rank in range(size)]
    assert sorted(sum(held, [])) == list(range(edges[-1]))
    assert {len(each) for each in held} == {edges[-1] // size}
    assert all(span.width for rank in range(size) for span in context_rows(edges[-1], rank, size, edges))


@given(st.integers(1, 40), st.integers(1, 4), st.lists(st.integers(-2, 44), max_size=6))
def test_boundaries_are_good_exactly_when_every_sequence_can_be_cut(sequence, size, boundaries):
    edges = boundaries or [0, sequence]
    good = edges[0] == 0 and edges[-1] == sequence and edges == sorted(edges)
    lengths = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    good = good and (size == 1 or not any(length % (2 * size) for length in lengths))
    try:
        check_boundaries(sequence, boundaries, size)
        refused = False
    except ValueError:
        refused = True
    assert refused != good
    if refused:
        with pytest.raises(ValueError):
            context_rows(sequence, 0, size, boundaries)


@dataclass(frozen=True)
class Grid:
    """Both sides, and a micro-batch."""

    vocab_size: int
    teacher: tuple[int, int]
    student: tuple[int, int]
    data_size: int
    replicas: int
    context_size: int
    edges: list[int]

    @property
    def shards(self) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
        return tuple(
            vocab_shards(self.vocab_size, padded(self.vocab_size, *side), side[0])
            for side in (self.teacher, self.student)
        )


@st.composite
def grids(draw) -> Grid:
    context_size, edges = draw(packings(3))
    data_size = draw(st.integers(1, 4))
    small = st.tuples(st.integers(1, 5), st.integers(0, 9))
    return Grid(
        vocab_size=draw(st.integers(1, 30)),
        teacher=draw(small),
        student=draw(small),
        data_size=data_size,
        replicas=draw(st.integers(1, data_size)),
        context_size=context_size,
        edges=edges,
    )


def delivered(grid: Grid, whole: bool) -> dict[Place, list[tuple[int, Piece, list[int]]]]:
    """What each student rank gets of one response: replica, piece and positions, as its teacher's ranks send them."""
    got: dict[Place, list] = {}
    for replica in range(grid.replicas):
        served = students_of(replica, grid.data_size, grid.replicas)
        for place in places(served, grid.context_size, grid.student[0]):
            spans = context_rows(grid.edges[-1], place.context, grid.context_size, grid.edges)
            for piece in pieces_of(place, *grid.shards, whole):
                got.setdefault(place, []).append((replica, piece, positions(spans)))
    return got


@given(grids())
def test_every_element_of_every_student_rank_arrives_once_in_order_from_a_rank_that_holds_it(grid):
    held, wanted = grid.shards
    got = delivered(grid, whole=False)
    assert len(got) == grid.data_size * grid.context_size * grid.student[0]
    for place, pieces in got.items():
        (replica,) = {replica for replica, _, _ in pieces}
        assert replica == replica_of(place.data, grid.data_size, grid.replicas)
        rows = packed_positions(grid.edges, place.context, grid.context_size)
        shard, arrived = wanted[place.tensor], {}
        for _, piece, sent in pieces:
            assert piece.receiver == place.tensor
            assert (
                held[piece.sender].start <= piece.start
                and piece.stop <= held[piece.sender].stop
                or not piece.width
            )
            for row, position in enumerate(sent):
                for column in range(piece.start - shard.start, piece.stop - shard.start):
                    assert (row, column) not in arrived
                    arrived[row, column] = (position, shard.start + column)
        assert arrived == {
            (row, column): (position, shard.start + column)
            for row, position in enumerate(rows)
            for column in range(shard.width)
        }


@given(grids())
def test_a_whole_payload_arrives_once_and_the_senders_take_turns(grid):
    got = delivered(grid, whole=True)
    assert len(got) == grid.data_size * grid.context_size * grid.student[0]
    for place, pieces in got.items():
        ((replica, piece, sent),) = pieces
        assert replica == replica_of(place.data, grid.data_size, grid.replicas)
        assert 0 <= piece.sender < grid.teacher[0] and piece.receiver == place.tensor
        assert sent == packed_positions(grid.edges, place.context, grid.context_size)
    for data in range(grid.data_size):
        loads = [0] * grid.teacher[0]
        for place, ((_, piece, _),) in got.items():
            loads[piece.sender] += place.data == data
        assert max(loads) - min(loads) <= 1


def test_data_ranks_of_one_rank_each_do_not_all_turn_to_one_sender():
    shards = vocab_shards(50, 50, 5), vocab_shards(50, 50, 1)
    senders = [pieces_of(place, *shards, True)[0].sender for place in places(range(5), 1, 1)]
    assert senders == [0, 1, 2, 3, 4]


def test_a_shard_of_padding_only_is_empty():
    assert vocab_shards(5, 12, 4) == (Shard(0, 3), Shard(3, 5), Shard(5, 5), Shard(5, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vocab_shards(0, 4, 2), "vocab_size: expected at least 1, got 0"),
        (lambda: vocab_shards(5, 4, 2), "padded_vocab_size: expected at least vocab_size 5, got 4"),
        (lambda: vocab_shards(5, 8, 3), "tensor_size: expected a divisor of padded_vocab_size 8, got 3"),
        (lambda: replica_of(2, 2, 1), r"data_rank: expected an integer in \[0, 2\), got 2"),
        (
            lambda: replica_of(0, 2, 3),
            "replicas: expected an integer from 1 to the student's data-parallel size 2, got 3",
        ),
        (lambda: students_of(1, 2, 1), r"replica: expected an integer in \[0, 1\), got 1"),
        (lambda: context_rows(8, 2, 2), r"context_rank: expected an integer in \[0, 2\), got 2"),
        (
            lambda: context_rows(6, 0, 2),
            "sequences: expected lengths that are multiples of 4, .* got one of 6 from position 0",
        ),
        (
            lambda: context_rows(8, 0, 2, [0, 4, 6, 8]),
            "sequences: expected lengths that are multiples of 4, .* got one of 2 from position 4",
        ),
        (
            lambda: context_rows(8, 0, 1, [0, 9]),
            r"boundaries: expected ascending edges from 0 to 8, got \[0, 9\]",
        ),
        (lambda: context_rows(8, 0, 1, [0, 5, 4, 8]), "boundaries: expected ascending edges from 0 to 8"),
        (lambda: context_rows(8, 0, 1, [4, 8]), "boundaries: expected ascending edges from 0 to 8"),
    ],
)
def test_impossible_layouts_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
