"""A student of several teachers: its jobs, and the truth computed in one process."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import jobs
import torch
from ports import free_port
from test_distillation import settings as of_one
from torch import Tensor

from examples.demo.convert import Place, to_hugging_face
from vcrd.settings import DistillSettings

NAMES = ("math", "code", "law")
SEEDS = {"math": 2, "code": 3, "law": 4}  # for the random weights


def settings(names: tuple[str, ...] = NAMES, **changes) -> DistillSettings:
    """The settings of the student. Each teacher has its own port."""
    address = ",".join(f"{name}=127.0.0.1:{free_port()}" for name in names)
    return of_one(address=address, **changes)


def of_teacher(chosen: DistillSettings, name: str) -> DistillSettings:
    """What is given to the job of one teacher: settings without names."""
    (own,) = (source for source in chosen.link.teachers() if source.name == name)
    return chosen.replaced(link=chosen.link.of(own), teacher_weights=None, teacher_mixture=None)


def serve(chosen: DistillSettings, name: str) -> int:
    from vcrd.megatron import serve

    return serve(jobs.model(jobs.TEACHER, SEEDS[name]), of_teacher(chosen, name))


PLAIN = jobs.batches


def batches(count: int, data_rank: int = 0, size: int = 2) -> list[dict]:
    """Micro-batches whose samples name their teachers: by name, by index, or not at all."""
    found = PLAIN(count, data_rank, size)
    for number, batch in enumerate(found):
        owners = [(number + data_rank + row * (1 + number // 2)) % len(NAMES) for row in range(size)]
        if number % 3 == 0:
            batch["vcrd_teacher"] = torch.tensor(owners)
        elif number % 3 == 1:
            batch["vcrd_teacher"] = [NAMES[owner] for owner in owners]
    return found


def owners_of(batch: dict) -> list[int]:
    given = batch.get("vcrd_teacher", [0] * len(batch["tokens"]))
    return [NAMES.index(each) if isinstance(each, str) else int(each) for each in given]


def student(chosen: DistillSettings, micro_batches: int, per_rank: int | None = None) -> SimpleNamespace:
    """As `jobs.student_job`. upstream: what each call of a fused head expects of the upstream gradient."""
    from vcrd.megatron import fused_head

    jobs.batches, told, head = batches, [], fused_head.fused_validity_calibrated_kl

    def recorded(*arguments, **named):
        told.append(named["head"].upstream)
        return head(*arguments, **named)

    with patch.object(fused_head, "fused_validity_calibrated_kl", recorded):
        found = jobs.student_job(chosen, micro_batches, per_rank)
    return SimpleNamespace(**vars(found), upstream=told)


def direct(chosen: DistillSettings, micro_batches: int, data_size: int = 1) -> SimpleNamespace:
    """`jobs.direct` with a teacher for each sample: losses, gradients, and the sums of each teacher's tokens."""
    from vcrd.loss import reference

    model = jobs.model(jobs.STUDENT, seed=1)
    teachers = [jobs.model(jobs.TEACHER, SEEDS[name]) for name in NAMES]
    factors = torch.tensor([chosen.weight_of(name) for name in NAMES], dtype=torch.float64)
    losses: list[Tensor] = []
    total, sums = 0.0, torch.zeros(len(NAMES), 3, dtype=torch.float64)
    for data_rank in range(data_size):
        for batch in batches(micro_batches, data_rank):
            tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
            positions = torch.arange(jobs.SEQUENCE).expand_as(tokens)
            q = model(tokens, positions, None)
            owners = owners_of(batch)
            p = torch.stack(
                [teachers[n](tokens[[row]], positions[[row]], None)[0] for row, n in enumerate(owners)]
            )
            stats = reference.statistics(
                q, p, labels, name=chosen.divergence, vocab_size=jobs.TRUE_VOCAB, mask=mask
            )
            weight, _ = reference.weights(
                *reference.log_validities(stats, chosen.validity), **jobs.weight_map(chosen), mask=mask
            )
            loss = weight * stats["divergence"] + chosen.ce_weight * stats["cross_entropy"]
            loss = loss * factors[owners][:, None]
            losses.append(loss.detach())
            total = total + (loss * mask).sum() / mask.sum() / micro_batches / data_size
            for row, n in enumerate(owners):
                keep = mask[row].bool()
                own = (keep.sum(), stats["divergence"][row][keep].sum(), weight[row][keep].sum())
                sums[n] += torch.stack([each.detach().double() for each in own])
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return SimpleNamespace(
        distilled=losses,
        gradients=to_hugging_face({Place(): gradients}, jobs.STUDENT, jobs.STUDENT.layers),
        sums=sums.tolist(),
    )
