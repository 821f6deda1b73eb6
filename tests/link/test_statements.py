"""Headers, what each side states about itself, and settings: what is good comes back, all else is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vcrd.link import HandshakeRefused, Head, LinkError, LinkSettings, handshake
from vcrd.link import connection as wire
from vcrd.link.connection import Header, Kind
from vcrd.link.handshake import Handshake
from vcrd.link.rendezvous import candidates

fields = st.integers(0, (1 << 48) - 1)
texts = {Kind.LOST: st.integers(0, wire.LONGEST_TEXT)}


@st.composite
def good_headers(draw) -> Header:
    kind = draw(st.sampled_from(list(Kind)))
    return Header(kind, *(draw(fields) for _ in range(8)), length=draw(texts.get(kind, st.just(0))))


@given(good_headers())
def test_headers_come_back_as_they_were(good):
    raw = good.pack()
    assert len(raw) == wire.HEADER_BYTES and wire.parse_header(raw) == good


@given(
    good_headers(),
    st.lists(st.tuples(st.integers(0, wire.HEADER_BYTES - 1), st.integers(0, 255)), max_size=4),
)
def test_any_other_bytes_are_a_header_or_are_refused(good, exchanged):
    # A good header with a few bytes exchanged: random ones never get past the mark.
    raw = bytearray(good.pack())
    for place, value in exchanged:
        raw[place] = value
    try:
        parsed = wire.parse_header(bytes(raw))
    except LinkError:
        return
    assert parsed.pack() == bytes(raw)


HANDSHAKE = Handshake(
    vocab_size=50,
    sequence_length=16,
    payload="float16",
    max_tokens=64,
    padded_vocab_size=64,
    tensor_size=2,
    copies=2,
)
HIDDEN = replace(HANDSHAKE, payload="hidden", head=Head(8, "bfloat16", 0.5, 30.0))


@pytest.mark.parametrize(
    "stated", [HANDSHAKE, HIDDEN, replace(HANDSHAKE, payload="topk", top_k=9, context_size=4)]
)
def test_facts_come_back_as_they_were(stated):
    assert handshake.read(json.loads(json.dumps(stated.plain())), "student") == stated


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(json_values)
def test_anything_else_is_refused(value):
    with pytest.raises(HandshakeRefused, match="the teacher's handshake cannot be read"):
        handshake.read(value, "teacher")


@given(st.sampled_from([HANDSHAKE, HIDDEN]), st.data(), json_values)
def test_facts_with_one_field_exchanged_are_read_or_refused(stated, data, value):
    plain = stated.plain()
    within = plain["head"] if stated.head and data.draw(st.booleans()) else plain
    within[data.draw(st.sampled_from([*within, "more"]))] = value
    try:
        read = handshake.read(plain, "teacher")
    except HandshakeRefused:
        return
    handshake.refusal(HANDSHAKE, read, replicas=2)  # may refuse, and does not fail
    assert read.protocol != wire.PROTOCOL or read.plain() == plain


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": "50"},
        {"vocab_size": True},
        {"copies": 1 << 60},
        {"payload": 3},
        {"more": 1},
        {"head": {}},
        {"head": []},
        {"head": asdict(HIDDEN.head) | {"size": 1 << 17}},
        {"head": asdict(HIDDEN.head) | {"scale": float("nan")}},
        {"head": asdict(HIDDEN.head) | {"dtype": []}},
        # Numbers that would take for ever to walk through, or all the memory there is.
        {"padded_vocab_size": 1 << 40, "tensor_size": 1 << 40},
        {"padded_vocab_size": 1 << 30, "tensor_size": 1 << 30},
        {"context_size": 1 << 30},
        {"copies": 1 << 12, "context_size": 1 << 12},
    ],
)
def test_facts_of_the_wrong_kind_are_refused(change):
    with pytest.raises(HandshakeRefused, match="handshake is not that of protocol"):
        handshake.read(HANDSHAKE.plain() | change, "teacher")


def test_facts_of_another_protocol_are_refused_for_that_alone():
    other = handshake.read({"protocol": 7}, "teacher")
    sentence = f"protocol version is {wire.PROTOCOL} for the student and 7 for the teacher"
    assert handshake.refusal(HANDSHAKE, other, replicas=2) == f"the link is refused: {sentence}"
    with pytest.raises(HandshakeRefused, match="a student rank's protocol version is 7, not"):
        handshake.read({"protocol": 7}, "student")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": 49}, "vocab_size is 50 for the student and 49 for the teacher"),
        ({"sequence_length": 8}, "sequence_length is 16 for the student and 8 for the teacher"),
        ({"payload": "float32"}, "payload is float16 for the student and float32 for the teacher"),
        ({"payload": "none"}, "the teacher's payload: expected one of float16, float32"),
        ({"max_tokens": 65}, "max_tokens is 64 for the student and 65 for the teacher"),
        ({"top_k": 3}, "top_k is 0 for the student and 3 for the teacher"),
        ({"copies": 3}, "one teacher replica counts 2 replicas, another 3; 3 teacher replicas are more than"),
        ({"copies": 0}, "the teacher's copies: expected at least 1, got 0"),
        ({"tensor_size": 3}, "the teacher's tensor_size: expected a divisor of padded_vocab_size 64, got 3"),
        ({"tensor_size": 0}, "the teacher's tensor_size: expected at least 1, got 0"),
        ({"head": HIDDEN.head}, "the teacher states an output layer with the payload 'float16'"),
        ({"payload": "hidden"}, "the teacher states no output layer with the payload 'hidden'"),
    ],
)
def test_a_misfit_is_named(change, reason):
    assert reason in handshake.refusal(HANDSHAKE, replace(HANDSHAKE, **change), replicas=2)


def test_unequal_padding_and_layouts_are_no_misfit():
    assert (
        handshake.refusal(HANDSHAKE, replace(HANDSHAKE, padded_vocab_size=51, tensor_size=3), replicas=2)
        is None
    )
    student = replace(HANDSHAKE, payload="hidden", context_size=4, credits=3)
    assert handshake.refusal(student, HIDDEN, replicas=2) is None


LAYOUT = dict(vocab_size=50, padded_vocab_size=64, sequence_length=16, tensor_size=2, copies=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"vocab_size": 50.0}, "vocab_size: expected an integer of at least 0, got 50.0"),
        ({"vocab_size": "50"}, "vocab_size: expected an integer of at least 0, got '50'"),
        ({"padded_vocab_size": 1 << 33}, "padded_vocab_size: expected at most 2147483647, got 8589934592"),
        ({"sequence_length": 0}, "sequence_length: expected at least 1, got 0"),
        ({"tensor_size": 3}, "tensor_size: expected a divisor of padded_vocab_size 64, got 3"),
        ({"copies": 1 << 20}, r"ranks: expected at most \d+ in a job, got 1048576 x 1 x 2"),
    ],
)
def test_impossible_facts_are_named_to_their_own_side(change, message):
    with pytest.raises(ValueError, match=message):
        Handshake.of(LinkSettings(), **(LAYOUT | change))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ((0, "float32"), "size: expected an integer from 1 to 65536, got 0"),
        ((8, "float64"), "dtype: expected one of float32, bfloat16, float16, got 'float64'"),
        ((8, torch.float32), "dtype: expected one of float32, bfloat16, float16, got torch.float32"),
        ((8, "float32", float("inf")), "scale: expected a finite number, got inf"),
        ((8, "float32", 1.0, -1.0), "softcap: expected a number above 0 or None, got -1.0"),
    ],
)
def test_a_wrong_output_layer_is_named(head, message):
    with pytest.raises(ValueError, match=message):
        Head(*head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"address": "nowhere"},
            r"VCRD_ADDRESS \(--vcrd-address\): expected host:port with a port .*, got 'nowhere'",
        ),
        ({"address": "host:0"}, "port from 1 to 65535"),
        ({"address": "host:²"}, "port from 1 to 65535"),
        ({"address": 29600}, "VCRD_ADDRESS .*: expected a text or None, got int"),
        (
            {"payload": "bfloat16"},
            r"VCRD_PAYLOAD \(--vcrd-payload\): expected one of float16, .*, hidden, got 'bfloat16'",
        ),
        ({"payload": None}, r"VCRD_PAYLOAD .* expected one of .*, got None"),
        ({"credits": -1}, "expected an integer of at least 0, got -1"),
        ({"credits": 2.0}, r"VCRD_CREDITS \(--vcrd-credits\): expected an integer, got float"),
        ({"credits": True}, "expected an integer, got bool"),
        ({"top_k": 0}, "TOP_K .*: expected an integer of at least 1, got 0"),
        ({"sockets": 17}, r"VCRD_SOCKETS .*: expected an integer from 1 to 16, got 17"),
        ({"timeout": 0}, "expected a finite number above 0, got 0"),
        ({"timeout": "10"}, "expected a number, got str"),
        ({"timeout": True}, "expected a number, got bool"),
        ({"timeout": float("nan")}, "expected a finite number above 0, got nan"),
        (
            {"connect_timeout": float("inf")},
            r"VCRD_CONNECT_TIMEOUT .*: expected a finite number above 0, got inf",
        ),
        ({"name": "a/b"}, "VCRD_NAME .*: expected a text without / that is not empty, got 'a/b'"),
        ({"interface": 1}, "VCRD_INTERFACE .*: expected a text or None, got int"),
        ({"secret": b"hush"}, "^VCRD_SECRET: expected a text, got bytes"),
        ({"secret_file": 3}, "VCRD_SECRET_FILE .*: expected a path or None, got int"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LinkSettings(**change)


def test_addresses_are_taken_apart():
    assert candidates(LinkSettings().rendezvous) == [("127.0.0.1", 29600)]
    assert candidates(LinkSettings(address="[::1]:80").address) == [("::1", 80)]
