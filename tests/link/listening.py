"""A listener of the link for the tests of greetings, which must leave no thread behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vcrd.link.rendezvous import listen
from vcrd.link.wire import Listener


def link_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vcrd")]


@contextmanager
def listening(secret: str = "", answer=lambda hello: ({"heard": hello}, None)) -> Iterator[Listener]:
    listener = Listener(listen("127.0.0.1", 0), secret, answer)
    try:
        yield listener
    finally:
        listener.close()
        assert link_threads() == []
