"""The extra process group between a teacher replica and its students, and the threads that listen on it.

The only file that chooses a backend. Two facts of gloo shape it. A send completes when its receiver has
posted the receive. A wait that times out breaks every connection of its group: so nothing here waits with a
time-out unless running out of it ends the link anyway, and exactly that is how a blocked thread is released
on closing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from . import header as headers
from .errors import LinkError
from .header import Header

_log = logging.getLogger("vcrd")
_FOREVER = timedelta(days=365)
_BRIEFLY = timedelta(milliseconds=1)


class Tag(IntEnum):
    """A stream per purpose: within one tag and direction, messages keep their order."""

    HEADER = 1
    TOKENS = 2
    PAYLOAD = 3
    NEVER = 4  # no one sends on it


class Channel:
    """One process group of `size` ranks, formed through `store`; safe to use from several threads.

    host: the local address to bind to. seconds: to form the group in; every rank must be on its way already.
    Tensors are on the CPU. Control and data share the gloo group; data on GPUs gets a group of its own here.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, host: str, seconds: float) -> None:
        self.rank = rank
        self.size = size
        control = _gloo_group(dist.PrefixStore("control", store), rank, size, host, seconds)
        self._groups = {Tag.HEADER: control, Tag.TOKENS: control, Tag.PAYLOAD: control}
        self._deadline = math.inf  # of the wait with a time-out that is under way

    @property
    def broken_here(self) -> bool:
        """Whether connections end because of this side: closed, or a wait that ran out of time."""
        return not self._groups or time.monotonic() >= self._deadline

    def post(self, tensor: Tensor, peer: int, tag: Tag) -> dist.Work:
        """Begins to send a contiguous tensor, to stay unchanged until it has been taken.

        The caller keeps the Work until then: a send whose Work is dropped is cut off midway.
        """
        with _as_connection_error():
            return self._group(tag).send([tensor], peer, tag)

    def complete(self, work: dist.Work, seconds: float) -> None:
        """Waits for a posted send, in one thread at a time. ConnectionError, or TimeoutError, which ends the
        whole channel."""
        # Known before the wait begins: the listeners hear of the broken connections before this thread does.
        self._deadline = time.monotonic() + seconds
        try:
            with _as_connection_error():
                work.wait(timedelta(seconds=seconds))
        except ConnectionError:
            if not self.broken_here:
                raise
            raise TimeoutError(f"did not take what was sent within {seconds:g} seconds") from None
        self._deadline = math.inf

    def receive(self, tensor: Tensor, peer: int, tag: Tag) -> None:
        """Fills a contiguous tensor, however long it takes. ConnectionError when peer or channel ends."""
        with _as_connection_error():
            self._group(tag).recv([tensor], peer, tag).wait(_FOREVER)

    def post_header(self, header: Header, peer: int) -> dist.Work:
        return self.post(header.tensor(), peer, Tag.HEADER)

    def receive_header(self, peer: int) -> Header:
        """The next header from a peer; LinkError if it is malformed."""
        tensor = headers.blank()
        self.receive(tensor, peer, Tag.HEADER)
        return headers.parse(tensor)

    def close(self) -> None:
        """Breaks every connection, which releases all threads blocked in here. Idempotent, never blocks.

        Neither abort() nor shutdown() of ProcessGroupGloo releases a blocked wait (torch 2.11, 2.13); a wait
        that times out does.
        """
        groups, self._groups = set(self._groups.values()), {}
        for group in groups:
            for peer in range(self.size):
                if peer != self.rank:
                    with suppress(RuntimeError):
                        group.recv([torch.empty(1)], peer, Tag.NEVER).wait(_BRIEFLY)

    def _group(self, tag: Tag) -> dist.ProcessGroupGloo:
        group = self._groups.get(tag)
        if group is None:
            raise ConnectionError("the channel is closed")
        return group


class Listeners:
    """A thread per peer: reads headers, hands each to `handle(peer, header)` until that returns False.

    `lost(peer, reason)` is called, in that thread, when the peer's connection ends or when a header or
    `handle` is refused with a LinkError; not when connections end because of this side.
    """

    def __init__(
        self,
        channel: Channel,
        peers: Iterable[int],
        handle: Callable[[int, Header], bool],
        lost: Callable[[int, str], None],
    ) -> None:
        self._channel = channel
        self._handle = handle
        self._lost = lost
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), name=f"vcrd-link-{peer}", daemon=True)
            for peer in peers
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> bool:
        """Whether all threads have ended within that time."""
        deadline = time.monotonic() + seconds
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _listen(self, peer: int) -> None:
        try:
            while self._handle(peer, self._channel.receive_header(peer)):
                pass
        except ConnectionError as error:
            _log.debug("the connection to link rank %d ended: %s", peer, error)
            self._report(peer, "closed its connection")
        except LinkError as error:
            self._report(peer, f"sent a header that is refused: {error}")
        except Exception as error:  # whatever it is, the waiting side must hear of it
            _log.exception("the listener of link rank %d failed", peer)
            self._report(peer, f"could not be listened to any longer: {error!r}")

    def _report(self, peer: int, reason: str) -> None:
        if not self._channel.broken_here:
            self._lost(peer, reason)


class _as_connection_error:
    """Turns gloo's RuntimeError into ConnectionError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise ConnectionError(str(error)) from None


def _gloo_group(store: dist.Store, rank: int, size: int, host: str, seconds: float) -> dist.ProcessGroupGloo:
    """A gloo group that is registered nowhere, so that the job's own default group stays what it is."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=seconds)
    options._threads = 1  # they run collectives, of which there are none
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, size, options)
