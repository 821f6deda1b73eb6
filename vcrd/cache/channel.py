"""Messages among the ranks of the last stage that train on the same micro-batches.

The request leader (`Place.is_request_leader`) knows the tokens, the other ranks do not. It tells them which answers to
read. Each of them is connected to it. A rank that is gone, or that cannot go on, ends the channel of all of them. So no
rank waits for another one that will not come.

A message is a JSON object, with its length in 8 bytes before it. Connections are greeted as those of the link.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch.distributed as dist

from vcrd.link.connection import Address, Connection, Listener, dial
from vcrd.link.errors import LinkError
from vcrd.link.plan import Place, places
from vcrd.link.rendezvous import UNREADABLE, listen, local_host, outward_address
from vcrd.settings import LinkSettings

_LENGTH = struct.Struct("<Q")
_LONGEST = 1 << 28  # bytes of a message: the keys of millions of sequences
_PAUSE = 0.2  # seconds between two attempts to reach the leader
_PARTING = 5.0  # seconds that a goodbye may take
_GOODBYE = "goodbye"
_FAILURE = "failure"


class Channel:
    """One rank's end, which is connected by `meet`. A single rank has no connections.

    hear: called with each message, in a thread of this channel. fail: called once, with the reason why the ranks cannot
    go on together. left: called on the other ranks when the leader says goodbye. None of them may block for long.
    """

    def __init__(
        self,
        settings: LinkSettings,
        place: Place,
        context_size: int,
        tensor_size: int,
        hear: Callable[[dict[str, Any]], None],
        fail: Callable[[LinkError], None],
        left: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._place = place
        self._hear = hear
        self._fail = fail
        self._when_left = left
        everyone = places([place.data], context_size, tensor_size)
        self._awaited = set(everyone[1:] if place.is_request_leader else everyone[:1])
        self._changed = threading.Condition()
        self._connections: dict[Place, Connection] = {}
        self._left: set[Place] = set()  # those that said goodbye
        self._threads: list[threading.Thread] = []
        self._over = False
        self._listener: Listener | None = None

    def meet(self, group: dist.ProcessGroup | None) -> None:
        """Connects the ranks of the group, the leader first; None for a single rank. One broadcast of some bytes.

        LinkError where the leader cannot listen, or the ranks do not meet within `connect_timeout`.
        """
        if not self._awaited:
            return
        address, problem = None, None
        if self._place.is_request_leader:
            try:
                sock = listen(_own_host(self._settings), 0)
                self._listener = Listener(sock, self._settings.shared_secret(), self._answer)
                address = self._listener.address
            except LinkError as error:
                problem = str(error)
        address, problem = spread((address, problem), group)
        if problem is not None:
            raise LinkError(problem)
        if not self._place.is_request_leader:
            self._join(address)
        with self._changed:
            here = self._changed.wait_for(
                lambda: self._connections.keys() == self._awaited, self._settings.connect_timeout
            )
        if self._listener is not None:
            self._listener.close()
        if not here:
            missing = ", ".join(sorted(str(place) for place in self._awaited - self._connections.keys()))
            raise LinkError(f"{missing} did not join {self._place} {self._within()}")

    def _join(self, address: Address) -> None:
        (leader,) = self._awaited
        hello = {
            "run": self._settings.name,
            "role": "reader",
            "place": [self._place.data, self._place.context, self._place.tensor],
        }
        deadline = time.monotonic() + self._settings.connect_timeout
        while True:
            try:
                connection, reply = dial(tuple(address), self._settings.shared_secret(), hello)
                break
            except ConnectionError as error:
                if time.monotonic() > deadline:
                    raise LinkError(f"{leader} cannot be reached {self._within()}: {error}") from None
            time.sleep(_PAUSE)
        if reply.get("state") != "welcome":
            connection.close()
            raise LinkError(f"{leader} refuses {self._place}: {reply.get('reason')}")
        self._keep(leader, connection)

    def tell(self, message: dict[str, Any], but: Place | None = None) -> None:
        """Sends a message to all connected ranks except `but`."""
        text = json.dumps(message).encode()
        for place, connection in list(self._connections.items()):
            if place == but or place in self._left:
                continue
            try:
                connection.send_bytes(_LENGTH.pack(len(text)) + text, seconds=self._settings.timeout)
            except (ConnectionError, TimeoutError) as error:
                self._lose(place, str(error))

    def give_up(self, reason: str) -> None:
        """Tells all ranks, this one included, that they cannot go on. Only the first reason counts."""
        self._end(reason, None)

    def close(self) -> None:
        """Says goodbye and closes the connections. Idempotent; takes some seconds at most."""
        with self._changed:
            ended, self._over = self._over, True
        if self._listener is not None:
            self._listener.close()
        text = json.dumps({_GOODBYE: True}).encode()
        for place, connection in list(self._connections.items()):
            if not ended and place not in self._left:
                with suppress(ConnectionError, TimeoutError):
                    connection.send_bytes(_LENGTH.pack(len(text)) + text, seconds=_PARTING)
            connection.end()
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(_PARTING)

    def _answer(self, hello: dict) -> tuple[dict, Callable[[Connection], None] | None]:
        try:
            place = Place(*(int(rank) for rank in hello["place"]))
            right = hello["run"] == self._settings.name and hello["role"] == "reader"
        except UNREADABLE:
            return {"state": "refused", "reason": "its greeting cannot be read"}, None
        if not right or place not in self._awaited or place in self._connections:
            return {"state": "refused", "reason": f"{place} is not expected"}, None
        return {"state": "welcome"}, partial(self._keep, place)

    def _keep(self, place: Place, connection: Connection) -> None:
        thread = threading.Thread(
            target=self._read, args=(place, connection), name="vcrd-cache-channel", daemon=True
        )
        with self._changed:
            self._connections[place] = connection
            self._threads.append(thread)
            thread.start()
            self._changed.notify_all()

    def _read(self, place: Place, connection: Connection) -> None:
        try:
            while True:
                message = _received(connection)
                if _GOODBYE in message:
                    self._left.add(place)
                    if place.is_request_leader:
                        self._when_left()
                    return
                if _FAILURE in message:
                    self._end(str(message[_FAILURE]), place)
                else:
                    self._hear(message)
        except (ConnectionError, LinkError) as error:
            self._lose(place, str(error))
        finally:
            connection.close()

    def _lose(self, place: Place, why: str) -> None:
        if place not in self._left:
            self._end(f"{place} is gone: {why}", place)

    def _end(self, reason: str, told_by: Place | None) -> None:
        with self._changed:
            if self._over:
                return
            self._over = True
        self._fail(LinkError(reason))
        self.tell({_FAILURE: reason}, but=told_by)

    def _within(self) -> str:
        return f"within {self._settings.connect_timeout:g} seconds (connect_timeout)"


def spread(value: Any, group: dist.ProcessGroup | None) -> Any:
    """The value of the first rank of the group, on all of its ranks. One broadcast, where there are several."""
    said = [value]
    if group is not None and group.size() > 1:
        dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group=group)
    return said[0]


def _received(connection: Connection) -> dict[str, Any]:
    raw = bytearray(_LENGTH.size)
    connection.receive(raw)
    (length,) = _LENGTH.unpack(raw)
    if length > _LONGEST:
        raise LinkError(f"its message of {length} bytes is longer than {_LONGEST}")
    text = bytearray(length)
    connection.receive(text)
    try:
        message = json.loads(text)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise LinkError("its message is not a JSON object")
    return message


def _own_host(settings: LinkSettings) -> str:
    """The address that other ranks of the replica reach. Without a teacher job, no address says which interface."""
    if settings.interface is None and settings.address is None:
        return outward_address()
    return local_host(settings)
