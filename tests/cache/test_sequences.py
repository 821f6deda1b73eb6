"""The sequences of a micro-batch, and what each rank holds of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vcrd.cache.sequences import Part, held_by, parts_of, question_about
from vcrd.link.plan import context_rows
from vcrd.link.question import Context


@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any))
def test_a_rank_holds_its_positions_of_each_packed_sequence_in_the_order_of_the_micro_batch(size, lengths):
    unit = 1 if size == 1 else 2 * size
    edges = torch.tensor([0, *(unit * length for length in lengths)]).cumsum(0).tolist()
    parts = parts_of(1, edges[-1], edges)
    assert [part.width for part in parts] == [unit * length for length in lengths if length]
    for rank in range(size):
        wanted = [
            n for span in context_rows(edges[-1], rank, size, edges) for n in range(span.start, span.stop)
        ]
        found: dict[int, int] = {}
        for part in parts:
            held = held_by(part, rank, size)
            own = [part.start + n for span in held.rows for n in range(span.start, span.stop)]
            assert all(a.stop != b.start for a, b in zip(held.rows, held.rows[1:], strict=False))
            found |= dict(zip(range(held.here.start, held.here.stop), own, strict=True))
        assert [found[place] for place in range(len(wanted))] == wanted


def test_a_row_is_a_sequence_and_has_its_own_context():
    tokens = torch.arange(12).view(2, 6)
    assert parts_of(2, 6, []) == [Part(0, 0, 6), Part(1, 0, 6)]
    context = Context(torch.tensor([50, 51, 52, 53]), torch.tensor([0, 5, 6, 9]))
    own, seen = question_about(Part(1, 0, 6), tokens, context)
    assert own.tolist() == [6, 7, 8, 9, 10, 11]
    assert seen.tokens.tolist() == [52, 53] and seen.places.tolist() == [0, 3]
    own, seen = question_about(Part(0, 4, 9), tokens.view(1, 12), context)
    assert own.tolist() == [4, 5, 6, 7, 8]
    assert seen.tokens.tolist() == [51, 52] and seen.places.tolist() == [1, 2]
