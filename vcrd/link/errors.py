"""What can go wrong between the two jobs. Every message is one sentence for the person who runs them."""

from __future__ import annotations


class LinkError(RuntimeError):
    """The link between teacher job and student job cannot be used (any more)."""


class HandshakeRefused(LinkError):
    """The two jobs disagree on a fact that must be equal. Both sides raise it with the same sentence."""


class TeacherLost(LinkError):
    """Raised in the student: the teacher did not come, is gone, does not answer, or sent nonsense."""


class StudentLost(LinkError):
    """Raised in the teacher: a student did not come, is gone, does not take its answers, or sent nonsense."""
