"""The errors of the link. Every message is one sentence for the person who runs the two jobs."""

from __future__ import annotations


class LinkError(RuntimeError):
    """The link between the teacher job and the student job cannot be used, or cannot be used any more."""


class HandshakeRefused(LinkError):
    """The two jobs differ in something that must be equal. Both jobs raise it with the same sentence."""


class TeacherLost(LinkError):
    """Raised in the student: the teacher did not connect, is gone, does not answer, or sent invalid data."""


class StudentLost(LinkError):
    """Raised in the teacher: a student did not connect, is gone, does not receive its answers, or sent invalid data."""
