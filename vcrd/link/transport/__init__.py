"""How the tensors of the link travel between one teacher rank and one student rank.

A transport is one end of one such pair. It stands on the pair's connection (`connection`), which is TCP always: there
travel headers, the goodbyes, and its end tells that the other rank is gone. Tensors travel by one of

- `tcp`: over the same connection, through host memory; pinned where the rank computes on a GPU.
- `nccl`: from GPU to GPU, over a communicator of these two ranks (`nccl`, `cuda`).
- `fake`: the code of `nccl` on the CPU over a stand-in for NCCL that stops at whatever NCCL forbids (`fake`); for
  tests.

One framing for all of them. A message is a header on the connection, then its tensors in the payload's order, each in
one piece; a tensor without elements is not sent. Both ends take the sizes from the header, so they always agree.
Where a piece holds fewer columns than the receiving shard, the transport puts it into its columns (`Destination`).

How a pair comes to its transport (`opening`): the sender says TRANSPORT with the transport's code and, for NCCL, the
identifier of the communicator. Both ends make the communicator and send a probe over it; the receiver answers with
TRANSPORT, 1 or the reason why not. The ranks of a teacher replica agree: unless every pair succeeded, every one of
them says TRANSPORT again, for `tcp`.
"""

from .base import Arrived, Destination, Outgoing, Transport
from .endpoint import Endpoint
from .opening import Receiver, Sender, TransportRefused

__all__ = [
    "Arrived",
    "Destination",
    "Endpoint",
    "Outgoing",
    "Receiver",
    "Sender",
    "Transport",
    "TransportRefused",
]
