"""Memory that is used again belongs to one tensor at a time, and answers are given out when they are where they go."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vcrd.link import LinkSettings, Piece, Place
from vcrd.link.buffers import Pool
from vcrd.link.connection import Header, Kind
from vcrd.link.handshake import Handshake
from vcrd.link.payload import payload_named
from vcrd.link.reassembly import Reassembly

ROWS = 600  # [ROWS, 500] float32 is more than the pool leaves to the C library


def large(pool: Pool, rows: int = ROWS) -> torch.Tensor:
    return pool.empty(rows, 500, dtype=torch.float32)


def test_memory_is_used_again():
    pool = Pool()
    place = large(pool).data_ptr()
    assert large(pool).data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[3:5].T,
        lambda tensor: tensor.view(torch.uint8),
        lambda tensor: tensor.numpy(),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: (
            torch.ones_like(tensor).requires_grad_() * tensor
        ),  # autograd keeps it for the gradient
    ],
)
def test_memory_that_somebody_holds_is_nobody_elses(hold):
    pool = Pool()
    tensor = large(pool)
    place, held = tensor.data_ptr(), hold(tensor)
    del tensor
    others = [large(pool) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    del held
    assert large(pool).data_ptr() == place


def test_a_block_serves_what_is_smaller_and_gives_way_to_what_is_larger():
    pool = Pool()
    place = large(pool).data_ptr()
    smaller = large(pool, ROWS - 1)
    assert smaller.data_ptr() == place and smaller.shape == (ROWS - 1, 500)
    del smaller
    del_later = large(pool, 2 * ROWS)
    assert len(pool._free) == 0  # the small one is gone, and not kept beside the large one
    del del_later
    assert len(large(pool, ROWS)) == ROWS and len(pool._free) == 0


def test_no_more_is_kept_than_was_said():
    pool = Pool(2)
    tensors = [large(pool) for _ in range(5)]
    del tensors
    assert len(pool._free) == 2


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_small_tensors_are_torchs_own(shape):
    pool = Pool()
    tensor = pool.empty(*shape, dtype=torch.float16)
    assert tensor.shape == shape and tensor.dtype == torch.float16
    del tensor
    assert not pool._free


def test_threads_never_write_into_each_others_tensors():
    pool = Pool(3)

    def work(mark: int) -> None:
        held = []
        for turn in range(60):
            tensor = large(pool, ROWS + turn % 3).fill_(mark * 1000 + turn)
            held.append((tensor, mark * 1000 + turn))
            if turn % 3:
                old, value = held.pop(0)
                assert (old == value).all()
        assert all((old == value).all() for old, value in held)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


class Uploads:
    """A transport whose upload ends when it is let."""

    def __init__(self) -> None:
        self.begun = [threading.Event(), threading.Event()]
        self.let = [threading.Event(), threading.Event()]
        self.number = 0

    empty = staticmethod(torch.empty)

    def receive(self, tensors, columns) -> None:
        assert columns.stop - columns.start == 3

    def arrived(self, tensors):
        number, self.number = self.number, self.number + 1
        self.begun[number].set()
        assert self.let[number].wait(60)
        return f"uploaded {number}"


HANDSHAKE = Handshake.of(
    LinkSettings(),
    **dict(vocab_size=6, padded_vocab_size=6, sequence_length=4, tensor_size=1, copies=1, credits=2),
)


def test_an_answer_is_complete_when_it_is_on_its_way_to_the_device_and_all_before_it_are():
    uploads, payload = Uploads(), payload_named("float16")
    reassembly = Reassembly(HANDSHAKE, Place(0, 0, 0), threading.Condition())
    # Two senders: the second one's part of answer 0 is the last of it, the first one's is that of answer 1.
    reassembly.begin(1, {0: Piece(0, 0, 0, 3), 1: Piece(1, 0, 3, 6)})
    for number in range(2):
        reassembly.expect(number, (4, 1))

    def arrives(number: int, sender: int) -> bool:
        columns = dict(start=3 * sender, stop=3 * sender + 3)
        header = Header(Kind.RESPONSE, number=number, sequence=4, batch=1, payload=payload.code, **columns)
        return reassembly.receive_piece(1, sender, header, payload, uploads)

    with ThreadPoolExecutor(2) as threads:
        assert not arrives(0, 0)
        first = threads.submit(arrives, 0, 1)
        assert uploads.begun[0].wait(60)
        second = threads.submit(lambda: (arrives(1, 0), arrives(1, 1)))
        assert uploads.begun[1].wait(60)
        uploads.let[1].set()
        assert second.result(60) == (False, False)
        assert reassembly.complete == 0 and reassembly.take(0) is None and reassembly.take(1) is None
        uploads.let[0].set()
        assert first.result(60)
    assert reassembly.complete == 2
    assert (reassembly.take(0), reassembly.take(1)) == ("uploaded 0", "uploaded 1")


def test_bytes_that_arrive_after_their_epoch_count_for_no_epoch():
    """The next teacher has begun while the last bytes of the one before were read."""
    payload = payload_named("float16")
    reassembly = Reassembly(HANDSHAKE, Place(0, 0, 0), threading.Condition())
    whole = {0: Piece(0, 0, 0, 6)}
    header = Header(Kind.RESPONSE, number=0, sequence=4, batch=1, stop=6, payload=payload.code)
    reassembly.begin(1, whole)
    reassembly.expect(0, (4, 1))

    class Late:
        """A transport that reads that slowly."""

        empty = staticmethod(torch.empty)
        arrived = staticmethod(list)

        def __init__(self, value: float, then=lambda: None) -> None:
            self.value, self.then = value, then

        def receive(self, tensors, columns) -> None:
            tensors[0].fill_(self.value)
            self.then()

    with pytest.raises(ConnectionError, match="epoch 1 is over"):
        reassembly.receive_piece(1, 0, header, payload, Late(1.0, lambda: reassembly.begin(2, whole)))
    assert reassembly.complete == 0
    assert reassembly.receive_piece(2, 0, header, payload, Late(2.0))
    (logits,) = reassembly.take(0)
    assert (logits == 2.0).all()
