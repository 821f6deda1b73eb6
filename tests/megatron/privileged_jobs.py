"""What processes do in the tests of privileged validity. The judge is the teacher with a context, alone on each row."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import jobs
import packing_jobs
import teacher_context_jobs as contexts
import torch
from teacher_context_jobs import Case, alone
from torch import Tensor

from examples.demo.convert import Place, to_hugging_face
from examples.demo.model import Shape
from vcrd.loss import reference

_batches = contexts.micro_batches


def some(seed: int, packed: bool, step: int = 1) -> list[Case]:
    """Micro-batches that all have a context, though not for each row. step: of the lengths of packed sequences."""
    return [case for case in contexts.cases(seed, packed, step, count=9) if len(case.flat.tokens)][:4]


def micro_batches(group: list[Case]) -> list[dict]:
    """The first of `contexts.micro_batches` has no fields."""
    return _batches([group[0], *group])[1:]


def trained(settings, variants: list[dict], local: bool) -> list[SimpleNamespace]:
    with patch.object(contexts, "micro_batches", micro_batches):
        return contexts.trained(settings, variants, local)


def beside_context_ranks(settings, group: list[Case]) -> list[Tensor]:
    with patch.object(contexts, "micro_batches", micro_batches):
        return contexts.beside_context_ranks(settings, group)


def reference_step(settings, group: list[Case], shape: Shape) -> SimpleNamespace:
    """As `contexts.reference_step`: the teacher sees no context, and its actions are judged by one that does."""
    student, teacher = jobs.model(jobs.STUDENT, seed=1), contexts.model(shape).eval()
    losses, total, prefers = [], 0.0, []
    for case, batch in zip(group, micro_batches(group), strict=True):
        edges, mask = case.edges or [0, jobs.SEQUENCE], None
        if case.edges:
            mask = packing_jobs.blocks(edges)
        positions = torch.cat([torch.arange(b - a) for a, b in zip(edges, edges[1:], strict=False)])
        q = student(case.tokens, positions.expand_as(case.tokens), mask)
        blind = case._replace(contexts=[([], []) for _ in case.contexts])
        p, judge = (alone(teacher, each).transpose(0, 1) for each in (blind, case))
        options = {"vocab_size": jobs.TRUE_VOCAB, "mask": batch["loss_mask"]}
        stats = reference.statistics(q, p, batch["labels"], name=settings.divergence, **options)

        def by_label(labels: Tensor, judge=judge, options=options) -> dict[str, Tensor]:
            return reference.statistics(judge, judge, labels, **options)

        verdicts = reference.privileged_log_validities(
            by_label, stats["student_action"], stats["teacher_action"]
        )
        prefers += [(verdicts[0] > verdicts[1]).any(), (verdicts[0] < verdicts[1]).any()]
        weight, _ = reference.weights(*verdicts, **jobs.weight_map(settings), mask=batch["loss_mask"])
        loss = weight * stats["divergence"]
        losses.append(loss.detach())
        total = total + (loss * batch["loss_mask"]).sum() / batch["loss_mask"].sum() / len(group)
    assert any(prefers[::2]) and any(prefers[1::2]), "the judge prefers either model somewhere"
    total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return SimpleNamespace(losses=losses, gradients=to_hugging_face({Place(): gradients}, jobs.STUDENT, 4))


def references(settings, groups: list[tuple[list[Case], Shape]]) -> list[SimpleNamespace]:
    return [reference_step(settings, group, shape) for group, shape in groups]
