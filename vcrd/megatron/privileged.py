"""Privileged validity: each micro-batch is asked about twice, without the teacher's context and with it.

The answer without the context is distilled. The answer with it is the judge of both models' actions
(`vcrd.loss.judge`).
"""

from __future__ import annotations

from typing import NamedTuple

from vcrd.errors import expected
from vcrd.link.question import NO_CONTEXT, Question
from vcrd.megatron.teacher_context import CONTEXT_KEY
from vcrd.megatron.teachers import Answer, Teachers
from vcrd.teacher_logits import TeacherLogits


class Judged(NamedTuple):
    """An answer, and that of the judge, for the same positions and in the same form."""

    answer: Answer | TeacherLogits
    judge: Answer | TeacherLogits


class AskedTwice(Teachers):
    """The same teachers, whose numbers count pairs of requests.

    The link sends both requests as its credits allow, so each micro-batch that is asked for ahead needs two credits.
    """

    def request(self, question: Question) -> int:
        """ValueError for a question without a context, also on the ranks that share the micro-batch where there are
        several teachers: the judge would be the teacher itself."""
        if not len(question.context.tokens):
            error = no_context()
            self._tell_refusal(error)
            raise error
        super().request(question._replace(context=NO_CONTEXT))
        return super().request(question) // 2

    def receive(self, number: int) -> Judged:
        return Judged(super().receive(2 * number), super().receive(2 * number + 1))


def no_context() -> ValueError:
    """The error for a micro-batch that has nothing by which a judge could know more."""
    what = "in every micro-batch with validity 'privileged', whose judge is the teacher that sees it"
    return expected(CONTEXT_KEY, what, "none")
