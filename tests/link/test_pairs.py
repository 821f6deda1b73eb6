"""What is on a GPU goes by another way than the connection; which way, and how it ends, needs no GPU to be seen."""

from __future__ import annotations

import queue
import socket

import pytest
import torch

from vcrd.link import LinkSettings, StudentLink, TeacherLink
from vcrd.link import header as headers
from vcrd.link.connection import Connection
from vcrd.link.header import Header, Kind


class QueuePair:
    """Stands for NCCL: float32 tensors are what it carries."""

    def __init__(self, way: queue.Queue) -> None:
        self.way = way
        self.aborted = False

    def carries(self, part: object) -> bool:
        return isinstance(part, torch.Tensor) and part.dtype == torch.float32

    def send(self, tensor: torch.Tensor) -> None:
        self.way.put(tensor.clone())

    def receive(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self.way.get(timeout=10))

    def abort(self) -> None:
        self.aborted = True


def connected() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        return Connection(left), Connection(server.accept()[0])


def test_tensors_of_the_pair_go_by_it_and_all_else_by_the_connection_in_order():
    left, right = connected()
    way: queue.Queue = queue.Queue()
    left.pair, right.pair = QueuePair(way), QueuePair(way)
    values, ids = torch.arange(6.0), torch.arange(4, dtype=torch.int32)
    for number in range(2):
        left.send(Header(Kind.RESPONSE, number), values + number, ids + number, values * 2, seconds=10)
    assert way.qsize() == 4
    for number in range(2):
        assert right.receive_header() == Header(Kind.RESPONSE, number)
        got = torch.empty(6), torch.empty(4, dtype=torch.int32), torch.empty(6)
        right.receive(*got)
        assert torch.equal(got[0], values + number) and torch.equal(got[2], values * 2)
        assert torch.equal(got[1], ids + number)
    assert left.sent == right.received == 2 * (headers.BYTES + 24 + 16 + 24)
    left.end()
    assert left.pair.aborted
    with pytest.raises(ConnectionError):
        right.receive_header()
    left.close()
    right.close()


PLACE = dict(vocab_size=8, padded_vocab_size=8, sequence_length=4, tensor_rank=0, tensor_size=1)


def test_nccl_needs_a_gpu():
    settings = LinkSettings(transport="nccl")
    with pytest.raises(ValueError, match="device must be a GPU for the transport 'nccl', got cpu"):
        StudentLink.connect(settings, **PLACE, data_rank=0, data_size=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="transport must be 'tcp' where torch finds no GPU, got 'nccl'"):
            TeacherLink.connect(
                *(settings,),
                **PLACE,
                replica=0,
                replicas=1,
                is_last_stage=True,
                group=None,
                tensor_group=None,
            )
    with pytest.raises(ValueError, match="transport must be one of tcp, nccl, got 'rdma'"):
        LinkSettings(transport="rdma")
