"""The fields of a teacher's context, and where context and padding lie in the teacher's rows."""

from __future__ import annotations

from math import lcm
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vcrd.link.question import NO_CONTEXT
from vcrd.megatron.colocated_teacher import _joined, _parted, _teachers_length
from vcrd.megatron.prefetch import question_of
from vcrd.megatron.teacher_context import (
    CONTEXT_KEY,
    POSITIONS_KEY,
    TeacherRows,
    recorded,
    row_multiple,
    without_fields,
)

ROW = torch.arange(12).view(1, 12)
ROWS = torch.arange(12).view(2, 6)


@st.composite
def micro_batches(draw):
    """Batch, sequence, edges, and the places of a context."""
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.integers(1, 3))
    sequence = draw(st.integers(1, 12))
    edges = [0, *sorted(draw(st.lists(st.integers(0, sequence), max_size=3))), sequence] if packed else []
    places = sorted(draw(st.lists(st.integers(0, batch * sequence - 1), max_size=12)))
    return batch, sequence, edges, places, draw(st.sampled_from([1, 8, 10])), draw(st.sampled_from([1, 4]))


@given(micro_batches())
def test_rows_hold_each_sequence_with_its_context_then_padding(drawn):
    batch, sequence, edges, places, multiple, each = drawn
    rows = TeacherRows.of(
        batch,
        sequence,
        torch.tensor(edges, dtype=torch.int64),
        torch.tensor(places, dtype=torch.int64),
        multiple,
        each,
    )
    count, pad = batch * sequence, 0
    tokens, context = 1 + torch.arange(count), 1001 + torch.arange(len(places))
    found = rows.fill(tokens.view(batch, sequence), context)
    assert tuple(found.shape) == rows.shape and rows.shape[1] % multiple == rows.shape[1] % each == 0
    cuts = edges or list(range(0, count + 1, sequence))
    seen = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        own = []
        for token in range(start, stop):
            own += [1001 + n for n, place in enumerate(places) if place == token]
            own.append(1 + token)
        seen.append(own)
    if edges:
        longer = [own + [pad] * (-len(own) % each) for own in seen]
        ends = torch.tensor([len(own) for own in longer]).cumsum(0).tolist()
        left = rows.shape[1] - ends[-1]
        assert left < lcm(multiple, each)
        assert found[0].tolist() == [token for own in longer for token in own] + [pad] * left
        assert rows.edges.tolist() == [0, *ends, *([rows.shape[1]] if left else [])]
    else:
        assert found.tolist() == [own + [pad] * (rows.shape[1] - len(own)) for own in seen]
        assert not len(rows.edges)
    states = found.t()[..., None].expand(-1, -1, 3)
    assert torch.equal(rows.take(states)[..., 2], tokens.view(batch, sequence).t())


def test_rows_are_as_long_as_the_model_needs():
    def multiple(**config) -> int:
        return row_multiple(SimpleNamespace(**config))

    assert multiple(tensor_model_parallel_size=8, sequence_parallel=False, fp8=None) == 64
    assert multiple(tensor_model_parallel_size=8, sequence_parallel=True, fp8=None) == 64
    assert multiple(tensor_model_parallel_size=6, sequence_parallel=True, fp8=None) == 192
    assert multiple(tensor_model_parallel_size=8, sequence_parallel=True, fp8="hybrid") == 256
    assert multiple(tensor_model_parallel_size=8, sequence_parallel=False, fp8="hybrid") == 64


def question(tokens: torch.Tensor = ROWS, arguments=None, **fields):
    return question_of({"tokens": tokens, **fields}, "tokens", arguments)


@pytest.mark.parametrize(
    ("given", "tokens", "places"),
    [
        ({CONTEXT_KEY: torch.tensor([[5, 6], [7, -1]])}, [5, 6, 7], [0, 0, 6]),
        ({CONTEXT_KEY: torch.tensor([[-1, 5], [-1, -1]], dtype=torch.int32)}, [5], [0]),
        ({CONTEXT_KEY: [torch.tensor([5]), []], POSITIONS_KEY: [[3], []]}, [5], [3]),
        (
            {CONTEXT_KEY: torch.tensor([[5, 6], [7, -1]]), POSITIONS_KEY: torch.tensor([[2, 5], [4, -1]])},
            [5, 6, 7],
            [2, 5, 10],
        ),
        ({CONTEXT_KEY: torch.empty(2, 0, dtype=torch.int64)}, [], []),
        ({CONTEXT_KEY: [[], []]}, [], []),
        ({CONTEXT_KEY: None}, [], []),
        ({}, [], []),
    ],
)
def test_fields_of_rows(given, tokens, places):
    context = question(**given).context
    assert context.tokens.tolist() == tokens and context.places.tolist() == places
    assert context.tokens.dtype == context.places.dtype == torch.int64


@pytest.mark.parametrize("edges", [[0, 4, 12], [[0, 4, 12, -1]]])
def test_fields_of_packed_sequences(edges):
    fields = {CONTEXT_KEY: [[5], [6, 7]], POSITIONS_KEY: [[3], [0, 7]]}
    context = question(ROW, cu_seqlens=torch.tensor(edges), **fields).context
    assert context.tokens.tolist() == [5, 6, 7] and context.places.tolist() == [3, 4, 11]


