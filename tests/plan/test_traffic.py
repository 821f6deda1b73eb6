"""The bytes between ranks compared with brute force over positions and columns, for random layouts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vcrd.link.connection import HEADER_BYTES
from vcrd.link.payload import PAYLOADS
from vcrd.link.plan import context_rows, places, students_of
from vcrd.plan.traffic import Traffic, request_bytes

BYTES_PER_COLUMN = {"float16": 2, "float32": 4, "logits_8bit": 1}
TOP_K, STATE = 3, 5


@st.composite
def traffics(draw) -> tuple[Traffic, tuple[int, int], int]:
    """Traffic, a shape of a micro-batch, and a number of replicas."""
    vocab, context = draw(st.integers(3, 60)), draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 4)) for _ in range(2)]
    padded = [-(-(vocab + draw(st.integers(0, 30))) // size) * size for size in sizes]
    data = draw(st.integers(1, 5))
    traffic = Traffic(
        payload=draw(st.sampled_from(PAYLOADS)).sized(top_k=TOP_K, state_size=STATE),
        vocab_size=vocab,
        teacher_padded=padded[0],
        teacher_tensor=sizes[0],
        student_padded=padded[1],
        student_tensor=sizes[1],
        context_size=context,
        data_size=data,
    )
    shape = draw(st.integers(1, 3)) * 2 * context, draw(st.integers(1, 3))
    return traffic, shape, draw(st.integers(1, data))


def columns(vocab: int, padded: int, size: int, rank: int) -> set[int]:
    return {c for c in range(vocab) if c // (padded // size) == rank}


@given(traffics())
def test_each_rank_gets_its_positions_and_columns(drawn):
    traffic, shape, _ = drawn
    sequence, batch = shape
    for place in places(range(traffic.data_size), traffic.context_size, traffic.student_tensor):
        mine = columns(traffic.vocab_size, traffic.student_padded, traffic.student_tensor, place.tensor)
        theirs = [
            mine & columns(traffic.vocab_size, traffic.teacher_padded, traffic.teacher_tensor, rank)
            for rank in range(traffic.teacher_tensor)
        ]
        spans = context_rows(sequence, place.context, traffic.context_size)
        positions = batch * sum(len(range(span.start, span.stop)) for span in spans)
        if traffic.payload.whole:
            # k float32, k int32 and one float32; or a state in bfloat16. From one sender.
            expected = {"topk": 8 * TOP_K + 4, "hidden": 2 * STATE}[traffic.payload.name] * positions
            senders = 1
        else:
            expected = BYTES_PER_COLUMN[traffic.payload.name] * len(mine) * positions
            senders = sum(map(bool, theirs)) or 1  # an empty piece means that there is no data
        expected += HEADER_BYTES * senders
        flows = traffic.response(shape, place.data)
        assert sum(flow.bytes for flow in flows if flow.receiver == place) == expected
        once = HEADER_BYTES if place.is_request_leader else 0
        if traffic.payload.name == "hidden":
            once += 2 * STATE * len(mine) + HEADER_BYTES * sum(map(bool, theirs))
        assert traffic.received_by(place, []) == once
        assert traffic.received_by(place, [shape, shape]) == once + 2 * expected


@given(traffics())
def test_the_sent_bytes_equal_the_received_bytes(drawn):
    traffic, shape, replicas = drawn
    shapes = [shape, (2 * traffic.context_size, 1), shape]
    sent = sum(
        traffic.sent_by(sender, replica, replicas, shapes)
        for replica in range(replicas)
        for sender in range(traffic.teacher_tensor)
    )
    ranks = places(range(traffic.data_size), traffic.context_size, traffic.student_tensor)
    received = sum(traffic.received_by(place, shapes) for place in ranks)
    assert received == sent + HEADER_BYTES * traffic.data_size  # the header that a replica is ready


@given(traffics())
def test_the_busiest_ranks_are_the_busiest(drawn):
    traffic, shape, replicas = drawn
    into: Counter = Counter()
    for rank in range(traffic.data_size):
        for flow in traffic.response(shape, rank):
            into[flow.receiver] += flow.bytes
    assert traffic.into_busiest(shape) == max(into.values())
    out = []
    for replica in range(replicas):
        leaving = Counter({0: 0})
        for rank in students_of(replica, traffic.data_size, replicas):
            for flow in traffic.response(shape, rank):
                leaving[flow.sender] += flow.bytes
        out.append(max(leaving.values()))
    assert traffic.out_of_busiest(shape, replicas) == max(out)


def test_a_request_is_a_header_tokens_boundaries_and_context():
    assert request_bytes((16, 2)) == HEADER_BYTES + 4 * 32
    assert request_bytes((16, 1), boundaries=3) == HEADER_BYTES + 4 * 19
    assert request_bytes((16, 2), context=5) == HEADER_BYTES + 4 * 32 + 8 * 5
