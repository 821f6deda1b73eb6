"""NCCL with one GPU: a pair of one rank that sends to itself, so that streams, events and buffers are tried for real.

Collected where there is a GPU. Two ranks cannot share one: what needs two is tried without NCCL (`test_pairs.py`).
"""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from vcrd.link.pairs import Pair
from vcrd.link.staging import OnDevice, Staged, Upload

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def pair():
    made = Pair(dist.HashStore(), rank=0, size=1, device=DEVICE)
    yield made
    made.abort()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32])
@pytest.mark.parametrize("count", [1, 1000, 1 << 24])
def test_what_is_sent_arrives_and_is_used_on_another_stream(pair, dtype, count):
    memory = OnDevice(DEVICE, torch.cuda.Stream(DEVICE))
    for number in range(3):
        given = (torch.arange(count, device=DEVICE) + number).to(dtype)
        staged = Staged(given, stays=True)
        taken = memory.empty(count, dtype=dtype)
        pair.exchange_with_itself(staged.ready(), taken)
        (answer,) = Upload([taken], DEVICE, torch.cuda.Stream(DEVICE)).ready()
        assert answer.data_ptr() == taken.data_ptr(), "what is on the device already is not copied"
        assert torch.equal(answer, given)


def test_it_runs_beside_what_the_device_computes(pair):
    given, taken = torch.ones(1 << 20, device=DEVICE), torch.zeros(1 << 20, device=DEVICE)
    pair.exchange_with_itself(given, taken)  # the communicator forms
    torch.cuda.synchronize()
    busy = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(busy):
        torch.cuda._sleep(4_000_000_000)  # about two seconds
    taken.zero_()
    torch.cuda.current_stream().synchronize()
    other = threading.Thread(target=pair.exchange_with_itself, args=(given, taken))
    other.start()
    other.join(60)
    assert not other.is_alive() and not busy.query(), "the transfer waited for a stream that is not its own"
    assert torch.equal(taken, given)


def test_a_pair_that_was_aborted_raises_and_takes_no_one_along(pair):
    tensor = torch.ones(8, device=DEVICE)
    pair.exchange_with_itself(tensor, torch.empty_like(tensor))
    pair.abort()
    pair.abort()
    with pytest.raises(ConnectionError):
        pair.exchange_with_itself(tensor, torch.empty_like(tensor))
    time.sleep(2.0)  # a watchdog that minds would have ended the process
    assert torch.equal(tensor + 1, torch.full_like(tensor, 2))