def test_the_padding_at_the_end_of_a_packed_row_needs_no_entry():
    context = question(ROW, cu_seqlens=torch.tensor([0, 4, 9]), **{CONTEXT_KEY: [[5], [6]]}).context
    assert context.places.tolist() == [0, 4]
    with pytest.raises(ValueError, match=f"{CONTEXT_KEY}: expected .* a list of 2 tensors .*, got 1"):
        question(ROW, cu_seqlens=torch.tensor([0, 4, 12]), **{CONTEXT_KEY: [[5]]})


def test_edges_that_the_step_makes_count_for_the_context():
    arguments = {
        "input_ids": ROW,
        "packed_seq_params": SimpleNamespace(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4, 12])),
    }
    context = question(ROWS, arguments, **{CONTEXT_KEY: [[5], [6]]}).context
    assert context.places.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {CONTEXT_KEY: torch.zeros(2, 2)},
            r"vcrd_teacher_context: expected integers \[2, c\].*, got torch.float32",
        ),
        (
            {CONTEXT_KEY: torch.ones(2, 2, dtype=torch.bool)},
            "vcrd_teacher_context: expected .*, got torch.bool",
        ),
        (
            {CONTEXT_KEY: torch.zeros(3, 2, dtype=torch.int64)},
            r"vcrd_teacher_context: expected .*, got \[3, 2\]",
        ),
        ({CONTEXT_KEY: torch.zeros(2, dtype=torch.int64)}, r"vcrd_teacher_context: expected .*, got \[2\]"),
        ({CONTEXT_KEY: [[1]]}, "vcrd_teacher_context: expected .* a list of 2 tensors .*, got 1"),
        ({CONTEXT_KEY: 3, "cu_seqlens": torch.tensor([[0, 6], [0, 6]])}, "vcrd_teacher_context: .*, got int"),
        ({CONTEXT_KEY: "abcd"}, "vcrd_teacher_context: expected .*, got str"),
        ({CONTEXT_KEY: ["ab", "cd"]}, "vcrd_teacher_context: expected .*, got 'ab'"),
        ({CONTEXT_KEY: [[[1]], []]}, r"vcrd_teacher_context: expected .*, got torch.int64 \[1, 1\]"),
        ({CONTEXT_KEY: [[-2], []]}, "vcrd_teacher_context: expected tokens, and -1 for padding, got -2"),
        (
            {POSITIONS_KEY: [[0], [0]]},
            "vcrd_teacher_context: expected in the micro-batch, beside vcrd_teacher_context_positions, got none",
        ),
        (
            {CONTEXT_KEY: [[5], []], POSITIONS_KEY: [[0, 0], []]},
            "vcrd_teacher_context_positions: expected as many positions .*, got 2 for the 1 of sequence 0",
        ),
        (
            {CONTEXT_KEY: [[], [5]], POSITIONS_KEY: [[], [6]]},
            r"vcrd_teacher_context_positions: expected positions from 0 to 5 .* sequence 1, got \[6\]",
        ),
        (
            {CONTEXT_KEY: [[], [5, 6]], POSITIONS_KEY: [[], [3, 2]]},
            r"vcrd_teacher_context_positions: expected .* do not descend, for sequence 1, got \[3, 2\]",
        ),
        (
            {CONTEXT_KEY: torch.tensor([[5], [6]]), POSITIONS_KEY: torch.tensor([[0.0], [1.0]])},
            "vcrd_teacher_context_positions: expected .*, got torch.float32",
        ),
    ],
)
def test_wrong_fields_are_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        question(**given)


def test_a_script_does_not_see_the_fields():
    batch = {"tokens": ROWS, CONTEXT_KEY: [[], []], POSITIONS_KEY: [[], []], "vcrd_teacher": ["a", "b"]}
    drawn: list = []
    found = list(without_fields(recorded(iter([batch, (batch,)]), drawn)))
    assert found == [{"tokens": ROWS}, (batch,)]
    assert drawn == [batch, (batch,)] and drawn[0] is not batch
    assert without_fields(None) is None and recorded(None, drawn) is None
    assert question().context is NO_CONTEXT


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 4))
def test_the_shape_of_both_models_states_tells_the_teachers_length(length, batch, own, others, extra):
    """Where lengths are multiples of a unit of at least length / size."""
    unit = -(-length // others)
    longer = -(-length // unit) * unit + (extra - 1) * unit
    student = torch.randn(length, batch, own)
    for t in {length, longer} - set(range(length)):
        teacher = torch.randn(t, batch, others)
        both = _joined(student, teacher)
        assert both.shape == (length, batch, own + -(-t * others // length))
        assert torch.equal(both[..., :own], student)
        assert _teachers_length(both, own, others, unit) == t
        assert torch.equal(_parted(both[..., own:], t, others), teacher)
    assert _teachers_length(both[..., : own + others - 1], own, others, unit) is None
