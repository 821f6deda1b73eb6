"""Checks the tensors of a call, on every rank alike, and settles which vocabulary columns each rank holds.

Were each rank to check only its own arguments, one would raise while the others wait for it in a collective. So the
ranks of a group exchange facts of their calls, or the sentence of the one that refuses its arguments, through the
group's key-value store: no collective, no device synchronisation, and nothing at all on later calls with equal facts.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_store

from vcrd.errors import check_number, expected, wrong_type
from vcrd.loss.config import LossConfig
from vcrd.teacher_logits import DenseLogits, HiddenStates, MixedLogits, TeacherLogits, TopKLogits

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

# What one rank states about its call: names and values, in the order in which they are compared.
RankFacts = dict[str, "int | float | str | bool | list[int] | None"]
Conclusion = TypeVar("Conclusion")


class VocabShard(NamedTuple):
    """One rank's part of the vocabulary: it holds `columns` true columns, from `first_column` on."""

    columns: int
    first_column: int
    vocab_size: int


def teacher_form(teacher: Tensor | TeacherLogits) -> TeacherLogits:
    """The teacher, where a plain tensor stands for `DenseLogits`. Raises TypeError for anything else."""
    if isinstance(teacher, Tensor):
        return DenseLogits(teacher)
    if not isinstance(teacher, TeacherLogits):
        raise wrong_type(
            "teacher_logits", "a tensor, DenseLogits, TopKLogits, HiddenStates or MixedLogits", teacher
        )
    return teacher


def settle_shard(
    student: Tensor,
    teacher: TeacherLogits,
    labels: Tensor | None,
    mask: Tensor | None,
    config: LossConfig,
    group: dist.ProcessGroup | None,
) -> VocabShard:
    """This rank's shard, once every rank of `group` found all arguments right; or an error on every rank.

    No tensor is read.
    """
    try:
        check_tensors(student, teacher, labels, mask)
        if isinstance(teacher, TopKLogits) and config.temperature != 1:
            what = "1 with a teacher of TopKLogits, whose tail has no known mass at another"
            raise expected("temperature", what, config.temperature)
    except (TypeError, ValueError) as error:
        refuse(group, error)
        raise
    facts: RankFacts = {
        **_teacher_facts(teacher, student.shape[-1]),
        "student columns": student.shape[-1],
        "student_logits leading shape": list(student.shape[:-1]),
        "student_logits dtype": str(student.dtype),
        "labels given": labels is not None,
        "mask given": mask is not None,
        "divergence": config.divergence,
        "temperature": config.temperature,
        "alpha": config.alpha,
        "beta": config.beta,
        "vocab_size": config.vocab_size,
    }
    if group is None:
        return shard_of([facts], 0)
    rank = dist.get_rank(group)
    return agree(group, facts, lambda ranks: shard_of(ranks, rank))


def check_tensors(
    student: Tensor, teacher: TeacherLogits, labels: Tensor | None, mask: Tensor | None
) -> None:
    """Raises TypeError or ValueError naming the argument that is wrong by itself."""
    check_dtype("student_logits", student, STUDENT_DTYPES)
    if student.dim() == 0:
        raise expected("student_logits", "shape [..., vocabulary shard]", "a scalar")
    if isinstance(teacher, TopKLogits):
        _check_topk(teacher, student)
    elif isinstance(teacher, MixedLogits):
        _check_mixed(teacher, student)
    else:
        _check_columns("teacher_logits", teacher, student)
    if labels is not None:
        check_dtype("labels", labels, INTEGERS)
        _check_place("labels", labels, student)
    if mask is not None:
        check_dtype("mask", mask, None)
        _check_place("mask", mask, student)


def _check_topk(teacher: TopKLogits, student: Tensor) -> None:
    check_dtype("teacher_logits.logprobs", teacher.logprobs, FLOAT32)
    check_dtype("teacher_logits.ids", teacher.ids, INTEGERS)
    check_dtype("teacher_logits.log_tail", teacher.log_tail, FLOAT32)
    _check_place("teacher_logits.logprobs", teacher.logprobs, student, "[..., k]")
    _check_place("teacher_logits.ids", teacher.ids, student, "[..., k]")
    _check_place("teacher_logits.log_tail", teacher.log_tail, student)
    entries, ids = teacher.logprobs.shape[-1], teacher.ids.shape[-1]
    if entries == 0:
        raise expected("teacher_logits.logprobs", "at least one per token", "none")
    if ids != entries:
        raise expected("teacher_logits.ids", f"{entries} per token, as logprobs", ids)


