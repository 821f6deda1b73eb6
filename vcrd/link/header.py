"""The fixed binary header of all that travels, checked before anything is allocated."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum

from .errors import LinkError

PROTOCOL = 4
MAGIC = b"vcrdlink"
_FORMAT = struct.Struct("<8sII8q")
BYTES = _FORMAT.size
LONGEST_TEXT = 1024  # bytes of a reason that travels
LARGEST = 1 << 48  # far above every count that is sent, far below where int64 products wrap


class Kind(IntEnum):
    REQUEST = 1  # request leader to teacher; then the tokens and the boundaries, int32
    RESPONSE = 2  # sender to student; then the payload, unless it is empty
    HEAD = 3  # sender to student; then rows of the teacher's output layer and their digest
    READY = 4  # teacher to request leader: every connection of the epoch stands
    GOODBYE = 5  # either way, and answered: nothing follows from either
    JOIN = 6  # request leader to peer: senders of epoch `number` may connect
    LOST = 7  # between request leader and peer: epoch `number` is over; then the reason
    PROGRESS = 8  # peer to request leader: the responses below `number` are complete there
    GIVE_UP = 9  # between request leader and peer: no teacher is waited for any more; then the reason
    # From sender to student: tensors travel by the transport with code `number`; then what it is made with, or the
    # reason. 0: by none, and there is no link; then the reason. The answer: 1, or 0 and the reason why it is not there.
    TRANSPORT = 10


_WITH_TEXT = (Kind.LOST, Kind.GIVE_UP, Kind.TRANSPORT)


@dataclass(frozen=True)
class Header:
    """What follows on the wire.

    number: of the micro-batch within its student replica, or of the epoch. sequence, batch: the shape of the
    whole micro-batch. boundaries: how many edges of packed sequences it has; in a request they follow the tokens.
    start, stop: the vocabulary columns of this piece. payload: the code of its encoding. length: bytes of text that
    follow.
    Fields without meaning are 0.
    """

    kind: Kind
    number: int = 0
    sequence: int = 0
    batch: int = 0
    boundaries: int = 0
    start: int = 0
    stop: int = 0
    payload: int = 0
    length: int = 0

    def pack(self) -> bytes:
        """BYTES bytes: magic, protocol, the fields in order."""
        kind, *fields = astuple(self)
        return _FORMAT.pack(MAGIC, PROTOCOL, kind, *fields)

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch


def parse(raw: bytes) -> Header:
    """The header in BYTES bytes, or LinkError with the reason why it is none."""
    magic, protocol, kind, *fields = _FORMAT.unpack(raw)
    if magic != MAGIC:
        raise LinkError("it does not begin with the link's mark")
    if protocol != PROTOCOL:
        raise LinkError(f"its protocol version is {protocol}, not {PROTOCOL}")
    if kind not in list(Kind):
        raise LinkError(f"its kind {kind} does not exist")
    if any(not 0 <= field < LARGEST for field in fields):
        raise LinkError("one of its fields is out of range")
    header = Header(Kind(kind), *fields)
    if header.length > (LONGEST_TEXT if header.kind in _WITH_TEXT else 0):
        raise LinkError(f"its text of {header.length} bytes is longer than {LONGEST_TEXT} or out of place")
    return header


def check_shape(header: Header, sequence_length: int, max_tokens: int) -> None:
    """LinkError if the micro-batch is empty or larger than agreed, or has more boundaries than tokens.

    A row of packed sequences may be as long as a micro-batch; how long each of them is, its boundaries say.
    """
    longest = max_tokens if header.boundaries else sequence_length
    if not 1 <= header.sequence <= longest:
        raise LinkError(f"its sequence length {header.sequence} is not from 1 to {longest}")
    if not 1 <= header.batch or header.tokens > max_tokens:
        raise LinkError(
            f"its batch of {header.batch} x {header.sequence} tokens is not from 1 to {max_tokens} tokens"
        )
    if header.boundaries > header.sequence + 1:
        raise LinkError(f"its {header.boundaries} boundaries are more than {header.sequence} tokens have")
