"""The fixed binary header of all that travels: ten int64, checked before anything is allocated."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .errors import LinkError

PROTOCOL = 1
_MAGIC = int.from_bytes(b"vcrdlink", "little")
LENGTH = 10
_LARGEST = 1 << 48  # far above every count that is sent, far below where int64 products wrap


class Kind(IntEnum):
    REQUEST = 1  # student to intake; then the tokens
    RESPONSE = 2  # sender to student; then the payload, unless it is empty
    GOODBYE = 3  # student to every teacher rank, which sends it back: nothing follows from either


@dataclass(frozen=True)
class Header:
    """What follows on the wire.

    number: of the micro-batch within its student replica. sequence, batch: its shape. start, stop: the
    vocabulary columns of this piece. payload: the code of its encoding. Fields without meaning are 0.
    """

    kind: Kind
    number: int = 0
    sequence: int = 0
    batch: int = 0
    start: int = 0
    stop: int = 0
    payload: int = 0

    def tensor(self) -> Tensor:
        """int64 [LENGTH]: magic, protocol, the fields in order, one reserved zero."""
        return torch.tensor([_MAGIC, PROTOCOL, *astuple(self), 0], dtype=torch.int64)

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch


def blank() -> Tensor:
    """Where a header is received."""
    return torch.zeros(LENGTH, dtype=torch.int64)


def parse(tensor: Tensor) -> Header:
    """The header in int64 [LENGTH], or LinkError with the reason why it is none."""
    magic, protocol, kind, *fields, reserved = tensor.tolist()
    if magic != _MAGIC:
        raise LinkError("it does not begin with the link's mark")
    if protocol != PROTOCOL:
        raise LinkError(f"its protocol version is {protocol}, not {PROTOCOL}")
    if kind not in list(Kind):
        raise LinkError(f"its kind {kind} does not exist")
    if reserved or any(not 0 <= field < _LARGEST for field in fields):
        raise LinkError("one of its fields is out of range")
    return Header(Kind(kind), *fields)


def check_shape(header: Header, sequence_length: int, max_tokens: int) -> None:
    """LinkError if the micro-batch is empty or larger than agreed."""
    if not 1 <= header.sequence <= sequence_length:
        raise LinkError(f"its sequence length {header.sequence} is not from 1 to {sequence_length}")
    if not 1 <= header.batch or header.tokens > max_tokens:
        raise LinkError(
            f"its batch of {header.batch} x {header.sequence} tokens is not from 1 to {max_tokens} tokens"
        )
