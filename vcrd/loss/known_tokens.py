"""What a teacher of which the top k are known says of itself, whatever the student says: facts and bounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vcrd.loss import ops

# Rows of the merged statistics, and a column of the constants.
_TEACHER_LABEL = ops.STATISTICS.index("teacher_label_logprob")
_STUDENT_AT_OWN = ops.STATISTICS.index("student_logprob_of_student_action")
_STUDENT_AT_TEACHERS = ops.STATISTICS.index("student_logprob_of_teacher_action")
_TEACHER_AT_STUDENTS = ops.STATISTICS.index("teacher_logprob_of_student_action")
_TEACHER_AT_OWN = ops.STATISTICS.index("teacher_logprob_of_teacher_action")
_TEACHER_ENTROPY = ops.STATISTICS.index("teacher_entropy")
_STUDENT_MAX = ops.CONSTANT_COLUMNS["student_max"]


class KnownTokens(NamedTuple):
    """Of each row the known tokens and what is certain of all others. float64, ids int64.

    The masses of the known tokens and of the tail add up to 1. Rows without a distribution, and rows with an id outside
    the vocabulary, are NaN.
    """

    ids: Tensor  # [rows, k]
    logprobs: Tensor  # [rows, k], -inf for entries that do not count: empty ones, and repetitions of an id
    bound: Tensor  # [rows], what the log-probability of any other token is at most
    entropy: Tensor  # [rows], a lower bound: the entropy with `bound` as log-probability of all others
    # [rows], the most probable known token, of equal ones the lowest id; -1 where none is known, 0 in rows of NaN.
    action: Tensor
    vocab_size: int

    def logprob_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens [rows]: the log-probability or its bound, and whether the token is known."""
        logprob = torch.where(self.ids == tokens[:, None], self.logprobs, -torch.inf).amax(-1)
        known = logprob != -torch.inf
        return torch.where(known, logprob, self.bound), known

    def restate(
        self,
        student_logit: Tensor,
        statistics: Tensor,
        actions: Tensor,
        constants: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Statistics [11, rows] and, in place, actions as they are of this teacher. The last row is log V of the label.

        student_logit: [rows], the student's logit at `action`, -inf where that is -1. statistics, actions,
            constants: as merged, [10, rows], [2, rows] and [rows, n], of a teacher whose tail has the student's shape;
            where the label is not known, log V stays what they say.
        """
        statistics = torch.cat([statistics, statistics[_TEACHER_LABEL, None]])
        at_students, _ = self.logprob_of(actions[0])
        at_own, has_action = self.logprob_of(self.action)
        top = constants[:, _STUDENT_MAX].double()
        # Of an unknown action the student's probability is at most that of its own.
        distance = torch.where(has_action, student_logit.double() - top, 0.0)
        found = {
            _STUDENT_AT_TEACHERS: distance + statistics[_STUDENT_AT_OWN],
            _TEACHER_AT_STUDENTS: at_students,
            _TEACHER_AT_OWN: at_own,
            _TEACHER_ENTROPY: self.entropy,
        }
        if labels is not None:
            at_label, known = self.logprob_of(labels)
            at_label = torch.where(labels < 0, 0.0, at_label)
            # As of any teacher: a label outside the vocabulary has no probability.
            found[_TEACHER_LABEL] = at_label.masked_fill(labels >= self.vocab_size, torch.nan)
            found[-1] = torch.where(known, at_label, statistics[-1])
        keep = torch.ones_like(has_action) if mask is None else mask != 0
        for row, value in found.items():
            statistics[row] = torch.where(keep, value, 0.0)
        actions[1] = torch.where(keep, self.action, 0)
        return statistics


def known_tokens(logprobs: Tensor, ids: Tensor, log_tail: Tensor, vocab_size: int) -> KnownTokens:
    """From log-probabilities and ids [rows, k] in any order, and the log of all other mass [rows]."""
    outside = ((ids < 0) | (ids >= vocab_size)) & (logprobs != -torch.inf)
    # Sorted by id, and where an id occurs several times its largest log-probability first: that one counts.
    logprobs, order = logprobs.double().sort(dim=-1, descending=True, stable=True)
    ids, by_id = ids.gather(-1, order).sort(dim=-1, stable=True)
    logprobs = logprobs.gather(-1, by_id)
    logprobs[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], -torch.inf)
    known = logprobs != -torch.inf
    log_tail = torch.where(known.sum(-1) >= vocab_size, -torch.inf, log_tail.double())
    total = torch.logaddexp(logprobs.logsumexp(-1), log_tail)
    total = total.masked_fill(outside.any(-1), torch.nan)
    logprobs, log_tail = logprobs - total[:, None], log_tail - total
    bound = torch.minimum(log_tail, torch.where(known, logprobs, torch.inf).amin(-1))
    of_tail = torch.where(log_tail == -torch.inf, 0.0, log_tail.exp() * bound)
    entropy = -torch.where(known, logprobs.exp() * logprobs, 0.0).sum(-1) - of_tail
    best = logprobs.amax(-1, keepdim=True)
    action = torch.where(known & (logprobs == best), ids, vocab_size).amin(-1)
    action = torch.where(action < vocab_size, action, -1).masked_fill(entropy.isnan(), 0)
    return KnownTokens(ids, logprobs, bound, entropy, action, vocab_size)
