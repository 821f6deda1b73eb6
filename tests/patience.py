"""Links that wait long for the other job at the start, and shortly for a lost one to come back."""

from __future__ import annotations

from dataclasses import replace

from vcrd.link import StudentLink, TeacherLink


def wait_shortly(link: StudentLink | TeacherLink, seconds: float) -> None:
    """From now on this link, which has been made, waits so long for the other job to come back."""
    link._settings = replace(link._settings, connect_timeout=seconds)


def make_links_wait_shortly(seconds: float) -> None:
    """The same for each link that this process makes; for processes of a test alone."""
    for kind in (StudentLink, TeacherLink):

        def connect(cls, *args, plain=kind.connect.__func__, **given):
            link = plain(cls, *args, **given)
            wait_shortly(link, seconds)
            return link

        kind.connect = classmethod(connect)
