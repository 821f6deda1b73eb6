"""A stand-in for NCCL and CUDA on the CPU, for tests: late where they may be late, and strict where they are strict.

Two processes communicate over a socket of their own. As with NCCL, nothing here notices that the other process has died
or stopped: a transfer waits for it until the transfer is aborted. A stream runs its work in order, in a thread of its
own, and later than the call. Whatever NCCL forbids raises `RuleBroken`. The message is also printed and kept in
`broken`, so that a test fails even where the exception is caught:

- counts and types that differ between the two sides, and the order of transfers;
- a transfer of no element, of a tensor that is not contiguous, or while the last call is in progress;
- a communicator used by a thread that did not make it;
- a tensor that is changed while it is sent, or written to while it is received into;
- work given to a stream while a call on it is in progress;
- a communicator used on two streams, or a stream given back twice.
"""

from __future__ import annotations

import os
import queue
import random
import select
import socket
import struct
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..buffers import Pool
from ..connection import memory
from .nccl import CommunicatorError

VERSION = 1
_LATE = 0.0005  # seconds, at most, that a call or a stream is late
_dice = random.Random()  # the global generator belongs to the training script and to its checkpoints
_POISON = 0xA5
_POISONED = memoryview(bytes([_POISON]) * (1 << 20))
_ID = struct.Struct("<H16s")
_MESSAGE = struct.Struct("<IQ16s")  # number, elements, type

broken: list[str] = []


class RuleBroken(AssertionError):
    pass


def _break(rule: str) -> None:
    broken.append(rule)
    traceback.print_stack(file=sys.stderr)
    print(f"the fake NCCL: {rule}", file=sys.stderr, flush=True)
    raise RuleBroken(rule)


class FakeEvent:
    def __init__(self) -> None:
        self._set = threading.Event()

    def done(self) -> bool:
        return self._set.is_set()


class FakeStream:
    """One thread, which runs its work in order."""

    def __init__(self) -> None:
        self.taken = False
        self.in_progress: Callable[[], bool] = lambda: False
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._dropped = threading.Event()  # set when the work so far has been aborted
        self.dropped: Callable[[], bool] = lambda: False  # whether the work that runs now has been aborted
        self._thread = threading.Thread(target=self._run, name="fake-stream", daemon=True)
        self._thread.start()

    def copy(self, destination: Tensor, source: Tensor) -> None:
        self._put(lambda: destination.copy_(source))

    def record(self) -> FakeEvent:
        event = FakeEvent()
        self._put(event._set.set)
        return event

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def drop(self) -> None:
        """What an abort does to the work that is left: it ends without an error."""
        dropped, self._dropped = self._dropped, threading.Event()
        dropped.set()

    def _put(self, work: Callable[[], object]) -> None:
        if self.in_progress():
            _break("a stream was given work while a call of NCCL on it was in progress")
        self.enqueue(work)

    def enqueue(self, work: Callable[[], object]) -> None:
        self._work.put((work, self._dropped))

    def _run(self) -> None:
        while True:
            work, dropped = self._work.get()
            time.sleep(_dice.random() * _LATE)
            try:
                if not dropped.is_set():
                    self.dropped = dropped.is_set
                    work()
            except RuleBroken:
                pass  # it is in `broken`
            except Exception as error:
                if not dropped.is_set():  # an abort closes the sockets of transfers that are under way
                    broken.append(f"the fake itself failed: {error!r}")
            finally:
                del work

    def until_dropped(self) -> None:
        """A transfer whose other side is gone ends with the abort."""
        while not self.dropped():
            time.sleep(_LATE)


