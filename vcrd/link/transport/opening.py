"""How the two ends of a pair agree on their transport, and what a rank provides for all of its transports.

The sender (a teacher rank) sends TRANSPORT with the code of the transport and, for NCCL, the identifier of the
communicator. Both ends make the communicator and send a probe over it. The receiver (a student rank) answers with
TRANSPORT: 1, or 0 and the reason. The ranks of a teacher replica agree: unless every pair has succeeded, all of them
send TRANSPORT again, for `tcp`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from vcrd.errors import expected
from vcrd.settings import MOST_SOCKETS

from ..buffers import HostMemory
from ..connection import LONGEST_TEXT, Connection, Header, Kind
from ..errors import LinkError
from . import Transport, fake, nccl
from .nccl import CommunicatorError, Library, NcclTransport
from .tcp import Stripes, TcpTransport, stripes_to

_log = logging.getLogger("vcrd")
SECONDS = 30.0  # for the communicator and the probe, and as many for the answer
CODES = {"tcp": 1, "nccl": 2, "fake": 3}  # `Header.number` of TRANSPORT


def name_of(code: int) -> str | None:
    """The transport with that code; None for an unknown code."""
    return next((name for name, its in CODES.items() if its == code), None)


class Endpoint:
    """The device and the host memory of a rank, and its NCCL library where it has one.

    setting: the setting `transport`. device: where the rank computes; a GPU without an index is the current one. kept:
    free blocks of host memory to keep (`buffers.Pool`). sockets: TCP connections of each pair in which this rank sends.
    nccl_version: the version of NCCL; 0 where tensors can travel over TCP only. missing: the reason for that, where the
    setting allows NCCL; else "". ValueError where the setting requires NCCL and it is missing.
    """

    def __init__(
        self,
        setting: str,
        device: torch.device,
        kept: int | None = None,
        sockets: int = 1,
    ) -> None:
        self.device = indexed(device)
        self.memory = HostMemory(self.device, kept)
        self.sockets = sockets
        self.nccl_version = 0
        self.missing = ""
        self._told: set[str] = set()
        self._library: Library | None = None
        if setting == "fake":
            self.nccl_version, self._library = fake.VERSION, fake.FakeLibrary()
        elif setting in ("auto", "nccl") and self.device.type == "cuda":
            try:
                self.nccl_version = nccl.version()
            except ImportError as error:
                self.missing = str(error)
        elif setting == "nccl":
            self.missing = f"this rank computes on {device}, not on a GPU"
        if setting == "nccl" and self.missing:
            raise expected("transport", f"'auto' or 'tcp' where {self.missing}", "'nccl'")

    def is_news(self, reason: str) -> bool:
        """Whether this is the first call with that reason. It is logged once, however often a job joins."""
        news = reason not in self._told
        self._told.add(reason)
        return news

    def tcp(self, connection: Connection, stripes: Sequence[Connection] = ()) -> TcpTransport:
        return TcpTransport(connection, self.memory, stripes)

    def nccl(self, connection: Connection) -> NcclTransport:
        """A transport that is not open yet."""
        return NcclTransport(connection, self.nccl_library())

    def nccl_library(self) -> Library:
        if self._library is None:
            self._library = nccl.CudaLibrary(self.device)
        return self._library


def indexed(device: torch.device) -> torch.device:
    """The device, with the index of the current GPU where it is a GPU without an index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class TransportRefused(LinkError):
    """The teacher cannot use the transport that one of the jobs requires."""


