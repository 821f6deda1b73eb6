"""What travels: encoding and top k, without a link."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from link_jobs import Jobs

import vcrd
from vcrd.link.payload import PAYLOADS, encode, payload_named, row_max, top_k_of
from vcrd.link.plan import Shard, vocab_shards

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
    assert torch.equal(wire, given_logits.float())
    wire.zero_()
    assert torch.equal(given_logits, logits(5, 2, 33, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 44.0, 1e4])
def test_float16_is_within_its_bound_of_the_distance_from_the_maximum(dtype, scale):
    # Rows enough for several blocks, and a last one that is shorter.
    source = logits(301, 2, 1111, dtype=dtype, scale=scale)
    got = encode(HALF, source, row_max(source)).double()
    distance = source.double() - source.double().amax(-1, keepdim=True)
    # Rounding of the float32 difference, then of float16; 65504 is its largest number.
    bound = distance.abs() * (2**-11 + 2**-23) + 2**-25
    assert ((got - distance.clamp_min(-65504.0)).abs() <= bound).all()
    assert (got.amax(-1) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 44.0, 1e4])
def test_8bit_is_within_its_bound_of_the_distance_from_the_maximum(dtype, scale):
    source = logits(31, 2, 1111, dtype=dtype, scale=scale)
    codes = encode(BYTE, source, row_max(source))
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


def test_a_row_without_a_distribution_is_marked_from_end_to_end():
    inf = torch.inf
    source = torch.tensor([[0.0, -inf, -1e30], [-inf, -inf, -inf], [1e30, -1e30, 0.0], [inf, 0.0, 1.0]])
    source = torch.cat([source, torch.tensor([[0.0, torch.nan, 1.0]])])[:, None]
    top = row_max(source)
    assert top.flatten().isnan().tolist() == [False, True, False, True, True]
    got = encode(HALF, source, top)[:, 0]
    assert got[0].tolist() == [0.0, -65504.0, -65504.0]
    assert got[2, 0] == 0 and got[2].isfinite().all()
    assert got[[1, 3, 4]].isnan().all()
    codes = encode(BYTE, source, top)[:, 0]
    assert (codes[[1, 3, 4]] == 255).all() and (codes[[0, 2]].amin(-1) == 0).all()


def test_a_row_without_a_column_is_of_the_maximum_of_its_other_shards():
    top = row_max(logits(2, 3, 0))
    assert top.shape == (2, 3, 1) and top.isnan().all()


def test_a_relative_payload_needs_the_maximum():
    for payload in (HALF, BYTE):
        with pytest.raises(
            ValueError, match=f"top: expected the row maxima for the relative payload '{payload.name}'"
        ):
            encode(payload, logits(2, 2, 4))


@pytest.mark.parametrize("name", [payload.name for payload in PAYLOADS])
def test_bytes_are_those_of_the_tensors_that_travel(name):
    payload = payload_named(name).sized(top_k=5, state_size=6, state_dtype=torch.float16)
    blank = payload.blank(3, 2, 7)
    assert payload.bytes(3 * 2, 7) == sum(each.numel() * each.element_size() for each in blank)
    assert [each.shape[:2] for each in blank] == [(3, 2)] * len(blank)
    assert payload.whole == (name in ("topk", "hidden"))
    if name == "topk":
        return
    source = logits(3, 2, 6 if name == "hidden" else 7)
    wire = encode(payload, source, row_max(source))
    assert (wire.shape, wire.dtype) == (blank[0].shape, blank[0].dtype)
    assert wire.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def test_an_unknown_payload_is_named_with_those_that_there_are():
    with pytest.raises(
        ValueError, match="payload: expected one of float16, float32, logits_8bit, topk, hidden, got 'bf16'"
    ):
        payload_named("bf16")


# The top k, against float64 on the whole row.


def check_top_k(got: tuple[torch.Tensor, ...], source: torch.Tensor, k: int) -> None:
    values, tokens, rest = got
    truth = source.double()
    order = truth.sort(dim=-1, descending=True, stable=True).indices  # of equal ones the smaller token first
    assert torch.equal(tokens, order[..., :k].int())
    logprobs = truth.log_softmax(-1)
    wanted = logprobs.gather(-1, order[..., :k])
    tail = logprobs.gather(-1, order[..., k:])
    tail = tail.logsumexp(-1) if k < truth.shape[-1] else torch.full_like(rest, -torch.inf).double()
    assert values.dtype == rest.dtype == torch.float32
    assert values.shape == wanted.shape and rest.shape == source.shape[:-1]
    for mine, true in ((values, wanted), (rest, tail)):
        assert torch.equal(mine.isinf(), true.isinf())
        error = (mine.double() - true)[true.isfinite()].abs()
        assert (error <= 1e-6 * (1 + true[true.isfinite()].abs())).all()


@given(
    vocab=st.integers(1, 40) | st.integers(1000, 5000),
    share=st.floats(0, 1),
    few=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    levels=st.sampled_from([0, 2, 9]),
    seed=st.integers(0, 1 << 30),
)
def test_top_k_is_that_of_float64(vocab, share, few, scale, dtype, levels, seed):
    k = min(vocab, 3) if few else max(1, round(share * vocab))
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(2, 2, vocab, generator=generator) * scale
    if levels:  # few different values, so that many are equal
        source = torch.randint(levels, (2, 2, vocab), generator=generator) * scale - scale
    source = source.clamp(-6e4, 6e4)  # float16 has no larger numbers
    source = source.to(dtype).float().to(dtype)  # float64 logits that float32 holds
    before = source.clone()
    check_top_k(top_k_of(source, k, Shard(0, vocab), None), source, k)
    assert torch.equal(source, before)


def test_logits_of_minus_infinity_have_no_mass():
    source = logits(4, 1, 50)
    source[..., 1::2] = -torch.inf
    source[3, 0, 1:] = -torch.inf  # one token has it all
    for k in (1, 5, 25, 30, 50):
        check_top_k(top_k_of(source, k, Shard(0, 50), None), source, k)


def test_rounding_makes_no_token_equal_to_the_best():
    """The best token is the teacher's action: a logarithm of 5.3 has not the digits that tell these logits apart."""
    source = torch.full((3, 1, 300), 0.125)
    source[0, 0, 7], source[1, 0, 250] = (torch.nextafter(torch.tensor(0.125), torch.tensor(1.0)),) * 2
    for k in (1, 2, 200, 300):
        got = top_k_of(source, k, Shard(0, 300), None)
        check_top_k(got, source, k)
        values, tokens, _ = got
        assert tokens[:, 0, 0].tolist() == [7, 250, 0]
        assert (values[:2, 0, 1:] < values[:2, 0, :1]).all() and (values[2] == values[2, 0, 0]).all()


