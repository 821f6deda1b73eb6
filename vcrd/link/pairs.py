"""NCCL between one teacher rank and one student rank: what is on a GPU goes from GPU to GPU.

The connection (`wire`) stays the control: its headers say what comes, its end tells that the other side is gone. Each
pair of ranks has a communicator of its own, so that one that dies takes no other along. NCCL itself notices nothing in
time; `abort`, called when the connection ends, is what releases a transfer whose other side is gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import LinkError

_FOREVER = timedelta(days=7)  # liveness is the connection's business, not NCCL's
_constructing = threading.Lock()


class Pair:
    """One end of a communicator of two ranks; one thread at a time. Forms itself with the first transfer.

    store: reached by both ends. rank: 0 sends, 1 receives. size: 2, or 1 to try it alone. device: this end's GPU.
    Every transfer runs on a stream of its own. The calling thread waits for it, no other does.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        self._peer = size - 1 - rank
        self._device = device
        self._ended = False
        self._stream = torch.cuda.Stream(device)
        with _constructing, _no_watchdog():
            self._group = dist.ProcessGroupNCCL(store, rank, size, _FOREVER)

    def carries(self, part: object) -> bool:
        """Whether this is what travels here: a tensor on this end's GPU."""
        return isinstance(part, Tensor) and part.device == self._device

    def send(self, tensor: Tensor) -> None:
        """Sends a contiguous tensor that is ready; ConnectionError if the pair has ended."""
        self._run(lambda: self._group.send([tensor], self._peer, 0))

    def receive(self, tensor: Tensor) -> None:
        """Fills a contiguous tensor; ConnectionError if the pair has ended."""
        self._run(lambda: self._group.recv([tensor], self._peer, 0))

    def exchange_with_itself(self, given: Tensor, taken: Tensor) -> None:
        """Sends a tensor and receives it: how a machine with one GPU tries streams, events and buffers.

        Only in a pair of one: NCCL wants a send and a receive of one rank in one group of calls.
        """
        self._run(lambda: self._exchange(given, taken))

    def _exchange(self, given: Tensor, taken: Tensor) -> dist.Work:
        self._group._start_coalescing()
        self._group.send([given], 0, 0)
        self._group.recv([taken], 0, 0)
        return self._group._end_coalescing()

    def abort(self) -> None:
        """Ends the pair and releases what is under way, in the background. Idempotent."""
        if not self._ended:
            self._ended = True
            threading.Thread(target=self._abort, name="vcrd-link-abort", daemon=True).start()

    def _abort(self) -> None:
        with suppress(RuntimeError):
            self._group.abort()

    def _run(self, transfer: Callable[[], dist.Work]) -> None:
        if self._ended:
            raise ConnectionError("the pair has ended")
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                transfer().wait()  # of the stream, not of this thread
                done = torch.cuda.Event(blocking=True)
                done.record(self._stream)
            done.synchronize()
        except RuntimeError as error:
            raise ConnectionError(str(error).splitlines()[0]) from None
        if self._ended:
            raise ConnectionError("the pair has ended")


class PairStore:
    """Where the pairs of one sender and one epoch form: a store of torch's, hosted by the sender.

    It holds NCCL's identifiers and nothing else, and is not sealed by the shared secret; nor is NCCL's own traffic.
    """

    def __init__(self, host: str) -> None:
        try:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise LinkError(
                f"no store for NCCL can be opened on {host}: {str(error).splitlines()[0]}"
            ) from None
        self.address = (host, self._store.port)

    def pair(self, name: str, device: torch.device) -> Pair:
        """The sending end."""
        return Pair(dist.PrefixStore(name, self._store), 0, 2, device)


def receiving_pair(address: Sequence, name: str, device: torch.device, seconds: float) -> Pair:
    """The receiving end of `PairStore.pair`; ConnectionError if its store is not there."""
    try:
        host, port = str(address[0]), int(address[1])
        timeout = timedelta(seconds=seconds)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ConnectionError(str(error).splitlines()[0]) from None
    return Pair(dist.PrefixStore(name, store), 1, 2, device)


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """By default a communicator whose other end is gone takes its whole process down; here that is no fault."""
    names = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