def _check_mixed(teacher: MixedLogits, student: Tensor) -> None:
    teachers, weights = teacher.teachers, teacher.weights
    for name, value in (("teachers", teachers), ("weights", weights)):
        if not isinstance(value, (tuple, list)):
            raise wrong_type(f"teacher_logits.{name}", "a tuple", value)
    if not teachers:
        raise expected("teacher_logits.teachers", "at least one teacher", "none")
    if len(weights) != len(teachers):
        raise expected("teacher_logits.weights", f"{len(teachers)}, one for each teacher", len(weights))
    for number, (one, weight) in enumerate(zip(teachers, weights, strict=True)):
        name = f"teacher_logits.teachers[{number}]"
        if not isinstance(one, (DenseLogits, HiddenStates)):
            raise wrong_type(name, "DenseLogits or HiddenStates", one)
        _check_columns(name, one, student)
        check_number(f"teacher_logits.weights[{number}]", weight, above=0)


def _check_columns(name: str, teacher: DenseLogits | HiddenStates, student: Tensor) -> None:
    """A teacher that gives a logit for each column."""
    if isinstance(teacher, HiddenStates):
        states, weight = teacher.states, teacher.weight
        check_dtype(f"{name}.states", states, STUDENT_DTYPES)
        check_dtype(f"{name}.weight", weight, STUDENT_DTYPES)
        _check_place(f"{name}.states", states, student, "[..., hidden size]")
        check_weight_shape(f"{name}.weight", weight, states.shape[-1])
        _check_device(f"{name}.weight", weight, student)
        check_number(f"{name}.scale", teacher.scale, above=0)
        check_number(f"{name}.softcap", teacher.softcap, above=0, optional=True)
        return
    check_dtype(name, teacher.logits, TEACHER_DTYPES)
    _check_place(name, teacher.logits, student, "[..., vocabulary shard]")
    if teacher.row_max is not None:
        check_dtype(f"{name}.row_max", teacher.row_max, FLOAT32)
        _check_place(f"{name}.row_max", teacher.row_max, student)


def check_weight_shape(name: str, weight: Tensor, hidden_size: int) -> None:
    """Raises ValueError unless this is an output layer for hidden states of that size."""
    if weight.dim() != 2 or weight.shape[1] != hidden_size:
        raise expected(name, f"shape [vocabulary shard, {hidden_size}]", list(weight.shape))


def check_dtype(name: str, tensor: Tensor, dtypes: dict[torch.dtype, str] | None) -> None:
    """Raises TypeError unless this is a tensor of one of these dtypes; None for any."""
    if not isinstance(tensor, Tensor):
        raise wrong_type(name, "a tensor", tensor)
    if dtypes is not None and tensor.dtype not in dtypes:
        *most, last = dict.fromkeys(dtypes.values())
        raise expected(name, f"{', '.join(most)} or {last}" if most else last, tensor.dtype, TypeError)


def _check_place(name: str, tensor: Tensor, student: Tensor, shape: str | None = None) -> None:
    """The student's leading shape, and one dimension more where a `shape` is named; the student's device."""
    leading = student.shape[:-1]
    if shape is not None and tensor.dim() == 0:
        raise expected(name, f"shape {shape}", "a scalar")
    got = tensor.shape if shape is None else tensor.shape[:-1]
    if got != leading:
        whose = "logits'" if shape is None else "student's"
        raise expected(name, f"the {whose} leading shape {list(leading)}", list(got))
    _check_device(name, tensor, student)


def _check_device(name: str, tensor: Tensor, student: Tensor) -> None:
    if tensor.device != student.device:
        raise expected(name, f"device {student.device} of student_logits", tensor.device)


def _teacher_facts(teacher: TeacherLogits, student_columns: int, name: str = "teacher_logits") -> RankFacts:
    """The form comes first: which facts there are depends on it, and they are compared in this order."""
    if isinstance(teacher, MixedLogits):
        facts: RankFacts = {
            f"{name} form": "MixedLogits",
            f"{name}.weights": list(map(float, teacher.weights)),
        }
        for number, one in enumerate(teacher.teachers):
            facts |= _teacher_facts(one, student_columns, f"{name}.teachers[{number}]")
        return facts
    if isinstance(teacher, TopKLogits):
        return {
            f"{name} form": "TopKLogits",
            f"{name} columns": student_columns,
            f"{name}.ids per token": teacher.ids.shape[-1],
        }
    if isinstance(teacher, HiddenStates):
        return {
            f"{name} form": "HiddenStates",
            f"{name} columns": teacher.weight.shape[0],
            f"{name}.states hidden size": teacher.states.shape[-1],
            f"{name}.states dtype": str(teacher.states.dtype),
            f"{name}.weight dtype": str(teacher.weight.dtype),
            f"{name}.scale": teacher.scale,
            f"{name}.softcap": teacher.softcap,
        }
    return {
        f"{name} form": "dense logits",
        f"{name} columns": teacher.logits.shape[-1],
        f"{name} dtype": str(teacher.logits.dtype),
        f"{name}.row_max given": teacher.row_max is not None,
    }


