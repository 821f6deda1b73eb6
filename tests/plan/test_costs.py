"""Seconds, memory and GPUs compared with values by hand, and properties of any run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenarios import GPU, scenario

from vcrd.link import respond
from vcrd.link.transport import tcp
from vcrd.loss import teacher_blocks
from vcrd.plan import costs as module
from vcrd.plan.costs import costs
from vcrd.plan.scenario import MODELS

HEADER = 88


def by_name(**changes) -> dict:
    return {cost.payload: cost for cost in costs(scenario(**changes))}


def test_one_rank_each_by_hand():
    """200 tokens, 1000 columns, states of 512; forward FLOPs of a token 4,204,800 (student), 20,614,400 (teacher)."""
    got = by_name(over_nccl=False)
    assert {name: cost.received - HEADER for name, cost in got.items()} == {
        "float16": 400_000,
        "float32": 800_000,
        "logits_8bit": 200_000,
        "topk": 200 * (10 * 8 + 4),
        "hidden": 200 * 512 * 2,
    }
    assert all(cost.sent == cost.received for cost in got.values())
    assert all(cost.step_bytes == 3 * cost.received for cost in got.values())
    assert {cost.once_bytes for name, cost in got.items() if name != "hidden"} == {0}
    assert got["hidden"].once_bytes == 1000 * 512 * 2 + HEADER
    compute = 3 * 4_204_800 * 200 / 0.25e15
    half = got["float16"]
    assert half.network_seconds == pytest.approx(400_088 / 1e9)
    assert half.loss_seconds == pytest.approx(2 * 400_000 / 4e12)
    assert half.student_seconds == pytest.approx(compute + half.loss_seconds)
    assert half.teacher_seconds == pytest.approx(20_614_400 * 200 / 0.5e15)
    # The network is 40 times slower than both models, so it determines the step.
    assert half.round_seconds == half.network_seconds and half.network_share == 1
    assert half.waiting == pytest.approx(1 - half.student_seconds / half.network_seconds)
    assert half.step_seconds == pytest.approx(3 * half.network_seconds)
    assert half.replicas_needed is None and half.gpus_needed is None and half.least_gpus == 1
    hidden, top = got["hidden"], got["topk"]
    # One block of 200 rows, twice: written and read, and a product that takes longer than reading its matrix.
    assert hidden.loss_seconds == pytest.approx(2 * (200_000 * 8 / 4e12 + 2 * 200 * 1000 * 512 / 0.25e15))
    assert hidden.teacher_seconds == pytest.approx((20_614_400 - 2 * 1000 * 512) * 200 / 0.5e15)
    assert top.loss_seconds == pytest.approx(200_000 * 32 / 4e12)
    assert (half.student_gpu_bytes, half.student_host_bytes) == (3 * 400_000, 2 * 400_000)
    assert top.student_gpu_bytes == 3 * 16_800 + 4 * 200_000 + 12 * 10 * 200
    assert hidden.student_gpu_bytes == 3 * 204_800 + 4 * 200_000 + 1000 * 1024
    assert hidden.student_host_bytes == 2 * 204_800 + 1000 * 1024
    assert (half.teacher_gpu_bytes, half.teacher_host_bytes) == (400_088, 4 * 400_088)
    assert hidden.teacher_host_bytes == 4 * 204_888 + 1024 * 1024  # with the padding of the output layer


def test_a_context_costs_the_teacher_its_layers_and_no_output_layer():
    """20 tokens of context for each of 2 x 100: attention over 120, the output layer for the student's 200."""
    plain, got = by_name(), by_name(teacher_context=20)
    output = 2 * 1000 * 512
    each = 2 * (10_000_000 - 1000 * 512) + 2 * 8 * 1024 * 120 - output
    for name, cost in got.items():
        flops = each * 240 + (0 if name == "hidden" else output * 200)
        assert cost.teacher_seconds == pytest.approx(flops / 0.5e15)
        assert (cost.received, cost.sent, cost.student_seconds) == (
            plain[name].received,
            plain[name].sent,
            plain[name].student_seconds,
        )
    assert module.colocated_step_seconds(scenario(teacher_context=20)) > module.colocated_step_seconds(
        scenario()
    )


def test_many_ranks_by_hand():
    """Teacher tp 4 x pp 2, student tp 2 x cp 2 x dp 3: shards of 256 (the last 232) against 512 and 488."""
    got = by_name(
        teacher_tensor=4,
        teacher_pipeline=2,
        student_tensor=2,
        student_context=2,
        student_data=3,
        network=1e15,
        over_nccl=False,
    )
    half, top, hidden = got["float16"], got["topk"], got["hidden"]
    assert half.received == 100 * 512 * 2 + 2 * HEADER  # from two teacher ranks
    assert half.sent == 2 * (100 * 256 * 2 + HEADER)  # to two context ranks
    assert half.step_bytes == 9 * (2 * 200_000 + 8 * HEADER)  # 4 teacher ranks, each to 2 context ranks
    assert (top.received, top.sent) == (100 * 84 + HEADER,) * 2  # in turns
    assert (hidden.received, hidden.sent) == (100 * 1024 + HEADER,) * 2
    assert hidden.once_bytes == 3 * 2 * (1000 * 1024 + 4 * HEADER)
    assert half.student_seconds == pytest.approx(
        3 * 4_204_800 * 200 / (4 * 0.25e15) + 2 * 100 * 512 * 2 / 4e12
    )
    # One replica serves three data ranks, two replicas at most two: both are too slow. Three: groups of 2 in 2 stages.
    each = 20_614_400 * 200 / (8 * 0.5e15)
    assert 2 * each * 5 / 4 > half.student_seconds > each * 3 / 2
    assert (half.replicas_needed, half.gpus_needed, half.replicas) == (3, 24, 3)
    assert half.teacher_seconds == pytest.approx(each * 3 / 2)
    assert half.waiting == 0 and half.round_seconds == half.student_seconds
    assert half.student_host_bytes == 2 * 102_400 + 2 * 100 * 256 * 2  # two pieces are assembled
    assert top.student_gpu_bytes == 3 * 8_400 + 4 * 512 * 100 + 12 * 10 * 100
    # With one replica the student waits for the teacher: groups of 4 in 2 stages, three data ranks.
    slow = by_name(
        teacher_tensor=4,
        teacher_pipeline=2,
        student_tensor=2,
        student_context=2,
        student_data=3,
        network=1e15,
        over_nccl=False,
        replicas=1,
    )["float16"]
    assert slow.round_seconds == pytest.approx(3 * each * 5 / 4)
    assert (slow.replicas_needed, slow.replicas) == (3, 1)


