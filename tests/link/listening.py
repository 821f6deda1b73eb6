"""A listener of the link for the tests of greetings, and which threads of the link a test left behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from vcrd.link.connection import Listener
from vcrd.link.rendezvous import listen

_EARLIER: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def forget_threads() -> None:
    """What runs now is another test's fault: one test that fails must not take others with it."""
    _EARLIER.update(threading.enumerate())


def link_threads() -> list[str]:
    """The names of the link's threads that this test began and that still run."""
    running = set(threading.enumerate()) - set(_EARLIER)
    return [thread.name for thread in running if thread.name.startswith("vcrd")]


@contextmanager
def listening(secret: str = "", answer=lambda hello: ({"heard": hello}, None)) -> Iterator[Listener]:
    listener = Listener(listen("127.0.0.1", 0), secret, answer)
    try:
        yield listener
    finally:
        listener.close()
        assert link_threads() == []