def shard_of(ranks: list[RankFacts], rank: int) -> VocabShard:
    """The shard of `rank` from the facts of all. Raises ValueError, the same on every rank, where they do not fit."""
    if len(ranks) > 1:
        require_equal(ranks)
    student = [facts["student columns"] for facts in ranks]
    own = "student columns"
    names = [name.removesuffix(" columns") for name in ranks[0] if name.endswith(" columns") and name != own]
    teachers = {name: [facts[f"{name} columns"] for facts in ranks] for name in names}
    vocab_size = ranks[0]["vocab_size"]
    if vocab_size is None:
        for teacher in teachers.values():
            if student != teacher:
                raise ValueError(
                    "vocab_size: needed where student and teacher are padded differently, "
                    f"got none for shards of {student} and {teacher} columns"
                )
        vocab_size = sum(student)
    if not 1 <= vocab_size <= sum(student):
        raise expected("vocab_size", f"1 to the student's {sum(student)} columns", vocab_size)
    starts = [0, *accumulate(student)][:-1]
    true = [min(max(vocab_size - start, 0), width) for start, width in zip(starts, student, strict=True)]
    for name, teacher in teachers.items():
        for other, (start, columns, width) in enumerate(zip(starts, true, teacher, strict=True)):
            # Only the shard in which the vocabulary ends may be padded differently: any earlier one shifts those after
            # it.
            inner = start + columns < vocab_size
            if width < columns or (inner and width != columns):
                hidden = ranks[0][f"{name} form"] == "HiddenStates"
                raise expected(
                    f"{name}.weight" if hidden else name,
                    f"{'' if inner else 'at least '}{columns} {'rows' if hidden else 'columns'} on rank {other}, those "
                    f"of its student shard (from column {start}, vocab_size {vocab_size})",
                    width,
                )
    return VocabShard(true[rank], starts[rank], vocab_size)


def require_equal(ranks: list[RankFacts]) -> None:
    """Raises ValueError for the first fact that is not the same on every rank, numbers of columns apart."""
    for name, first in ranks[0].items():
        for other, facts in enumerate(ranks):
            if facts[name] != first and not name.endswith("columns"):
                raise expected(
                    name, "equal on every rank", f"{first} on rank 0, {facts[name]} on rank {other}"
                )


@dataclass
class _GroupLedger:
    """What one group has agreed on. `rounds` is equal on every rank, because all ranks make the same calls."""

    rounds: int = 0
    conclusions: dict[str, Any] = field(default_factory=dict)


# Keyed weakly: a destroyed group takes its agreements with it.
_LEDGERS: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupLedger] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def agree(
    group: dist.ProcessGroup, facts: RankFacts, conclude: Callable[[list[RankFacts]], Conclusion]
) -> Conclusion:
    """What `conclude` makes of the facts of every rank of `group`, in rank order.

    `conclude` sees the same list on every rank, so where it raises it raises on all of them. A conclusion is kept for
    later calls with the same facts; an error is not.

    Collectives: none. The first call with new facts waits for the other ranks through the group's store.

    Raises what `conclude` raises; ValueError where another rank refused its own arguments; RuntimeError where one does
    not arrive in time.
    """
    ledger = _LEDGERS.setdefault(group, _GroupLedger())
    signature = json.dumps(facts, sort_keys=True)
    if signature not in ledger.conclusions:
        ledger.conclusions[signature] = conclude(_exchange(group, ledger, {"facts": facts}))
    return ledger.conclusions[signature]


def refuse(group: dist.ProcessGroup | None, error: Exception) -> None:
    """Tells the other ranks, should they be agreeing now, that this one is about to raise. Waits for nobody."""
    if group is not None:
        _tell_refusal(group, error)


@torch.compiler.disable
def _tell_refusal(group: dist.ProcessGroup, error: Exception) -> None:
    ledger = _LEDGERS.setdefault(group, _GroupLedger())
    _publish(group, ledger, {"refusal": f"{error}"})


def _publish(group: dist.ProcessGroup, ledger: _GroupLedger, message: dict) -> str:
    prefix = f"vcrd/agreement/{ledger.rounds}"
    ledger.rounds += 1
    _get_process_group_store(group).set(f"{prefix}/{dist.get_rank(group)}", json.dumps(message))
    return prefix


def _exchange(group: dist.ProcessGroup, ledger: _GroupLedger, message: dict) -> list[RankFacts]:
    prefix = _publish(group, ledger, message)
    store = _get_process_group_store(group)
    messages = []
    for rank in range(dist.get_world_size(group)):
        try:
            messages.append(json.loads(store.get(f"{prefix}/{rank}")))
        except dist.DistError as error:
            raise RuntimeError(
                f"group: rank {rank} did not call the loss with new shapes as this rank did, within "
                f"{store.timeout.total_seconds():.0f} s; every rank must make the same calls"
            ) from error
    for rank, other in enumerate(messages):
        if "refusal" in other:
            raise ValueError(f"rank {rank} of the group refused its arguments: {other['refusal']}")
    return [other["facts"] for other in messages]