def test_the_two_zeros_are_equal():
    source = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0]).view(1, 1, 5)
    assert top_k_of(source, 3, Shard(0, 5), None)[1].flatten().tolist() == [0, 1, 2]


def test_a_tail_of_almost_nothing_keeps_its_digits():
    source = torch.zeros(1, 1, 1000)
    source[..., 0] = 60.0
    _, _, rest = top_k_of(source, 1, Shard(0, 1000), None)
    # 999 exp(-60): nothing is left of it in 1 minus a probability.
    torch.testing.assert_close(rest.double().exp().item(), 999 * 8.75651076269652e-27, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("k", [1, 3, 2000])
def test_a_row_without_a_distribution_is_nan_and_spoils_no_other(bad, k):
    source = logits(3, 1, 2000)
    source[1, 0, 700] = bad
    values, tokens, rest = top_k_of(source, k, Shard(0, 2000), None)
    assert values[1].isnan().any()
    assert len(set(tokens[1, 0].tolist())) == k and 0 <= tokens[1].min() and tokens[1].max() < 2000
    others = torch.tensor([0, 2])
    check_top_k((values[others], tokens[others], rest[others]), source[others], k)


def test_a_row_of_minus_infinity_is_nan():
    values, tokens, rest = top_k_of(torch.full((1, 1, 9), -torch.inf), 4, Shard(0, 9), None)
    assert values.isnan().all() and rest.isnan().all() and tokens.flatten().tolist() == [0, 1, 2, 3]


def run_top_k(rank: int, size: int) -> None:
    """Every rank draws the same rows and takes its shard of them."""
    dice = random.Random(size)
    for number in range(40):
        vocab = dice.choice([1, 2, dice.randint(1, 9), dice.randint(10, 200), 3000])
        width = -(-vocab // size) + dice.choice([0, 0, 1, 7, vocab])  # padding: whole shards of it too
        shard = vocab_shards(vocab, width * size, size)[rank]
        k = dice.choice([1, vocab, dice.randint(1, vocab), min(vocab, 4)])
        generator = torch.Generator().manual_seed(number)
        source = 8 * torch.randn(2, 3, vocab, generator=generator)
        source = source.round() if dice.random() < 0.5 else source
        source = source.to(dice.choice(DTYPES))
        if dice.random() < 0.3:
            source[..., 1:] = source[..., 1:].masked_fill(source[..., 1:] < 0, -torch.inf)
        got = top_k_of(source[..., shard.start : shard.stop], k, shard, dist.group.WORLD)
        check_top_k(got, source, k)
        spoilt = source.clone()
        spoilt[0, 0, vocab // 2] = torch.nan
        values = top_k_of(spoilt[..., shard.start : shard.stop], k, shard, dist.group.WORLD)[0]
        assert values[0, 0].isnan().all() and torch.equal(values[1:], got[0][1:])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_top_k_over_shards_is_that_of_the_whole_row_on_every_rank(size, tmp_path):
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", size, run_top_k, size)
        jobs.succeed()


def run_row_max(rank: int, size: int) -> None:
    source = logits(4, 2, 5)
    shard = vocab_shards(5, 8 * size, size)[rank]  # all but the first hold padding only
    shard = slice(shard.start, shard.stop)
    assert torch.equal(row_max(source[..., shard], dist.group.WORLD), source.amax(-1, True))
    source[1, 0, 3], source[2, 1, 4], source[3] = torch.nan, torch.inf, -torch.inf
    bad = row_max(source[..., shard], dist.group.WORLD)[..., 0].isnan()
    assert bad.nonzero().tolist() == [[1, 0], [2, 1], [3, 0], [3, 1]]


def test_the_maximum_is_that_of_the_whole_row_on_every_rank(tmp_path):
    with Jobs(tmp_path) as jobs:
        jobs.world("rank", 3, run_row_max, 3)
        jobs.succeed()
