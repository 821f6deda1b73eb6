"""What travels: encoding, headers, facts and settings, without a process."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vcrd
from vcrd.link import HandshakeRefused, LinkError, LinkSettings, facts, header
from vcrd.link.facts import Facts
from vcrd.link.header import Header, Kind
from vcrd.link.payload import decode, encode, payload_named, row_max

HALF, EXACT, BYTE = (payload_named(name) for name in ("float16", "float32", "logits_8bit"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 10.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_is_bit_exact_and_shares_no_memory(dtype):
    given_logits = logits(5, 2, 33, dtype=dtype)
    wire = encode(EXACT, given_logits)
    assert wire.dtype == torch.float32 and wire.is_contiguous()
    assert torch.equal(decode(EXACT, wire), given_logits.float())
    wire.zero_()
    assert torch.equal(given_logits, logits(5, 2, 33, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 44.0, 1e4])
def test_float16_is_within_its_bound_of_the_distance_from_the_maximum(dtype, scale):
    # Rows enough for several blocks, and a last one that is shorter.
    source = logits(301, 2, 1111, dtype=dtype, scale=scale)
    got = decode(HALF, encode(HALF, source, row_max(source))).double()
    distance = source.double() - source.double().amax(-1, keepdim=True)
    # Rounding of the float32 difference, then of float16; 65504 is its largest number.
    bound = distance.abs() * (2**-11 + 2**-23) + 2**-25
    assert ((got - distance.clamp_min(-65504.0)).abs() <= bound).all()
    assert (got.amax(-1) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 44.0, 1e4])
def test_8bit_is_within_its_bound_of_the_distance_from_the_maximum(dtype, scale):
    source = logits(31, 2, 1111, dtype=dtype, scale=scale)
    codes = decode(BYTE, encode(BYTE, source, row_max(source)))
    assert codes.dtype == torch.uint8 and codes.shape == source.shape
    got = 24 * (codes.double() / 255) ** 2
    distance = (source.double().amax(-1, keepdim=True) - source.double()).clamp_max(24)
    assert ((got - distance).abs() <= 0.0193 * distance.sqrt() + 1e-4).all()
    assert (codes.amin(-1) == 0).all()


def test_8bit_of_a_shard_is_relative_to_the_whole_row():
    source = logits(3, 2, 40)
    top = row_max(source)
    whole = encode(BYTE, source, top)
    parts = [encode(BYTE, part, top) for part in source.split([7, 13, 0, 20], -1)]
    assert torch.equal(torch.cat(parts, -1), whole)
    assert torch.equal(encode(BYTE, source.double(), top), whole)
    # The same columns wherever they lie in memory.
    assert torch.equal(encode(BYTE, source.transpose(0, 1), top.transpose(0, 1)), whole.transpose(0, 1))


def test_the_loss_reads_the_codes_as_the_logits_they_stand_for():
    teacher, student = logits(6, 1, 500, scale=3.0), logits(6, 1, 500, scale=3.0).flip(-1)
    codes = encode(BYTE, teacher, row_max(teacher))
    coded = vcrd.vocab_parallel_divergence(student, codes).divergence
    decoded = vcrd.vocab_parallel_divergence(student, -24 * (codes.float() / 255) ** 2).divergence
    torch.testing.assert_close(coded, decoded)
    exact = vcrd.vocab_parallel_divergence(student, teacher).divergence
    assert (coded - exact).abs().max() < 0.02


def test_float16_of_a_shard_is_relative_to_the_whole_row():
    source = logits(3, 2, 40)
    top = row_max(source)
    whole = encode(HALF, source, top)
    parts = [encode(HALF, part, top) for part in source.split([7, 13, 20], -1)]
    assert torch.equal(torch.cat(parts, -1), whole)
    assert torch.equal(encode(HALF, source[..., 7:7], top), whole[..., 7:7])


def test_float16_stays_finite_for_infinite_logits():
    inf = torch.inf
    source = torch.tensor([[0.0, -inf, -1e30], [-inf, -inf, -inf], [1e30, -1e30, 0.0], [inf, 0.0, 1.0]])[
        :, None
    ]
    got = encode(HALF, source, row_max(source))
    assert got.isfinite().all()
    assert got[0, 0].tolist() == [0.0, -65504.0, -65504.0]
    assert got[2, 0, 0] == 0


def test_a_row_without_a_column_has_a_maximum_that_no_other_is_below():
    top = row_max(logits(2, 3, 0))
    assert top.shape == (2, 3, 1)
    assert (top == torch.finfo(torch.float32).min).all()


def test_a_relative_payload_needs_the_maximum():
    for payload in (HALF, BYTE):
        with pytest.raises(ValueError, match=f"top must be given for the relative payload '{payload.name}'"):
            encode(payload, logits(2, 2, 4))


fields = st.integers(0, (1 << 48) - 1)


@given(st.builds(Header, st.sampled_from(list(Kind)), fields, fields, fields, fields, fields, fields))
def test_headers_come_back_as_they_were(good):
    assert header.parse(good.tensor()) == good


@given(
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=header.LENGTH, max_size=header.LENGTH),
    st.data(),
)
def test_any_other_ten_numbers_are_a_header_or_are_refused(values, data):
    # Mostly a good header with a few numbers exchanged, since ten random ones never get past the mark.
    good = Header(Kind.RESPONSE, 3, 4, 5, 6, 7, 1).tensor()
    exchanged = data.draw(st.lists(st.integers(0, header.LENGTH - 1), max_size=3))
    for place in exchanged:
        good[place] = values[place]
    try:
        parsed = header.parse(good)
    except LinkError:
        return
    assert torch.equal(parsed.tensor(), good)


FACTS = Facts(
    vocab_size=50,
    sequence_length=16,
    payload="float16",
    max_tokens=64,
    padded_vocab_size=64,
    tensor_size=2,
    copies=2,
)


def test_text_that_is_nested_without_end_is_refused():
    with pytest.raises(HandshakeRefused, match="the teacher's facts cannot be read"):
        facts.read(b"[" * 4096, "teacher")


def test_facts_come_back_as_they_were():
    assert facts.read(FACTS.text().encode(), "student") == FACTS


@given(
    st.one_of(
        st.binary(), st.text().map(str.encode), st.builds(lambda v: json.dumps(v).encode(), st.integers())
    )
)
def test_any_other_text_is_refused(text):
    with pytest.raises(HandshakeRefused, match="the teacher's facts cannot be read"):
        facts.read(text, "teacher")


@pytest.mark.parametrize(
    "change", [{"vocab_size": "50"}, {"vocab_size": True}, {"copies": 1 << 60}, {"payload": 3}, {"more": 1}]
)
def test_facts_of_the_wrong_kind_are_refused(change):
    with pytest.raises(HandshakeRefused, match="are not those of protocol"):
        facts.read(json.dumps(asdict(FACTS) | change).encode(), "teacher")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vocab_size": 49}, "vocab_size is 50 for the student and 49 for the teacher"),
        ({"sequence_length": 8}, "sequence_length is 16 for the student and 8 for the teacher"),
        ({"payload": "float32"}, "payload is float16 for the student and float32 for the teacher"),
        ({"max_tokens": 65}, "max_tokens is 64 for the student and 65 for the teacher"),
        ({"protocol": 7}, "protocol version is 1 for the student and 7 for the teacher"),
        ({"copies": 3}, "one teacher replica counts 2 replicas, another 3; 3 teacher replicas are more than"),
        ({"copies": 0}, "for the teacher copies must be at least 1, got 0"),
        ({"intake_sender": 2}, "for the teacher intake_sender must be below tensor_size 2, got 2"),
        ({"tensor_size": 3}, "for the teacher tensor_size must divide padded_vocab_size 64, got 3"),
    ],
)
def test_a_misfit_is_named(change, reason):
    assert reason in facts.refusal(FACTS, replace(FACTS, **change), replicas=2)


def test_unequal_padding_and_layouts_are_no_misfit():
    assert facts.refusal(FACTS, replace(FACTS, padded_vocab_size=51, tensor_size=3), replicas=2) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": "nowhere"}, "address must be 'host:port'"),
        ({"address": "host:0"}, "port from 1 to 65535"),
        ({"payload": "bfloat16"}, "payload must be one of float16, float32, logits_8bit, got 'bfloat16'"),
        ({"credits": 0}, "credits must be an integer of at least 1, got 0"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ({"name": "a/b"}, "name must be a non-empty text without '/'"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LinkSettings(**change)


def test_addresses_are_taken_apart():
    assert (LinkSettings().host, LinkSettings().port) == ("127.0.0.1", 29600)
    assert (LinkSettings(address="[::1]:80").host, LinkSettings(address="[::1]:80").port) == ("::1", 80)
