"""The teacher's logits by blocks of tokens, whatever form it came in: what the passes of `vcrd.loss.divergence` read.

Each class here holds settings. Its tensors are passed beside it as a flat tuple, which autograd can save. A block is
computed from these tensors alone, so it is the same in forward and in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss import ops
from vcrd.loss.checks import VocabShard
from vcrd.teacher_logits import HiddenStates, MixedLogits, TeacherLogits, TopKLogits

# Bytes of a block of float32 logits. It is written and at once read again, so it should stay in a cache (an H100's L2
# has 50 MB) and weigh little beside the student's logits; yet each block reads the whole output layer, so it should be
# of many tokens: 62 at 131072 columns. And memory from 32 MiB on goes back to the system as soon as the C library gets
# it: on CPU each block would be of fresh pages, which cost more than the arithmetic.
BLOCK_BYTES = 31 << 20

# A column of the partial statistics each, rows of the merged statistics, and a column of the constants.
_MAX, _SUM = ops.PARTIAL_COLUMNS["teacher_max"], ops.PARTIAL_COLUMNS["teacher_sum"]
_TEACHER_LABEL = ops.STATISTICS.index("teacher_label_logprob")
_STUDENT_AT_OWN = ops.STATISTICS.index("student_logprob_of_student_action")
_STUDENT_AT_TEACHERS = ops.STATISTICS.index("student_logprob_of_teacher_action")
_TEACHER_AT_STUDENTS = ops.STATISTICS.index("teacher_logprob_of_student_action")
_TEACHER_AT_OWN = ops.STATISTICS.index("teacher_logprob_of_teacher_action")
_TEACHER_ENTROPY = ops.STATISTICS.index("teacher_entropy")
_STUDENT_MAX = ops.CONSTANT_COLUMNS["student_max"]
# Above what the code 255 stands for, below what 254 does. In a row of codes the largest logit has the code 0, so a row
# without any code below 255 is none: the link sends it in the place of what codes cannot say.
NO_CODE = -23.9

Tensors = tuple["Tensor | None", ...]
Rows = slice | Tensor  # some tokens: their span, or their numbers
Group = "dist.ProcessGroup | None"
# Given the merged statistics, actions and constants, labels and mask: see `KnownTokens.restate`.
Restate = Callable[["Tensor", "Tensor", "Tensor", "Tensor | None", "Tensor | None"], "Tensor"]


class TeacherBlocks(Protocol):
    """A teacher that gives its logits for tokens [first, last)."""

    def spans(self, rows: int) -> list[tuple[int, int]]:
        """[first, last) of each block; one empty block for no rows."""

    def part(self, tensors: Tensors, rows: Rows) -> Tensors:
        """The tensors of these tokens alone."""

    def prepare(
        self, tensors: Tensors, student: Tensor, mask: Tensor | None, group: Group
    ) -> tuple[Tensors, Restate | None]:
        """Called before the first pass. Returns the tensors that `logits` takes, with what had to be computed once.

        And, where the statistics of the teacher are not those of these logits, the function that corrects them.
        """

    def logits(
        self, tensors: Tensors, student: Tensor, first: int, last: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [last - first, columns or more], and what is to be added to each row; `student` is these rows.

        memory: float32, flat, for logits that are made here and valid until it is used again: fresh pages cost more
            than what is written to them. At least `padded_columns` for each row; None for memory of their own.
        """


