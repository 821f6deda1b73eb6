"""The figures of distillation, kept as sums over tokens, which can be added over micro-batches and ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss.api import CalibratedLoss
from vcrd.megatron.teacher_check import TeacherCheck

_log = logging.getLogger("vcrd")
BINS = 40
# Bins of the weights, each 2^(1/16) wide, from 2^-8 on: exact to 2.2 % for any floor, ceiling and normalization.
WEIGHT_BINS, _PER_OCTAVE, _LOWEST_OCTAVE = 256, 16, -8
_SUMS = (
    "tokens",
    "loss",
    "divergence",
    "cross_entropy",
    "weight",
    "student_more_valid",
    "agreement",
    "invalid_rows",
)
# Micro-batches; tokens kept by the mask in each; squares of these, which show whether the numbers are equal.
_COUNTS = ("micro_batches", "kept", "kept_squared")
_BEFORE_BINS = len(_SUMS) + len(_COUNTS)


class OfTeacher(NamedTuple):
    """Figures of one of several teachers, over the tokens of its samples. See `Figures`; wait is its teacher_wait."""

    name: str
    tokens: int
    divergence: float
    weight: float
    agreement: float
    invalid_rows: int
    wait: float


@dataclass(frozen=True)
class Figures:
    """Means over the tokens that counted in an interval of training; all are 0 if there were none.

    Attributes:
        loss, divergence, cross_entropy: nats per token.
        weight: mean weight.
        student_more_valid: share of tokens with relative validity below 1/2.
        agreement: share of tokens where both models' most probable token is the same.
        validity_histogram: tokens by relative validity, BINS equal bins over [0, 1].
        teacher_wait: seconds this rank waited for answers.
        link_bytes: payload bytes that reached this rank.
        verifier_time: seconds that tensor rank 0 spent in the verifier, the same on all its tensor ranks.
        invalid_rows: tokens that were skipped, because the teacher's logits were no distribution; no other figure
            counts them.
        weight_histogram: see `weight_quantile`.
        micro_batches: their number on all ranks.
        micro_batch_tokens, micro_batch_deviation: mean and standard deviation of the tokens that the mask keeps in
            each; the deviation is exactly 0 if these are equal.
        unlike_mask: tokens of training that the mask keeps and loss_func gives no gradient, or the other way round.
        teachers: of each teacher that has a name, in the order of the settings. loss is after `teacher_weights`.

    With the payload "topk" agreement is exact, divergence a lower bound, and weight and student_more_valid use
    bounds where the teacher's probability is not known: see `TopKLogits`.
    """

    tokens: int
    loss: float
    divergence: float
    cross_entropy: float
    weight: float
    student_more_valid: float
    agreement: float
    validity_histogram: tuple[int, ...]
    teacher_wait: float
    link_bytes: int
    verifier_time: float = 0.0
    invalid_rows: int = 0
    weight_histogram: tuple[int, ...] = ()
    micro_batches: int = 0
    micro_batch_tokens: float = 0.0
    micro_batch_deviation: float = 0.0
    unlike_mask: int = 0
    teachers: tuple[OfTeacher, ...] = ()

    def weight_quantile(self, share: float) -> float:
        """The weight below which this share of the tokens lies, exact to 2.2 %, from a histogram of 16 bins per octave.

        0 for weights below 2^-8 and if there are no tokens, 2^8 for weights above that.
        """
        left = share * sum(self.weight_histogram)
        for number, count in enumerate(self.weight_histogram):
            left -= count
            if count and left <= 0:
                return 0.0 if number == 0 else 2.0 ** (_LOWEST_OCTAVE + (number + 0.5) / _PER_OCTAVE)
        return 0.0


class Report:
    """Running sums on the device of the losses. Adding a micro-batch does not wait for the device.

    Args:
        checks: warn with each `take` if a teacher's figures can only mean an error.
        names: of the teachers; none for one without a name.
    """

    def __init__(self, checks: Sequence[TeacherCheck] = (), names: Sequence[str] = ()) -> None:
        self._checks = checks
        self._names = names
        self._waits = [0.0] * len(names)
        self._sums: Tensor | None = None
        self._step: Tensor | None = None  # sums of the present step
        self._last: Tensor | None = None  # sums of its last micro-batch
        self._wait = 0.0
        self._bytes = 0
        self._verifier_time = 0.0
        self._unlike: Tensor | None = None  # see `Figures.unlike_mask`
        # `take` warns, once each, if loss_func keeps other tokens than the mask and, without
        # calculate_per_token_loss, if the numbers of tokens differ. None: it never warns.
        self.per_token_loss: bool | None = None
        self._warned_of: set[str] = set()

    @torch.no_grad()
    def add(self, out: CalibratedLoss, mask: Tensor | None, owners: Tensor | None = None) -> None:
        """Adds one micro-batch; `mask` [s, b] or None, as given to the loss.

        Args:
            owners: integers [s, b], the number of the teacher of each token; None if all have the first one.
        """
        stats, rho = out.stats, out.relative_validity
        bad = stats.skipped
        read = torch.ones_like(bad) if mask is None else mask != 0
        keep = read & ~bad
        rows = (
            torch.ones_like(rho),
            out.loss,
            stats.divergence,
            stats.cross_entropy,
            out.weight,
            rho < 0.5,
            stats.student_action == stats.teacher_action,
            torch.zeros_like(rho),
        )
        counted = torch.where(keep, torch.stack([row.float() for row in rows]), 0.0)
        counted[-1] = read & bad
        kept = keep.flatten().double()
        slots = (rho * BINS).long().clamp(0, BINS - 1)
        octaves = out.weight.float().clamp(min=2.0**_LOWEST_OCTAVE).log2() - _LOWEST_OCTAVE
        weight_slots = (octaves * _PER_OCTAVE).nan_to_num(nan=0.0).long().clamp(0, WEIGHT_BINS - 1)
        bins = torch.zeros(BINS + WEIGHT_BINS, dtype=torch.float64, device=rho.device)
        bins.index_add_(0, slots.flatten(), kept)
        bins.index_add_(0, BINS + weight_slots.flatten(), kept)
        number = read.sum().double()
        counts = torch.stack([torch.ones_like(number), number, number * number])
        totals = counted.flatten(1).sum(1, dtype=torch.float64)
        of_teachers = []
        for teacher in range(len(self._names)):
            if owners is None:
                of_teachers.append(totals if teacher == 0 else torch.zeros_like(totals))
            else:
                own = torch.where(owners == teacher, counted, 0.0)
                of_teachers.append(own.flatten(1).sum(1, dtype=torch.float64))
        sums = torch.cat([totals, counts, bins, *of_teachers])
        self._last = sums
        self._step = sums if self._step is None else self._step + sums

    @torch.no_grad()
    def compare(self, mask: Tensor, gradient: Tensor) -> None:
        """Counts the tokens of a micro-batch for which only one of gradient and mask, both [s, b], is 0."""
        unlike = ((gradient != 0) != (mask != 0)).sum()
        self._unlike = unlike if self._unlike is None else self._unlike + unlike

    def last(self, name: str) -> Tensor:
        """[2] float32 on the device: a figure's sum over the tokens of the last micro-batch, and their number."""
        return torch.stack([self._last[_SUMS.index(name)], self._last[0]]).float()

    def end_step(self, repeated: bool = False) -> None:
        """Ends a step. Without this call all micro-batches since `take` count.

        Args:
            repeated: Megatron ran the step a second time, to compare. Its tokens are counted already, so its sums are
                dropped.
        """
        step, self._step = self._step, None
        if step is not None and not repeated:
            self._sums = step if self._sums is None else self._sums + step

    def add_link(self, wait: float, received: int, teacher: int = 0) -> None:
        """Adds seconds of waiting for a teacher and payload bytes received."""
        self._wait += wait
        if self._names:
            self._waits[teacher] += wait
        self._bytes += received

    def add_verifier(self, seconds: float) -> None:
        """Adds seconds in the verifier."""
        self._verifier_time += seconds

    def take(self, group: dist.ProcessGroup | None = None) -> Figures:
        """Figures since the last call; the sums start anew. Waits for the device.

        Args:
            group: ranks whose tokens are added up, for example the data-parallel group: one all-reduce, and one for
                each teacher that is checked, and each of its ranks must call this. None: the tokens of this rank. Only
                ranks of the last pipeline stage have any.
        """
        self.end_step()
        for check in self._checks:
            check.tell("since the last report", group)
        size = _BEFORE_BINS + BINS + WEIGHT_BINS + len(_SUMS) * len(self._names) + 1
        sums = torch.zeros(size, dtype=torch.float64)
        if self._sums is not None:
            unlike = self._sums.new_zeros(()) if self._unlike is None else self._unlike
            sums = torch.cat([self._sums, unlike.double()[None]])
        if group is not None:
            if "nccl" in dist.get_backend(group):
                sums = sums.to(torch.device("cuda", torch.cuda.current_device()))
            dist.all_reduce(sums, group=group)
        *values, unlike = sums.tolist()
        wait, received, verifier_time = self._wait, self._bytes, self._verifier_time
        self._sums, self._wait, self._bytes, self._verifier_time = None, 0.0, 0, 0.0
        self._unlike = None
        tokens = values[0]
        means = {name: value / max(tokens, 1.0) for name, value in zip(_SUMS, values, strict=False)}
        micro_batches, kept, squares = (int(value) for value in values[len(_SUMS) : _BEFORE_BINS])
        teachers = values[_BEFORE_BINS + BINS + WEIGHT_BINS :]
        bins = tuple(int(value) for value in values[_BEFORE_BINS : _BEFORE_BINS + BINS + WEIGHT_BINS])
        waits, self._waits = self._waits, [0.0] * len(self._names)
        figures = Figures(
            **{**means, "tokens": int(tokens), "invalid_rows": int(values[_SUMS.index("invalid_rows")])},
            validity_histogram=bins[:BINS],
            weight_histogram=bins[BINS:],
            teacher_wait=wait,
            link_bytes=received,
            verifier_time=verifier_time,
            micro_batches=micro_batches,
            micro_batch_tokens=kept / max(micro_batches, 1),
            # Computed from integers, so that equal numbers give exactly 0 and others do not.
            micro_batch_deviation=(micro_batches * squares - kept * kept) ** 0.5 / max(micro_batches, 1),
            unlike_mask=int(unlike),
            teachers=tuple(
                _of_teacher(name, teachers[number * len(_SUMS) : (number + 1) * len(_SUMS)], waits[number])
                for number, name in enumerate(self._names)
            ),
        )
        if group is None or dist.get_rank(group) == 0:
            self._warn(figures)
        return figures

    def _warn(self, figures: Figures) -> None:
        if self.per_token_loss is None:
            return
        if figures.unlike_mask and "mask" not in self._warned_of:
            self._warned_of.add("mask")
            _log.warning(
                "loss_mask: expected the tokens that count in loss_func, got others: for %d tokens the gradient of the "
                "loss is 0 and the mask is not, or the other way round, and the mask keeps %d; vcrd's figures, steps "
                "and normalization use the mask: give the model the loss_mask that loss_func uses",
                figures.unlike_mask,
                round(figures.micro_batches * figures.micro_batch_tokens),
            )
        if figures.micro_batch_deviation and not self.per_token_loss and "counts" not in self._warned_of:
            self._warned_of.add("counts")
            _log.warning(
                "the micro-batches hold different numbers of tokens that count (%.6g on average, standard deviation "
                "%.3g): Megatron averages over each of them first, so loss and gradient depend on the micro-batch "
                "size; --calculate-per-token-loss gives all tokens of a step the same weight",
                figures.micro_batch_tokens,
                figures.micro_batch_deviation,
            )


