"""The ranks of one data rank's last stage among each other: who is there, how far each has got, what all must hear."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from .connection import Connection
from .errors import LinkError
from .handshake import Handshake
from .header import Header, Kind
from .plan import Place, places

Start = Callable[[Callable[[Connection], None], Connection], None]


class PeerChannel:
    """One connection to each of the others on the rank that asks; elsewhere one to that rank.

    changed: guards what is here. timeout: seconds in which a peer must take something of what it is told. start:
    runs a reader in a thread of its own. hear: called, without the lock, with each message and the text that came with
    it; a LinkError of it ends that peer. lost: called when one is gone without goodbye.
    """

    def __init__(
        self,
        handshake: Handshake,
        place: Place,
        timeout: float,
        changed: threading.Condition,
        start: Start,
        hear: Callable[[Place, Header, str], None],
        lost: Callable[[LinkError], None],
    ) -> None:
        others = places([place.data], handshake.context_size, handshake.tensor_size)[1:]
        self._place = place
        self._awaited = set(others) if place.asks else {Place(place.data, 0, 0)}
        self._timeout = timeout
        self._changed = changed
        self._start = start
        self._hear = hear
        self._lost = lost
        self._connections: dict[Place, Connection] = {}
        self._progress = dict.fromkeys(others if place.asks else (), 0)
        self._left: set[Place] = set()

    @property
    def all_here(self) -> bool:
        return self._connections.keys() == self._awaited

    @property
    def settled(self) -> list[int]:
        """For each peer, the number below which responses are complete there; on the rank that asks."""
        return list(self._progress.values())

    @property
    def connections(self) -> list[Connection]:
        return list(self._connections.values())

    def expects(self, place: Place) -> bool:
        return place in self._awaited and place not in self._connections

    def join(self, place: Place, connection: Connection) -> None:
        """A peer has come, or this rank has come to the one that asks. LinkError if it was there already."""
        with self._changed:
            if not self.expects(place):
                raise LinkError(f"{place} is not expected at {self._place}")
            self._connections[place] = connection
            self._changed.notify_all()
        self._start(partial(self._read, place), connection)

    def tell(self, header: Header, text: str = "", but: Place | None = None) -> None:
        """Tells all of them, except the one that this comes from."""
        raw = text.encode()[: header.length]
        for place, connection in list(self._connections.items()):
            if place == but or place in self._left:
                continue
            try:
                connection.send(header, raw, seconds=self._timeout)
            except (ConnectionError, TimeoutError) as error:
                if place not in self._left:
                    self._lost(LinkError(f"{place} is gone: {error}"))

    def _read(self, place: Place, connection: Connection) -> None:
        try:
            while (header := connection.receive_header()).kind != Kind.GOODBYE:
                if header.kind == Kind.PROGRESS and self._place.asks:
                    with self._changed:  # two of its threads may have told this in either order
                        self._progress[place] = max(self._progress[place], header.number)
                self._hear(place, header, connection.receive_text(header))
            self._left.add(place)
        except (ConnectionError, LinkError) as error:
            self._lost(LinkError(f"{place} is gone: {error}"))