class Sender:
    """The half of the teacher, for one student rank. Only the thread that owns the transport uses it.

    transport: None until `open` has succeeded.
    """

    def __init__(self, connection: Connection, endpoint: Endpoint) -> None:
        self.connection = connection
        self.transport: Transport | None = None
        self._endpoint = endpoint
        self._answers_due = 0

    def open(self, name: str, reason: str = "", seconds: float = SECONDS) -> str:
        """Makes the transport of that name and replaces an earlier one. "", or the reason why the pair cannot use it.

        reason: why it is not another transport, for the log of the student. ConnectionError or TimeoutError where the
        connection itself is gone, LinkError where the student sends something else.
        """
        _abandon(self.transport)
        self.transport = None
        if name == "tcp":
            transport, why = self._over_tcp(reason, seconds, self._endpoint.sockets), ""
        else:
            transport = self._endpoint.nccl(self.connection)
            why = self._over_nccl(transport, name, seconds)
        if why:
            transport.abandon()
        else:
            self.transport = transport
            self.connection.count_anew()
        return why

    def refuse(self, reason: str) -> None:
        """Tells the student that there is no transport, and why. Returns when it has closed the connection."""
        self._say(0, reason.encode()[:LONGEST_TEXT], SECONDS)
        self._answers_due += 1  # to wait for the end of the connection: no answer is sent
        with suppress(ConnectionError, TimeoutError, LinkError):
            self._answer(SECONDS)

    def check(self) -> None:
        if self.transport is not None:
            self.transport.check()

    def close(self) -> None:
        (self.transport or self.connection).close()

    def _over_tcp(self, reason: str, seconds: float, sockets: int) -> Transport:
        detail = _detail(reason, sockets)
        while len(detail) > LONGEST_TEXT:  # JSON may take several bytes for a character
            reason = reason[: len(reason) // 2]
            detail = _detail(reason, sockets)
        self._say(CODES["tcp"], detail, seconds)
        answer = self._answer(seconds)
        if not answer:
            return self._endpoint.tcp(self.connection)
        try:
            stripes = stripes_to(self.connection, answer, sockets - 1, seconds)
        except OSError as error:
            _log.warning("one connection instead of %d is used: %s", sockets, error)
            return self._over_tcp(reason, seconds, 1)
        return self._endpoint.tcp(self.connection, stripes)

    def _over_nccl(self, transport: NcclTransport, name: str, seconds: float) -> str:
        answer: str | None = None

        def refused() -> bool:
            """The student may fail first. Its success may also arrive before the probe of this end is complete."""
            nonlocal answer
            if answer is None and self.connection.readable(0.0):
                answer = self._answer(seconds)
            return bool(answer)

        try:
            unique_id = self._endpoint.nccl_library().unique_id()
            self._say(CODES[name], unique_id, seconds)
            transport.open(0, unique_id, seconds, given_up=refused)
        except (CommunicatorError, ConnectionError, TimeoutError) as error:
            transport.abandon()
            if self.connection.is_over:
                raise ConnectionError(str(error)) from None
            return answer or str(error)
        return self._answer(seconds) if answer is None else answer

    def _say(self, code: int, detail: bytes, seconds: float) -> None:
        self.connection.send(Header(Kind.TRANSPORT, code, length=len(detail)), detail, seconds=seconds)
        self._answers_due += bool(code)

    def _answer(self, seconds: float) -> str:
        """The answer of the student to the last TRANSPORT: "" for yes, or the reason, or an invitation."""
        deadline, text = time.monotonic() + seconds, ""
        while self._answers_due:
            if not self.connection.readable(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"did not answer within {seconds:g} seconds")
            header = self.connection.receive_header()
            if header.kind != Kind.TRANSPORT:
                raise LinkError(f"a {header.kind.name.lower()} from there is not expected")
            text = self.connection.receive_text(header)
            if not header.number:
                text = text or "the student gives no reason"
            self._answers_due -= 1
        return text


class Receiver:
    """The half of the student, for one teacher rank. Only the thread that owns the transport uses it.

    transport: None until the teacher has named one, and where that one could not be made. reason: why it is not another
    one, as the teacher gave it.
    """

    def __init__(self, connection: Connection, endpoint: Endpoint) -> None:
        self.connection = connection
        self.transport: Transport | None = None
        self.reason = ""
        self._endpoint = endpoint

    def switch(self, header: Header, seconds: float = SECONDS) -> None:
        """After a TRANSPORT header: makes the transport that it names, and answers.

        TransportRefused where the teacher has none; LinkError where it names one that does not exist here.
        """
        detail = self.connection.receive_bytes(header)
        _abandon(self.transport)
        self.transport = None
        name = name_of(header.number)
        if header.number == 0:
            raise TransportRefused(detail.decode(errors="replace"))
        if name == "tcp":
            self._over_tcp(detail, seconds)
            return
        if name is None or not self._endpoint.nccl_version or name != self._endpoint.nccl_library().name:
            raise LinkError(f"its transport code {header.number} is not expected")
        transport = self._endpoint.nccl(self.connection)
        try:
            transport.open(1, detail, seconds, given_up=lambda: self.connection.readable(0.0))
        except (ConnectionError, TimeoutError) as error:
            transport.abandon()
            if self.connection.is_over:
                raise ConnectionError(str(error)) from None
            self._answer(str(error), seconds)
        except BaseException:
            transport.abandon()
            raise
        else:
            self.transport = transport
            self._answer("", seconds)

    def check(self) -> None:
        if self.transport is not None:
            self.transport.check()

    def close(self) -> None:
        (self.transport or self.connection).close()

    def _over_tcp(self, detail: bytes, seconds: float) -> None:
        try:
            said = json.loads(detail)
            reason, sockets = said["reason"], said["sockets"]
            if not (isinstance(reason, str) and type(sockets) is int and 1 <= sockets <= MOST_SOCKETS):
                raise ValueError
        except (LookupError, TypeError, ValueError, RecursionError):
            raise LinkError("its description of its connections cannot be read") from None
        self.reason = reason
        try:
            coming = Stripes(self.connection) if sockets > 1 else None
        except OSError as error:
            _log.warning("one connection instead of %d is used: %s", sockets, error)
            coming = None
        stripes: list[Connection] = []
        if coming is None:
            self._answer("", seconds)
        else:
            with coming:
                self._answer("", seconds, coming.invitation)
                stripes = coming.accept(sockets - 1, seconds)
            if len(stripes) < sockets - 1:  # the teacher could not connect, and sends TRANSPORT again
                for stripe in stripes:
                    stripe.close()
                return
        self.transport = self._endpoint.tcp(self.connection, stripes)

    def _answer(self, why_not: str, seconds: float, more: str = "") -> None:
        text = (why_not or more).encode()[:LONGEST_TEXT]
        header = Header(Kind.TRANSPORT, number=int(not why_not), length=len(text))
        self.connection.send(header, text, seconds=seconds)
        self.connection.count_anew()


def _detail(reason: str, sockets: int) -> bytes:
    """What follows the TRANSPORT header for TCP."""
    return json.dumps({"reason": reason, "sockets": sockets}).encode()


def _abandon(transport: Transport | None) -> None:
    if transport is not None:
        transport.abandon()