def _of_teacher(name: str, sums: list[float], wait: float) -> OfTeacher:
    found = dict(zip(_SUMS, sums, strict=True))
    tokens = max(found["tokens"], 1.0)
    return OfTeacher(
        name,
        int(found["tokens"]),
        found["divergence"] / tokens,
        found["weight"] / tokens,
        found["agreement"] / tokens,
        int(found["invalid_rows"]),
        wait,
    )


def raise_if_invalid(counts: list[Tensor], data_rank: int) -> None:
    """RuntimeError on every rank of the world if any rank's teacher had invalid rows in this step.

    counts: tokens with an invalid teacher row in each micro-batch of the step, scalars on the device; empty if another
        rank counts them. Collectives: one all-gather of 3 int64 over the world. Waits for the device once.
    """
    found = [int(count) for count in torch.stack(counts).tolist()] if counts else []
    first = next((number for number, count in enumerate(found) if count), -1)
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    mine = torch.tensor([sum(found), first, data_rank], dtype=torch.int64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    rows = [row.tolist() for row in rows]
    bad = sorted((number, rank) for count, number, rank in rows if count)
    if bad:
        number, rank = bad[0]
        raise RuntimeError(
            f"invalid_rows: expected a teacher of finite logits, got {sum(row[0] for row in rows)} tokens in this step "
            f"with a NaN, a +inf or nothing above -inf, the first in micro-batch {number} on data rank {rank}; "
            "the step is not applied (invalid_rows='skip' skips and counts such tokens)"
        )
