"""Steps of a student whose weights depend on the micro-batches of all ranks, and the same from the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import jobs
import torch
from torch import Tensor

from examples.demo.convert import Place, to_hugging_face
from vcrd.settings import DistillSettings

ROWS = 2  # A global micro-batch is [2, 12]. Two data-parallel ranks have one row each.
MICRO_BATCHES, STEPS = 2, 2
LOCAL = replace(jobs.TEACHER, vocab_size=jobs.STUDENT.vocab_size)


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    per_rank: int | None = None  # interleaved pipeline stages

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data


def batches() -> list[dict[str, Tensor]]:
    """Global micro-batches of all steps. In the second one no token of the last row counts."""
    found = jobs.batches(MICRO_BATCHES * STEPS, size=ROWS)
    generator = torch.Generator().manual_seed(9)
    for batch in found:
        batch["vcrd_student_validity"], scores = torch.rand(2, ROWS, jobs.SEQUENCE, generator=generator)
        batch["vcrd_teacher_validity"] = scores * (torch.rand(scores.shape, generator=generator) < 0.7)
    found[1]["loss_mask"][-1] = 0
    return found


def train(settings: DistillSettings, layout: Layout, start: int = 0) -> SimpleNamespace:
    """Steps from `start` on through Megatron's schedule, with a teacher in the same ranks: the losses [b, s] of each
    micro-batch, and the gradients of each step by place."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    mine = jobs.chunks(jobs.STUDENT, 1, layout.per_rank)
    theirs = [part for _, part in jobs.chunks(LOCAL, 2, layout.per_rank)]
    wrapped = []
    for _, part in mine:
        part.config.finalize_model_grads_func = finalize
        part.config.calculate_per_token_loss = True
        part.config.variable_seq_lengths = True
        wrapped.append(DistributedDataParallel(part.config, DistributedDataParallelConfig(), part))
    losses: list[Tensor] = []
    plug = distill(
        jobs.plain_forward_step(losses), settings, teacher=theirs if layout.per_rank else theirs[0]
    )
    rank, rows = parallel_state.get_data_parallel_rank(), ROWS // layout.data
    mine_of = slice(rank * rows, (rank + 1) * rows)
    data = [{key: value[mine_of] for key, value in batch.items()} for batch in batches()]
    gradients = []
    try:
        for step in range(start, STEPS):
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            its = data[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]
            iterators = [iter(its) for _ in mine]
            get_forward_backward_func()(
                forward_step_func=plug,
                data_iterator=iterators if layout.per_rank else iterators[0],
                model=wrapped,
                num_microbatches=MICRO_BATCHES,
                seq_length=jobs.SEQUENCE,
                micro_batch_size=rows,
                forward_only=False,
            )
            gradients.append(
                {
                    place: {name: p.main_grad.clone() for name, p in part.named_parameters()}
                    for place, part in mine
                }
            )
    finally:
        plug.close()
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return SimpleNamespace(losses=losses if last else None, gradients=gradients, rank=rank)


def direct(settings: DistillSettings) -> SimpleNamespace:
    """Losses of the global micro-batches and the gradients of each step, in one process."""
    from vcrd.loss import reference

    student, teacher = jobs.model(jobs.STUDENT, seed=1), jobs.model(LOCAL, seed=2)
    losses, gradients, data = [], [], batches()
    for step in range(STEPS):
        student.zero_grad()
        total, tokens = 0.0, 0
        for batch in data[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]:
            mask, labels = batch["loss_mask"], batch["labels"]
            positions = torch.arange(jobs.SEQUENCE).expand_as(labels)
            q, p = (model(batch["tokens"], positions, None) for model in (student, teacher))
            stats = reference.statistics(
                q, p.detach(), labels, name=settings.divergence, vocab_size=jobs.TRUE_VOCAB, mask=mask
            )
            if settings.validity == "scores":
                scores = [batch[f"vcrd_{model}_validity"].double() for model in ("student", "teacher")]
                weight, _ = reference.weights(
                    *(each.log() for each in scores),
                    **jobs.weight_map(settings),
                    mask=mask,
                    normalization=settings.normalization,
                    divergence=stats["divergence"],
                    gap=reference.gaps(stats, scores),
                )
            else:
                weight = jobs.expected_weights(settings, stats, mask)
            loss = weight * stats["divergence"] + settings.ce_weight * stats["cross_entropy"]
            losses.append(loss.detach())
            total, tokens = total + (loss * mask).sum(), tokens + int(mask.sum())
        (total / tokens).backward()
        found = {name: p.grad.clone() for name, p in student.named_parameters()}
        gradients.append(to_hugging_face({Place(): found}, jobs.STUDENT, jobs.STUDENT.layers))
    return SimpleNamespace(losses=losses, gradients=gradients)


def runs(chosen: list[DistillSettings], layout: Layout) -> list[SimpleNamespace]:
    return [train(settings, layout) for settings in chosen]


def truths(chosen: list[DistillSettings]) -> list[SimpleNamespace]:
    return [direct(settings) for settings in chosen]


def resumed(settings: DistillSettings) -> tuple[SimpleNamespace, SimpleNamespace]:
    """All steps, and the second one alone, as after a checkpoint: the student's weights stay the same here."""
    return train(settings, Layout(data=2)), train(settings, Layout(data=2), start=1)