class FakeCommunicator:
    def __init__(self, rank: int, unique_id: bytes, server: socket.socket | None) -> None:
        self._rank = rank
        self._owner = threading.get_ident()
        self._number = 0
        self._stream: FakeStream | None = None
        self._socket: socket.socket | None = None
        self._server = server
        self._error: str | None = None
        self._aborted = threading.Event()
        self._calls_settle_at = time.monotonic() + _dice.random() * _LATE
        if len(unique_id) != _ID.size:
            raise CommunicatorError(f"an identifier of {len(unique_id)} bytes is invalid")
        port, secret = _ID.unpack(unique_id)
        self._maker = threading.Thread(target=self._make, args=(port, secret), name="fake-nccl", daemon=True)
        self._maker.start()

    def settled(self) -> bool:
        self._check_thread()
        if self._error:
            raise CommunicatorError(self._error)
        return self._socket is not None and time.monotonic() >= self._calls_settle_at

    def send(self, tensor: Tensor, stream: FakeStream) -> None:
        self._begin(tensor, stream, self._send)

    def receive(self, tensor: Tensor, stream: FakeStream) -> None:
        self._begin(tensor, stream, self._receive)

    def abort(self) -> None:
        self._check_thread()
        self._aborted.set()
        if self._stream is not None:
            self._stream.drop()
        for sock in (self._server, self._socket):
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._maker.join()
        for sock in (self._server, self._socket):
            if sock is not None:
                sock.close()
        if self._stream is not None:
            self._stream.in_progress = lambda: False

    def _check_thread(self) -> None:
        if threading.get_ident() != self._owner:
            _break("a communicator was used by a thread that did not make it")

    def _begin(self, tensor: Tensor, stream: FakeStream, move: Callable[..., None]) -> None:
        if not self.settled():
            _break("a communicator was used while its last call was in progress")
        if not tensor.numel():
            _break("a tensor without elements was sent or received")
        if not tensor.is_contiguous():
            _break("a tensor that is not contiguous was sent or received")
        if self._stream not in (None, stream):
            _break("a communicator was used on two streams")
        self._stream = stream
        self._calls_settle_at = time.monotonic() + _dice.random() * _LATE
        settles_at = self._calls_settle_at
        stream.in_progress = lambda: time.monotonic() < settles_at
        number, self._number = self._number, self._number + 1
        stream.enqueue(lambda: move(stream, number, tensor))

    def _make(self, port: int, secret: bytes) -> None:
        """Rank 0 listens at the port in the identifier, and rank 1 connects. There is no time limit."""
        while not self._aborted.is_set() and self._socket is None:
            sock = None
            try:
                if self._rank == 0:
                    self._server.settimeout(0.05)
                    sock, _ = self._server.accept()
                else:
                    sock = socket.create_connection(("127.0.0.1", port), timeout=5)
                sock.settimeout(None)
                sock.sendall(secret)
                if _read(sock, len(secret), self._aborted.is_set) == secret:
                    self._socket = sock
                    continue
            except OSError:
                pass
            if sock is not None:
                sock.close()
            time.sleep(0.01)

    def _send(self, stream: FakeStream, number: int, tensor: Tensor) -> None:
        before = zlib.crc32(memory(tensor))
        about = _MESSAGE.pack(number, tensor.numel(), str(tensor.dtype).encode())
        with suppress(OSError):  # NCCL does not notice a process that has died
            self._socket.sendall(about)
            self._socket.sendall(memory(tensor))
            time.sleep(_dice.random() * _LATE)
            # A send of NCCL ends when the other side has received.
            if _read(self._socket, 1, stream.dropped) == b"!":
                if zlib.crc32(memory(tensor)) != before:
                    _break("a tensor was changed while it was sent")
                return
        stream.until_dropped()

    def _receive(self, stream: FakeStream, number: int, tensor: Tensor) -> None:
        tensor.view(-1).view(torch.uint8).fill_(_POISON)
        left = memory(tensor)
        with suppress(OSError):
            about = _read(self._socket, _MESSAGE.size, stream.dropped)
            if about:
                self._compare(about, number, tensor)
            while about and left:
                chunk = _read(self._socket, min(len(left), len(_POISONED)), stream.dropped)
                if chunk is None:
                    break
                if left[: len(chunk)] != _POISONED[: len(chunk)]:
                    _break("a tensor was written to while it was received into")
                left[: len(chunk)] = chunk
                left = left[len(chunk) :]
            if not left:
                self._socket.sendall(b"!")
                return
        stream.until_dropped()

    def _compare(self, about: bytes, number: int, tensor: Tensor) -> None:
        theirs, count, dtype = _MESSAGE.unpack(about)
        dtype = dtype.rstrip(b"\0").decode()
        if (theirs, count, dtype) != (number, tensor.numel(), str(tensor.dtype)):
            self._error = "the two sides do not agree"
            _break(
                f"transfer {theirs} sends {count} elements of {dtype}, "
                f"transfer {number} receives {tensor.numel()} of {tensor.dtype}"
            )


def _read(sock: socket.socket, count: int, dropped: Callable[[], bool]) -> bytes | None:
    """None if it was dropped. The end of the other process ends nothing here: NCCL would wait on."""
    data = bytearray()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while len(data) < count:
        if dropped():
            return None
        if not poll.poll(20):
            continue
        chunk = sock.recv(min(count - len(data), 1 << 20))
        if not chunk:
            time.sleep(0.01)
        data += chunk
    return bytes(data)


class FakeLibrary:
    name = "fake"
    _free: list[FakeStream] = []
    _lock = threading.Lock()

    def __init__(self) -> None:
        self._servers: dict[bytes, socket.socket] = {}
        self._memory = Pool()

    def unique_id(self) -> bytes:
        server = socket.create_server(("127.0.0.1", 0))
        unique_id = _ID.pack(server.getsockname()[1], os.urandom(16))
        self._servers[unique_id] = server
        return unique_id

    def communicator(self, rank: int, unique_id: bytes) -> FakeCommunicator:
        server = self._servers.pop(unique_id, None) if rank == 0 else None
        return FakeCommunicator(rank, unique_id, server)

    def stream(self) -> FakeStream:
        with self._lock:
            stream = self._free.pop() if self._free else FakeStream()
            stream.taken = True
            return stream

    def give_back(self, stream: FakeStream) -> None:
        with self._lock:
            if not stream.taken:
                _break("a stream was given back twice")
            stream.taken = False
            self._free.append(stream)

    def computed(self) -> FakeEvent:
        event = FakeEvent()
        event._set.set()  # the CPU has already computed it
        return event

    def on_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._memory.empty(*shape, dtype=dtype)

    def hand_over(self, tensors: Sequence[Tensor]) -> None:
        pass
