"""Checks the arguments of the loss and settles which vocabulary columns each rank holds. No tensor is read here."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.agreement import Facts, agree, refuse

DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl")
STUDENT_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
TEACHER_DTYPES = {**STUDENT_DTYPES, torch.uint8: "uint8 codes"}


class Layout(NamedTuple):
    """One rank's place: it holds `columns` true columns of the vocabulary, from `first_column` on."""

    columns: int
    first_column: int
    vocab_size: int


def check_tensors(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_max: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raises TypeError or ValueError naming the argument that is wrong by itself."""
    for name, logits, dtypes in (
        ("student_logits", student_logits, STUDENT_DTYPES),
        ("teacher_logits", teacher_logits, TEACHER_DTYPES),
    ):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(logits).__name__}")
        if logits.dtype not in dtypes:
            *most, last = dtypes.values()
            raise TypeError(f"{name}: expected {', '.join(most)} or {last}, got {logits.dtype}")
        if logits.dim() == 0:
            raise ValueError(f"{name}: expected shape [..., vocabulary shard], got a scalar")
    leading = student_logits.shape[:-1]
    if teacher_logits.shape[:-1] != leading:
        raise ValueError(
            f"teacher_logits: expected the student's leading shape {list(leading)}, "
            f"got {list(teacher_logits.shape[:-1])}"
        )
    rowwise = {"teacher_max": teacher_max, "labels": labels, "mask": mask}
    for name, tensor in rowwise.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.shape != leading:
            raise ValueError(
                f"{name}: expected the logits' leading shape {list(leading)}, got {list(tensor.shape)}"
            )
    if labels is not None and (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    ):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if teacher_max is not None and teacher_max.dtype != torch.float32:
        raise TypeError(f"teacher_max: expected float32, got {teacher_max.dtype}")
    for name, tensor in {"teacher_logits": teacher_logits, **rowwise}.items():
        if tensor is not None and tensor.device != student_logits.device:
            raise ValueError(
                f"{name}: expected device {student_logits.device} of student_logits, got {tensor.device}"
            )


def check_settings(
    divergence: str, temperature: float, alpha: float, beta: float, vocab_size: int | None
) -> None:
    """Raises ValueError or TypeError naming the setting that is wrong by itself."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    for name, value in (("temperature", temperature), ("alpha", alpha), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha: expected a number in [0, 1), got {alpha}")
    if not 0 < beta < 1:
        raise ValueError(f"beta: expected a number in (0, 1), got {beta}")
    if vocab_size is not None and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int)):
        raise TypeError(f"vocab_size: expected an int, got {type(vocab_size).__name__}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}")


def settle_layout(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_max: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    temperature: float,
    alpha: float,
    beta: float,
    vocab_size: int | None,
    group: dist.ProcessGroup | None,
) -> Layout:
    """This rank's layout, once every rank of `group` found all arguments right; or an error on every rank."""
    try:
        check_tensors(student_logits, teacher_logits, teacher_max, labels, mask)
        check_settings(divergence, temperature, alpha, beta, vocab_size)
    except (TypeError, ValueError) as error:
        if group is not None:
            refuse(group, error)
        raise
    facts: Facts = {
        "student columns": student_logits.shape[-1],
        "teacher columns": teacher_logits.shape[-1],
        "student_logits leading shape": list(student_logits.shape[:-1]),
        "student_logits dtype": str(student_logits.dtype),
        "teacher_logits dtype": str(teacher_logits.dtype),
        "teacher_max given": teacher_max is not None,
        "labels given": labels is not None,
        "mask given": mask is not None,
        "divergence": divergence,
        "temperature": temperature,
        "alpha": alpha,
        "beta": beta,
        "vocab_size": vocab_size,
    }
    if group is None:
        return layout_of([facts], 0)
    rank = dist.get_rank(group)
    return agree(group, facts, lambda ranks: layout_of(ranks, rank))


def layout_of(ranks: list[Facts], rank: int) -> Layout:
    """The layout of `rank` from the facts of all. Raises ValueError, the same on every rank, where they do not fit."""
    for name, first in ranks[0].items():
        for other, facts in enumerate(ranks):
            if facts[name] != first and not name.endswith("columns"):
                raise ValueError(
                    f"{name}: expected equal on every rank, got {first} on rank 0, {facts[name]} on rank {other}"
                )
    student = [facts["student columns"] for facts in ranks]
    teacher = [facts["teacher columns"] for facts in ranks]
    vocab_size = ranks[0]["vocab_size"]
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                "vocab_size: needed where student and teacher are padded differently, "
                f"got none for shards of {student} and {teacher} columns"
            )
        vocab_size = sum(student)
    if not 1 <= vocab_size <= sum(student):
        raise ValueError(f"vocab_size: expected 1 to the student's {sum(student)} columns, got {vocab_size}")
    starts = [0, *accumulate(student)][:-1]
    true = [min(max(vocab_size - start, 0), width) for start, width in zip(starts, student, strict=True)]
    for other, (start, columns, width) in enumerate(zip(starts, true, teacher, strict=True)):
        # Only the shard in which the vocabulary ends may be padded differently: any earlier one shifts those after it.
        inner = start + columns < vocab_size
        if width < columns or (inner and width != columns):
            raise ValueError(
                f"teacher_logits: expected {'' if inner else 'at least '}{columns} columns on rank {other}, "
                f"those of its student shard (from column {start}, vocab_size {vocab_size}), got {width}"
            )
    return Layout(true[rank], starts[rank], vocab_size)
