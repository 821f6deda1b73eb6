"""Warnings about a teacher whose figures can only mean an error, in the first step and with each report."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss.api import CalibratedLoss
from vcrd.megatron.layout import Layout
from vcrd.teacher_logits import TeacherLogits, TopKLogits

_log = logging.getLogger("vcrd")
# A uniform teacher: the log-probability of its best token is at most this far above -ln(columns), in nats. An output
# layer of zeros has 0. A random one with Megatron's standard deviation of 0.02 has 0.13 with 8 hidden units and 45
# columns, and more with more of either.
_UNIFORM = 0.01
# An ignorant teacher: the cross-entropy of the labels is at least this share of ln(columns). A model that only knows
# how often each token occurs has 0.63 of it for this repository's pages by bytes, 0.65 by words and 0.84 by letters. A
# teacher of another tokenizer has 1 and more.
_IGNORANT = 0.9
# .. and its agreement with the student is at most this, and three standard deviations, above that of two guesses.
_NEAR_CHANCE = 0.05
# Fewer tokens than this show neither, nor a padding whose columns are not known: one rare label is no error.
_FEWEST = 16
# Padding: the share of tokens whose best token is in padding. Half, if its columns are known; an untrained teacher has
# about the share of the vocabulary that these columns are.
_KNOWN_PADDING = 0.5
# If they are not known, columns that no label of a micro-batch reaches count as padding, under three conditions: nearly
# all best tokens are there, they are at most half of the vocabulary, and labels are less probable than by a guess.
_SEEMING_PADDING, _MOST_SPARE, _WORSE_THAN_A_GUESS = 0.9, 0.5, 1.0
_SUMS = ("rows", "bad", "tokens", "agreement", "best", "labelled", "label", "beyond", "spare")
_BAD, _PADDING, _UNIFORM_TEACHER, _IGNORANT_TEACHER = range(4)
_ERRORS = 4


class TeacherCheck:
    """Sums over this rank's tokens of one teacher, on their device. Adding does not wait for it; `tell` waits once.

    number, name: of the teacher among those of the job; the name "" is that of an only teacher without a name.
    """

    def __init__(self, number: int = 0, name: str = "") -> None:
        self._number = number
        self._who = f"the teacher {name}" if name else "the teacher"
        self._layout: Layout | None = None
        self._known: int | None = None  # columns that have a token
        self._teacher: Any = None
        self._sums: Tensor | None = None

    def place(self, layout: Layout, sizes: Sequence[int], teacher: Any) -> None:
        """To be called before the first micro-batch.

        sizes: of the true vocabulary, as stated by the settings or the tokenizer; the smallest counts. teacher:
        `RemoteTeacher` or `ColocatedTeacher`, which knows the replica that serves this rank.
        """
        self._layout = layout
        self._known = min([layout.vocab_size, *sizes]) if sizes else None
        self._teacher = teacher

    @torch.no_grad()
    def add(self, out: CalibratedLoss, mask: Tensor | None, labels: Tensor, answer: TeacherLogits) -> None:
        """Adds one micro-batch; mask [s, b] or None, labels [s, b] and the teacher's answer, as given to the loss."""
        stats, columns = out.stats, self._layout.vocab_size
        bad = stats.skipped
        read = torch.ones_like(bad) if mask is None else mask != 0
        keep = read & ~bad
        # A limit, so that one label of probability 0 does not outweigh a thousand others.
        most = 2 * math.log(columns) + 2
        first_spare = torch.clamp(labels.max() + 1, max=columns) if self._known is None else self._known
        # Both are 0 if there is no label. They are also 0 if both models are sure of it, and then nothing is wrong.
        labelled = (stats.teacher_label_logprob != 0) | (stats.cross_entropy != 0)
        label = stats.teacher_label_logprob
        if isinstance(answer, TopKLogits):
            label = _expected(answer, labels, columns)
        rows = (
            torch.ones_like(label),
            stats.student_action == stats.teacher_action,
            (-stats.teacher_logprob_of_teacher_action).clamp(max=most),
            labelled,
            torch.where(labelled, -label, 0.0).clamp(max=most),
            stats.teacher_action >= first_spare,
            torch.ones_like(label) * (columns - first_spare) / columns,
        )
        # A NaN of the student counts as 0.
        kept = torch.where(keep, torch.stack([row.float() for row in rows]), 0.0).nan_to_num(nan=0.0)
        counts = torch.stack([read.sum(), (read & bad).sum()]).double()
        sums = torch.cat([counts, kept.flatten(1).sum(1, dtype=torch.float64)])
        self._sums = sums if self._sums is None else self._sums + sums

    def tell(self, when: str, group: dist.ProcessGroup | None = None) -> None:
        """Warns if there is an error, and sets the sums to zero. Waits for the device.

        when: the beginning of the warning. group: ranks that all call this, for example the data-parallel group. One
        all-reduce of 14 float64. If all of them find the same error, the last rank warns for all; else each rank that
        finds one warns for itself.
        """
        mine = torch.zeros(len(_SUMS), dtype=torch.float64) if self._sums is None else self._sums
        self._sums = None
        if group is not None and "nccl" in dist.get_backend(group):
            mine = mine.to(torch.device("cuda", torch.cuda.current_device()))
        own = torch.cat([mine, self._errors(mine), (mine[:1] > 0).double()])
        total = own.clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        own, total = torch.stack([own, total]).tolist()
        # The tensor ranks have the same figures.
        if self._layout is None or self._layout.tensor_rank != self._layout.tensor_size - 1:
            return
        found, ranks = own[len(_SUMS) : -1], total[-1]
        everywhere = [error for error in range(_ERRORS) if total[len(_SUMS) + error] == ranks > 0]
        if everywhere:
            if group is None or group.rank() == group.size() - 1:
                _log.warning("%s: %s %s", when, self._who, self._sentence(everywhere[0], total))
        elif any(found):
            replica, _ = self._teacher.each()[self._number].served_by
            which = self._who if replica is None else f"{self._who.removeprefix('the ')} replica {replica}"
            said = self._sentence(found.index(1.0), own)
            _log.warning("%s: %s, on data rank %d, %s", when, which, self._layout.data_rank, said)

    def _errors(self, sums: Tensor) -> Tensor:
        """float64 [4]: 1 for the first error whose conditions hold, 0 for the others."""
        if self._layout is None:
            return sums.new_zeros(_ERRORS)
        columns, found = self._layout.vocab_size, dict(zip(_SUMS, sums, strict=True))
        tokens, even, labelled = found["tokens"], math.log(columns), found["labelled"]
        enough = (tokens >= _FEWEST) & (labelled >= _FEWEST)
        chance = tokens / columns
        padding = found["beyond"] >= _KNOWN_PADDING * tokens
        if self._known is None:
            padding = (found["beyond"] >= _SEEMING_PADDING * tokens) & enough
            padding &= found["spare"] <= _MOST_SPARE * tokens
            padding &= found["label"] >= (even + _WORSE_THAN_A_GUESS) * labelled
        reasons = (
            (tokens == 0) & (found["bad"] > 0),
            padding & (tokens > 0),
            (found["best"] >= (even - _UNIFORM) * tokens) & (tokens > 0),
            (found["label"] >= _IGNORANT * even * labelled)
            & (found["agreement"] <= chance + 3 * chance.sqrt() + _NEAR_CHANCE * tokens)
            & enough,
        )
        reasons = torch.stack(reasons).double()
        return reasons * (reasons.cumsum(0) == 1)

    def _sentence(self, error: int, sums: list[float]) -> str:
        found, columns = dict(zip(_SUMS, sums, strict=False)), self._layout.vocab_size
        if error == _BAD:
            return (
                f"is no distribution for any of {found['bad']:.0f} tokens: a NaN, a +inf or nothing above -inf is "
                "among its logits, and nothing is learnt; look at its weights and at its precision"
            )
        tokens, even = found["tokens"], f"ln {columns} = {math.log(columns):.4g}"
        if error == _PADDING:
            padding = (
                f"columns {self._known} to {columns - 1}, to which no token belongs"
                if self._known is not None
                else "columns that no label reaches, which look like padding"
            )
            return (
                f"has its most probable token in {padding}, for {_percent(found['beyond'] / tokens)} of the tokens: "
                "give both jobs the true vocab_size"
            )
        if error == _UNIFORM_TEACHER:
            return (
                f"gives every token the same probability: its most probable token has {found['best'] / tokens:.4g} "
                f"nats, of {even}; its output layer is zero, or its weights were not loaded"
            )
        return (
            f"predicts the labels no better than a guess, with a cross-entropy of "
            f"{found['label'] / found['labelled']:.4g} nats at {even}, and agrees with the student on "
            f"{_percent(found['agreement'] / tokens)} of the tokens: its tokenizer is another one, its weights were "
            "not loaded or never trained, or the labels are not what it was trained on"
        )


def _expected(answer: TopKLogits, labels: Tensor, columns: int) -> Tensor:
    """The teacher's log-probability of each label [s, b], from the top k that it sent.

    A label outside the top k gets the mean probability of all tokens outside it. The bound in the statistics is far
    larger, and would hide a teacher that knows nothing.
    """
    mean = answer.log_tail - math.log(max(1, columns - answer.ids.shape[-1]))
    known = answer.logprobs.masked_fill(answer.ids != labels[..., None], -torch.inf).amax(-1)
    return torch.where(known > -torch.inf, known, mean)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
