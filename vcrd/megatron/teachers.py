"""The teachers of a student job behind one interface: teacher jobs, or their answers on disk."""

from __future__ import annotations

from vcrd.link.question import Question
from vcrd.link.student import StudentLink, Waits
from vcrd.teacher_logits import TeacherLogits


class Teachers:
    """On every rank of the last stage: `request` on the ranks that ask, and `receive` on all, in the same order."""

    def __init__(self, link: StudentLink) -> None:
        self._link = link

    @property
    def waits(self) -> Waits:
        return self._link.waits

    @property
    def served_by(self) -> tuple[int | None, int]:
        return self._link.served_by

    @property
    def bytes_received(self) -> int:
        return self._link.bytes_received

    def request(self, question: Question) -> int:
        """Asks about the next micro-batch; returns its number: 0, 1, 2 .."""
        return self._link.request(question.tokens, question.edges, question.context)

    def receive(self, number: int) -> TeacherLogits:
        """The answer to micro-batch `number`: 0, 1, 2 .. in this order. Blocks until it has come."""
        return self._link.receive(number)

    def close(self) -> None:
        self._link.close()