def test_over_nccl_answers_are_on_the_gpus():
    layout = dict(teacher_tensor=4, student_tensor=2, student_context=2, student_data=3)
    tcp, nccl = by_name(**layout, over_nccl=False), by_name(**layout)
    half = nccl["float16"]
    assert (half.received, half.sent) == (tcp["float16"].received, tcp["float16"].sent)
    assert (
        half.student_gpu_bytes == 3 * 102_400 + 2 * 100 * 256 * 2
    )  # and two buffers, each for a whole piece
    assert half.teacher_gpu_bytes == 4 * half.sent
    assert half.student_host_bytes == half.teacher_host_bytes == 0
    assert nccl["topk"].student_gpu_bytes == tcp["topk"].student_gpu_bytes  # it arrives in one piece
    # The output layer comes over the connection.
    assert nccl["hidden"].student_host_bytes == 512 * 1024
    assert nccl["hidden"].teacher_host_bytes == 256 * 1024
    # PCIe of 1 MB/s slows only TCP.
    slow = replace(GPU, host=1e6)
    assert by_name(student_gpu=slow, network=1e15)["float16"].waiting == 0
    assert by_name(student_gpu=slow, network=1e15, over_nccl=False)["float16"].waiting > 0.9


def test_recompute_fp8_and_mfu_scale_the_compute():
    plain = by_name()["float16"]
    own = plain.student_seconds - plain.loss_seconds
    recomputed = by_name(recompute=True)["float16"]
    assert recomputed.student_seconds - recomputed.loss_seconds == pytest.approx(own * 4 / 3)
    narrow = by_name(student_fp8=True, teacher_fp8=True)["float16"]
    assert narrow.student_seconds - narrow.loss_seconds == pytest.approx(own / 2)
    assert narrow.teacher_seconds == pytest.approx(plain.teacher_seconds / 2)
    assert by_name(teacher_mfu=0.25)["float16"].teacher_seconds == pytest.approx(2 * plain.teacher_seconds)


def test_memory_limits_a_small_block_of_the_product():
    """151936 columns of 4096: 53 rows a block, each of which reads 1.24 GB: 77 blocks and one of 15 rows for 4096."""
    hidden = by_name(teacher=MODELS["Qwen3-8B"], student=MODELS["Qwen3-8B"], sequence=4096, batch=1)["hidden"]
    assert module.block_rows(151_936) == 53
    matrix = 2 * 151_936 * 4096
    assert 2 * 53 * 151_936 * 4096 / 0.25e15 < matrix / 4e12
    assert hidden.loss_seconds == pytest.approx(2 * (4096 * 151_936 * 8 / 4e12 + 78 * matrix / 4e12))


runs = st.fixed_dictionaries(
    {
        "teacher_tensor": st.integers(1, 4),
        "teacher_pipeline": st.integers(1, 3),
        "student_tensor": st.integers(1, 4),
        "student_context": st.sampled_from([1, 2, 5]),
        "student_data": st.integers(1, 7),
        "credits": st.integers(1, 4),
        "over_nccl": st.booleans(),
        "network": st.sampled_from([1e9, 1e11, 1e13]),
        "teacher_mfu": st.sampled_from([0.01, 0.1, 1.0]),
    }
)


@given(runs)
def test_the_needed_replicas_are_the_fewest_without_waiting(changes):
    for cost in costs(scenario(**changes)):
        waits = [
            by_name(**changes, replicas=replicas)[cost.payload].waiting > 1e-12
            for replicas in range(1, changes["student_data"] + 1)
        ]
        fewest = waits.index(False) + 1 if False in waits else None
        assert cost.replicas_needed == fewest
        assert cost.least_gpus <= (cost.gpus_needed or float("inf"))


@given(runs)
def test_shares_are_between_0_and_1(changes):
    for cost in costs(scenario(**changes)):
        assert 0 <= cost.waiting < 1 and 0 < cost.network_share <= 1
        assert cost.received <= cost.step_bytes and cost.student_seconds <= cost.round_seconds


def test_sizes_equal_those_of_other_modules():
    assert module.RESPONSES_UNDER_WAY == respond._UNDER_WAY
    assert module.BLOCK_BYTES == teacher_blocks.BLOCK_BYTES
    assert module.ASSEMBLY_BYTES == tcp._AT_ONCE
