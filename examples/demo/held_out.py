"""Evaluates held-out problems with both models: means over all problems, and values per token for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcrd.megatron import Figures

from .data import Problem

# Values per token, in this order, for the prediction of the next token.
FIELDS = (
    "label",
    "step",
    "relative_validity",
    "weight",
    "divergence",
    "student_probability",
    "teacher_probability",
    "student_action",
    "student_action_probability",
    "teacher_action",
    "teacher_action_probability",
)


@dataclass(frozen=True)
class Measured:
    """figures: means over all tokens. solutions: by problem, a list of rows with FIELDS, one per token."""

    figures: Figures
    solutions: dict[str, list[list[float]]]


def measure(
    plug: Any, model: Any, batches: Sequence[tuple[list[Problem], dict]], run_schedule: Callable
) -> Measured:
    """Evaluates through the plug with the teacher, without training. Every rank must call it."""
    observations: list = []
    model.eval()
    with torch.no_grad(), plug.measure(observations.append) as report:
        run_schedule(plug, model, iter([batch for _, batch in batches]), len(batches), forward_only=True)
    solutions = {}
    for (problems, batch), seen in zip(batches, observations, strict=True):
        table = _table(batch, seen.out)
        for row, problem in enumerate(problems):
            judged = batch["loss_mask"][row] > 0
            solutions[problem.name] = table[row][judged].tolist()
    return Measured(report.take(), solutions)


def save(path: Path, before: Measured, after: Measured) -> None:
    """The solutions before and after training, as JSON."""
    content = {"fields": FIELDS, "before": before.solutions, "after": after.solutions}
    path.write_text(json.dumps(content))


def _table(batch: dict, out: Any) -> Tensor:
    """[b, s, FIELDS] float64."""
    stats = out.stats
    columns = (
        out.relative_validity,
        out.weight,
        stats.divergence,
        stats.student_label_logprob.exp(),
        stats.teacher_label_logprob.exp(),
        stats.student_action,
        stats.student_logprob_of_student_action.exp(),
        stats.teacher_action,
        stats.teacher_logprob_of_teacher_action.exp(),
    )
    given = (batch["labels"], batch["steps"])
    return torch.stack([*(g.double() for g in given), *(c.t().double().cpu() for c in columns)], dim=-1)
