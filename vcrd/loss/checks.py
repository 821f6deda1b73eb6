"""Checks the arguments of the loss and settles which vocabulary columns each rank holds. No tensor is read here."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcrd.loss.agreement import Facts, agree, refuse
from vcrd.teacher_logits import HiddenStates, TopKLogits

DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl")
STUDENT_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
TEACHER_DTYPES = {**STUDENT_DTYPES, torch.uint8: "uint8 codes"}
FLOAT32 = {torch.float32: "float32"}
INTEGERS = dict.fromkeys(
    (getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)), "integers"
)
Teacher = Tensor | TopKLogits | HiddenStates


class Layout(NamedTuple):
    """One rank's place: it holds `columns` true columns of the vocabulary, from `first_column` on."""

    columns: int
    first_column: int
    vocab_size: int


def check_tensors(
    student_logits: Tensor,
    teacher_logits: Teacher,
    teacher_max: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raises TypeError or ValueError naming the argument that is wrong by itself."""
    _check_dtype("student_logits", student_logits, STUDENT_DTYPES)
    if student_logits.dim() == 0:
        raise ValueError("student_logits: expected shape [..., vocabulary shard], got a scalar")
    dense = not isinstance(teacher_logits, (TopKLogits, HiddenStates))
    if isinstance(teacher_logits, TopKLogits):
        _check_topk(teacher_logits, student_logits)
    elif isinstance(teacher_logits, HiddenStates):
        _check_hidden(teacher_logits, student_logits)
    elif not isinstance(teacher_logits, Tensor):
        kind = type(teacher_logits).__name__
        raise TypeError(f"teacher_logits: expected a tensor, TopKLogits or HiddenStates, got {kind}")
    else:
        _check_dtype("teacher_logits", teacher_logits, TEACHER_DTYPES)
        _check_place("teacher_logits", teacher_logits, student_logits, "[..., vocabulary shard]")
    if teacher_max is not None and not dense:
        raise ValueError(f"teacher_max: expected none beside {type(teacher_logits).__name__}, got one")
    for name, tensor, dtypes in (
        ("teacher_max", teacher_max, FLOAT32),
        ("labels", labels, INTEGERS),
        ("mask", mask, None),
    ):
        if tensor is not None:
            _check_dtype(name, tensor, dtypes)
            _check_place(name, tensor, student_logits)


def _check_topk(teacher: TopKLogits, student: Tensor) -> None:
    _check_dtype("teacher_logits.logprobs", teacher.logprobs, FLOAT32)
    _check_dtype("teacher_logits.ids", teacher.ids, INTEGERS)
    _check_dtype("teacher_logits.log_tail", teacher.log_tail, FLOAT32)
    _check_place("teacher_logits.logprobs", teacher.logprobs, student, "[..., k]")
    _check_place("teacher_logits.ids", teacher.ids, student, "[..., k]")
    _check_place("teacher_logits.log_tail", teacher.log_tail, student)
    entries, ids = teacher.logprobs.shape[-1], teacher.ids.shape[-1]
    if entries == 0:
        raise ValueError("teacher_logits.logprobs: expected at least one per token, got none")
    if ids != entries:
        raise ValueError(f"teacher_logits.ids: expected {entries} per token, as logprobs, got {ids}")


def _check_hidden(teacher: HiddenStates, student: Tensor) -> None:
    states, weight = teacher.states, teacher.weight
    _check_dtype("teacher_logits.states", states, STUDENT_DTYPES)
    _check_dtype("teacher_logits.weight", weight, STUDENT_DTYPES)
    _check_place("teacher_logits.states", states, student, "[..., hidden size]")
    hidden = states.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden:
        raise ValueError(
            f"teacher_logits.weight: expected shape [vocabulary shard, {hidden}], got {list(weight.shape)}"
        )
    _check_device("teacher_logits.weight", weight, student)
    for name, value in (("scale", teacher.scale), ("softcap", teacher.softcap)):
        if value is None and name == "softcap":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"teacher_logits.{name}: expected a number, got {type(value).__name__}")
        if not 0 < value < float("inf"):
            raise ValueError(f"teacher_logits.{name}: expected a finite number above 0, got {value}")


def _check_dtype(name: str, tensor: Tensor, dtypes: dict[torch.dtype, str] | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if dtypes is not None and tensor.dtype not in dtypes:
        *most, last = dict.fromkeys(dtypes.values())
        expected = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def _check_place(name: str, tensor: Tensor, student: Tensor, shape: str | None = None) -> None:
    """The student's leading shape, and one dimension more where a `shape` is named; the student's device."""
    leading = student.shape[:-1]
    if shape is not None and tensor.dim() == 0:
        raise ValueError(f"{name}: expected shape {shape}, got a scalar")
    got = tensor.shape if shape is None else tensor.shape[:-1]
    if got != leading:
        whose = "logits'" if shape is None else "student's"
        raise ValueError(f"{name}: expected the {whose} leading shape {list(leading)}, got {list(got)}")
    _check_device(name, tensor, student)


def _check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name}: expected device {student.device} of student_logits, got {tensor.device}")


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
    teacher_logits: Teacher,
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
        if isinstance(teacher_logits, TopKLogits) and temperature != 1:
            raise ValueError(
                "temperature: expected 1 with a teacher of TopKLogits, whose tail has no known mass at another, "
                f"got {temperature}"
            )
    except (TypeError, ValueError) as error:
        if group is not None:
            refuse(group, error)
        raise
    facts: Facts = {
        **_teacher_facts(teacher_logits, student_logits.shape[-1]),
        "student columns": student_logits.shape[-1],
        "student_logits leading shape": list(student_logits.shape[:-1]),
        "student_logits dtype": str(student_logits.dtype),
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


def _teacher_facts(teacher: Teacher, student_columns: int) -> Facts:
    """The form comes first: which facts there are depends on it, and they are compared in this order."""
    if isinstance(teacher, TopKLogits):
        return {
            "teacher_logits form": "TopKLogits",
            "teacher columns": student_columns,
            "teacher_logits.ids per token": teacher.ids.shape[-1],
        }
    if isinstance(teacher, HiddenStates):
        return {
            "teacher_logits form": "HiddenStates",
            "teacher columns": teacher.weight.shape[0],
            "teacher_logits.states hidden size": teacher.states.shape[-1],
            "teacher_logits.states dtype": str(teacher.states.dtype),
            "teacher_logits.weight dtype": str(teacher.weight.dtype),
            "teacher_logits.scale": teacher.scale,
            "teacher_logits.softcap": teacher.softcap,
        }
    return {
        "teacher_logits form": "dense logits",
        "teacher columns": teacher.shape[-1],
        "teacher_logits dtype": str(teacher.dtype),
    }


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
            hidden = ranks[0]["teacher_logits form"] == "HiddenStates"
            name, unit = ("teacher_logits.weight", "rows") if hidden else ("teacher_logits", "columns")
            raise ValueError(
                f"{name}: expected {'' if inner else 'at least '}{columns} {unit} on rank {other}, "
                f"those of its student shard (from column {start}, vocab_size {vocab_size}), got {width}"
            )
    return Layout(true[rank], starts[rank], vocab_size)