class DenseBlocks(NamedTuple):
    """Logits that are there already: one block. Tensors: the logits, and `row_max` or None."""

    def spans(self, rows: int) -> list[tuple[int, int]]:
        return [(0, rows)]

    def part(self, tensors: Tensors, rows: Rows) -> Tensors:
        return tuple(None if tensor is None else tensor[rows] for tensor in tensors)

    def prepare(
        self, tensors: Tensors, student: Tensor, mask: Tensor | None, group: Group
    ) -> tuple[Tensors, Restate | None]:
        return tensors, None

    def logits(
        self, tensors: Tensors, student: Tensor, first: int, last: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return tensors


class HiddenBlocks(NamedTuple):
    """Tensors: the hidden states [rows, hidden size], and the output layer in the dtype of the product."""

    columns: int
    scale: float
    softcap: float | None
    block_bytes: int

    def spans(self, rows: int) -> list[tuple[int, int]]:
        return spans_of(rows, self.columns, self.block_bytes)

    def part(self, tensors: Tensors, rows: Rows) -> Tensors:
        return tensors[0][rows], tensors[1]

    def prepare(
        self, tensors: Tensors, student: Tensor, mask: Tensor | None, group: Group
    ) -> tuple[Tensors, Restate | None]:
        return tensors, None

    def logits(
        self, tensors: Tensors, student: Tensor, first: int, last: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        states, weight = tensors
        states, weight = states[first:last], weight[: self.columns].t()
        # Autocast would round the product to 16 bits, and differently in a backward outside of it.
        with torch.autocast(states.device.type, enabled=False):
            logits = _matrix(memory, len(states), self.columns, states)
            if weight.dtype == torch.float32:
                torch.mm(states.float(), weight, out=logits)
            else:
                torch.mm(states, weight, out_dtype=torch.float32, out=logits)
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits, None


class TopKBlocks(NamedTuple):
    """Tensors: log-probabilities and ids [rows, k], and the log of the tail's mass [rows].

    Once prepared, the latter's place is taken by what is subtracted from the student's logits [rows], so that they are
    log p' in the tail. Logarithms of p' are small where the mass is, however large the student's logits are, and so
    lose no digits in float32.

    These logits are for the divergence and its gradient alone: what they say of the teacher in the tail is the
    student's. `known_tokens` has what is the teacher's.
    """

    columns: int
    first_column: int
    vocab_size: int
    block_bytes: int

    def spans(self, rows: int) -> list[tuple[int, int]]:
        return spans_of(rows, self.columns, self.block_bytes)

    def part(self, tensors: Tensors, rows: Rows) -> Tensors:
        return tuple(tensor[rows] for tensor in tensors)

    def prepare(
        self, tensors: Tensors, student: Tensor, mask: Tensor | None, group: Group
    ) -> tuple[Tensors, Restate | None]:
        """One all-gather of 3 floats per token: two of the student's tail, and its logit at the teacher's action.

        The tail is summed by itself, for 1 - sum q_i would cancel.
        """
        logprobs, ids, log_tail = tensors
        known = known_tokens(logprobs, ids, log_tail, self.vocab_size)
        tails = []
        for first, last in self.spans(len(student)):
            rows, kept = rows_of(first, last, student, mask)
            # As if it were a teacher: the kernel then finds its maximum and its sum.
            tail = self._block(rows)
            tail[:, : self.columns].copy_(rows[:, : self.columns])
            tail[:, self.columns :] = -torch.inf
            at_action = tail.gather(1, self._places(known.action[first:last, None]))
            tail.scatter_(1, self._places(ids[first:last], logprobs[first:last]), -torch.inf)
            partials = ops.row_statistics(
                rows, tail, None, None, kept, 1.0, self.columns, self.first_column, 0
            )
            tails.append(torch.stack([partials[:, _MAX], partials[:, _SUM], at_action[:, 0]], -1))
        maxima, sums, at_action = gather_shards(joined(tails), group).double().unbind(-1)
        top = maxima.amax(0)
        sums = (sums * (maxima - top).exp()).sum(0)
        # A maximum of -inf: the student has no tail. Then there is no ratio of the two, and the ids are all there is.
        log_ratio = torch.where(top == -torch.inf, 0.0, top + sums.log() - log_tail)
        # NaN also says that an id lies outside the vocabulary. On the CPU that was an error before; on other devices
        # reading it would stall them.
        log_ratio = log_ratio.masked_fill(known.entropy.isnan(), torch.nan)
        subtracted = log_ratio.float()
        # The ids take what rounding has lost: only the distance between the tail and the ids counts.
        lost = torch.where(subtracted.isinf(), 0.0, log_ratio - subtracted).float()
        return (logprobs + lost[:, None], ids, subtracted), partial(known.restate, at_action.amax(0))

    def logits(
        self, tensors: Tensors, student: Tensor, first: int, last: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, ids, subtracted = (tensor[first:last] for tensor in tensors)
        block = self._block(student, memory)
        torch.sub(student[:, : self.columns], subtracted[:, None], out=block[:, : self.columns])
        # The largest of an id's entries, in any order of theirs: the same block in backward.
        places = self._places(ids, logprobs)
        block.scatter_reduce_(1, places, logprobs, "amax", include_self=False)
        return block, None

    def _block(self, student: Tensor, memory: Tensor | None = None) -> Tensor:
        """Uninitialised float32 [rows, columns and 1 to 4 more], the first of which takes what lies elsewhere."""
        return _matrix(memory, len(student), padded_columns(self.columns), student)

    def _places(self, ids: Tensor, logprobs: Tensor | None = None) -> Tensor:
        """Where in a block each entry belongs, int64 [rows, k]: safe for any ids, since masked rows may hold any."""
        local = ids - self.first_column
        here = (local >= 0) & (local < self.columns)
        if logprobs is not None:
            here &= logprobs != -torch.inf
        return torch.where(here, local, self.columns)


class MixedBlocks(NamedTuple):
    """The mixture of the forms in `parts`. Tensors: what is subtracted from each part's logits [rows, parts], so that
    exp gives its share of the mixture, and then the tensors of each part.
    """

    parts: tuple[DenseBlocks | HiddenBlocks, ...]
    columns: int
    block_bytes: int

    def spans(self, rows: int) -> list[tuple[int, int]]:
        return spans_of(rows, self.columns, self.block_bytes)

    def part(self, tensors: Tensors, rows: Rows) -> Tensors:
        of_parts = (tensor for form, own in self._each(tensors[1:]) for tensor in form.part(own, rows))
        return tensors[0][rows], *of_parts

    def prepare(
        self, tensors: Tensors, student: Tensor, mask: Tensor | None, group: Group
    ) -> tuple[Tensors, Restate | None]:
        return tensors, None

    def logits(
        self, tensors: Tensors, student: Tensor, first: int, last: int, memory: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        shares = tensors[0][first:last].t().contiguous()
        block = _matrix(memory, last - first, self.columns, shares)
        for number, logits in enumerate(self._logits(tensors[1:], first, last)):
            ops.mix_(block, *logits, shares[number], number == 0)
        return block, None

    def normalisers(self, tensors: Tensors, log_weights: list[float], rows: int, group: Group) -> Tensor:
        """log sum exp of each part's logits minus its log weight, float32 [rows, parts]: NaN for no distribution.

        tensors: of the parts. One pass over all of them. One all-gather of 2 floats per token and part.
        """
        found = [torch.stack(list(self._sums(tensors, *span)), 1) for span in self.spans(rows)]
        maxima, sums = (
            gather_shards(joined(found).flatten(1), group).unflatten(-1, (-1, 2)).double().unbind(-1)
        )
        top = maxima.amax(0)
        # A shard without a finite logit has the maximum -inf.
        total = top + torch.where(maxima == -torch.inf, 0.0, sums * (maxima - top).exp()).sum(0).log()
        bad = maxima.isnan().any(0) | sums.isnan().any(0) | top.isinf()
        for number, (form, own) in enumerate(self._each(tensors)):
            if isinstance(form, DenseBlocks) and own[0].dtype == torch.uint8 and own[1] is None:
                bad[:, number] |= top[:, number] < NO_CODE
        return (total - total.new_tensor(log_weights)).masked_fill(bad, torch.nan).float()

    def _sums(self, tensors: Tensors, first: int, last: int) -> Iterator[Tensor]:
        """Of each part the maximum of each row, and the sum of exp of the distances from it: [rows, 2]."""
        for logits, shift in self._logits(tensors, first, last):
            if logits.dtype == torch.uint8:  # the kernel takes codes from the teacher alone
                block = _matrix(None, last - first, self.columns, logits)
                ops.mix_(block, logits, shift, block.new_zeros(last - first), True)
                logits, shift = block, None
            # The kernel compares two models: both are this teacher.
            partials = ops.row_statistics(logits, logits, shift, None, None, 1.0, self.columns, 0, 0)
            yield partials[:, [_MAX, _SUM]]

    def _logits(self, tensors: Tensors, first: int, last: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of each part the logits [rows, columns or more], and what is to be added to each row."""
        for form, own in self._each(tensors):
            own = form.part(own, slice(first, last))
            yield form.logits(own, own[0], 0, last - first)

    def _each(self, tensors: Tensors) -> Iterator[tuple[DenseBlocks | HiddenBlocks, Tensors]]:
        """Each part with its tensors: two of either form."""
        for number, form in enumerate(self.parts):
            yield form, tensors[2 * number : 2 * number + 2]


def blocks_of(
    teacher: TeacherLogits, rows: int, shard: VocabShard, block_bytes: int, group: Group
) -> tuple[TeacherBlocks, Tensors]:
    """The teacher as blocks of [rows, columns], and its tensors. Collectives: of `MixedLogits` one all-gather of 2
    floats per token and teacher."""
    if isinstance(teacher, MixedLogits):
        each = [blocks_of(one, rows, shard, block_bytes, group) for one in teacher.teachers]
        form = MixedBlocks(tuple(one for one, _ in each), shard.columns, block_bytes)
        tensors = tuple(tensor for _, own in each for tensor in own)
        log_weights = [math.log(weight / math.fsum(teacher.weights)) for weight in teacher.weights]
        return form, (form.normalisers(tensors, log_weights, rows, group), *tensors)
    if isinstance(teacher, TopKLogits):
        k = teacher.ids.shape[-1]
        form = TopKBlocks(shard.columns, shard.first_column, shard.vocab_size, block_bytes)
        return form, (
            teacher.logprobs.reshape(rows, k),
            teacher.ids.reshape(rows, k).to(torch.int64),
            teacher.log_tail.reshape(rows),
        )
    if isinstance(teacher, HiddenStates):
        softcap = None if teacher.softcap is None else float(teacher.softcap)
        form = HiddenBlocks(shard.columns, float(teacher.scale), softcap, block_bytes)
        return form, (teacher.states.reshape(rows, teacher.states.shape[-1]), teacher.factor)
    row_max = None if teacher.row_max is None else teacher.row_max.reshape(rows).contiguous()
    return DenseBlocks(), (as_rows(teacher.logits, rows), row_max)


def padded_columns(columns: int) -> int:
    """Columns of the widest block that is made of so many."""
    return columns // 4 * 4 + 4


def _matrix(memory: Tensor | None, rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialised float32 [rows, columns] in `memory`, or on the device of `like`."""
    if memory is None:
        return like.new_empty((rows, columns), dtype=torch.float32)
    return memory[: rows * columns].view(rows, columns)


def as_rows(logits: Tensor, rows: int) -> Tensor:
    """[..., columns] as [rows, columns] with adjacent columns; a view where the strides allow one."""
    matrix = logits.reshape(rows, logits.shape[-1])
    return matrix if matrix.shape[-1] <= 1 or matrix.stride(-1) == 1 else matrix.contiguous()


def rows_of(first: int, last: int, *tensors: Tensor | None) -> Tensors:
    """Rows [first, last) of each; the tensor itself where these are all."""
    return tuple(t if t is None or last - first == t.shape[0] else t[first:last] for t in tensors)


def joined(blocks: list[Tensor]) -> Tensor:
    """The rows of all blocks; the tensor itself where there is one."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def gather_shards(partials: Tensor, group: Group) -> Tensor:
    """[rows, n] of this shard -> [shards, rows, n] of all, in rank order."""
    if group is None or partials.shape[0] == 0:
        return partials.unsqueeze(0)
    shards = dist.get_world_size(group)
    gathered = partials.new_empty((shards * partials.shape[0], partials.shape[1]))
    # The same collective under the name that this torch does not warn about.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, partials, group=group)
    return gathered.view(shards, *partials.shape)


def spans_of(rows: int, columns: int, block_bytes: int) -> list[tuple[int, int]]:
    """[first, last) of blocks of float32 logits; one empty block for no rows."""
    size = max(1, block_bytes // (4 * max(1, columns)))
    return [(first, min(first + size, rows)) for first in range(0, rows, size)] or [(0, 0)]


class KnownTokens(NamedTuple):
    """What a teacher of which the top k are known says of itself, whatever the student says: facts and bounds.

    Of each row the known tokens, and what is certain of all others. float64, ids int64.

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
