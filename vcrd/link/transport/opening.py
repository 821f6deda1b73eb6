"""How the two ends of a pair get to their transport: both halves of what `transport` describes."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress

from vcrd.settings import MOST_SOCKETS

from ..connection import Connection
from ..errors import LinkError
from ..header import LONGEST_TEXT, Header, Kind
from .base import Transport
from .endpoint import CODES, Endpoint, name_of
from .nccl import CommunicatorError, NcclTransport
from .stripes import Stripes, stripes_to

_log = logging.getLogger("vcrd")
SECONDS = 30.0  # for the communicator and the probe, and once more for the answer


class TransportRefused(LinkError):
    """The teacher cannot use the transport that one of the jobs insists on."""


class Sender:
    """The teacher's half, for one student rank. All in the thread that owns the transport.

    transport: once `open` succeeded.
    """

    def __init__(self, connection: Connection, endpoint: Endpoint) -> None:
        self.connection = connection
        self.transport: Transport | None = None
        self._endpoint = endpoint
        self._answers_due = 0

    def open(self, name: str, reason: str = "", seconds: float = SECONDS) -> str:
        """Makes the transport of that name, in place of one before it: "" or, where the pair cannot use it, why not.

        reason: why it is not another one, for the student's log. ConnectionError or TimeoutError where the connection
        itself is gone, LinkError where the student answers something else.
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
        """Tells the student that there is no transport, and why; returns when it has closed the connection."""
        self._say(0, reason.encode()[:LONGEST_TEXT], SECONDS)
        self._answers_due += 1  # none comes
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
            """The student may fail first. That it succeeded may be heard before this end's probe is over."""
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
        """The student's answer to what was said last: "" for yes, else why not, or where to connect once more."""
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
    """The student's half, for one teacher rank. All in the thread that owns the transport.

    transport: None until the teacher has said which, and where that one could not be made. reason: why it is not
    another one, in the teacher's words.
    """

    def __init__(self, connection: Connection, endpoint: Endpoint) -> None:
        self.connection = connection
        self.transport: Transport | None = None
        self.reason = ""
        self._endpoint = endpoint

    def switch(self, header: Header, seconds: float = SECONDS) -> None:
        """After a header of the kind TRANSPORT: makes the transport that it names, and answers.

        TransportRefused where the teacher says that there is none; LinkError where it names one that does not exist
        here.
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
            raise LinkError("what it says of its connections cannot be read") from None
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
            if len(stripes) < sockets - 1:  # the teacher could not connect, and will say so
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
    """What a sender says about TCP."""
    return json.dumps({"reason": reason, "sockets": sockets}).encode()


def _abandon(transport: Transport | None) -> None:
    if transport is not None:
        transport.abandon()
