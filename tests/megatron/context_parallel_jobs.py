"""A student with context parallelism that trains for two steps, and the same two steps in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jobs
import packing_jobs
import several_jobs
import teacher_context_jobs as contexts
import torch
import torch.distributed as dist
from teacher_context_jobs import Case, alone, counted
from torch import Tensor

from examples.demo.convert import Place, to_hugging_face
from vcrd.link.plan import context_rows
from vcrd.megatron.teacher_context import CONTEXT_KEY, POSITIONS_KEY
from vcrd.settings import DistillSettings

SIZE = 2  # context-parallel ranks
STEPS, COUNT = 2, 4  # COUNT micro-batches in all
RATE = 0.05
LONGEST = contexts.LONGEST


class Sample(NamedTuple):
    """A micro-batch, and the teacher of each of its rows or packed sequences."""

    case: Case
    owners: tuple[int, ...]


def samples(data_rank: int, judges: bool) -> list[Sample]:
    """Micro-batches of rows, and of packed sequences. Some sequences have a context, with judges all of them."""
    found = []
    for number in range(COUNT):
        seed, packed = COUNT * data_rank + number, number % 2 == 1
        case = contexts.cases(seed, packed, step=2 * SIZE, count=2)[1]
        if judges:
            generator = torch.Generator().manual_seed(seed)
            hints = [torch.randint(jobs.TRUE_VOCAB, (3,), generator=generator).tolist() for _ in case.cuts]
            case = case._replace(contexts=[(hint, [0, 0, 1]) for hint in hints])
        found.append(Sample(case, tuple((number + row) % 2 for row in range(len(case.cuts)))))
    return found


def batch_of(sample: Sample, number: int, routed: bool) -> dict:
    generator, case = torch.Generator().manual_seed(70 + number), sample.case
    shape = case.tokens.shape
    batch = {
        "tokens": case.tokens,
        "labels": torch.randint(jobs.TRUE_VOCAB, shape, generator=generator),
        "loss_mask": (torch.rand(shape, generator=generator) < 0.7).float(),
    }
    tokens, positions = zip(*case.contexts, strict=True)
    batch |= {CONTEXT_KEY: list(tokens), POSITIONS_KEY: list(positions)}
    if case.edges:
        batch["cu_seqlens"] = torch.tensor([case.edges])
    if routed:
        batch["vcrd_teacher"] = torch.tensor(sample.owners)
    return batch


def students(chosen: list[DistillSettings], tensor: int) -> list[SimpleNamespace]:
    """One student after another in the same ranks. Each begins when all ranks have ended the one before."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor, context_parallel_size=SIZE)
    model_parallel_cuda_manual_seed(1)
    contexts.attend_over_context_ranks()
    found = []
    for each in chosen:
        found.append(train(each))
        dist.barrier()
    return found


def train(chosen: DistillSettings) -> SimpleNamespace:
    """Losses [b, s / 2] of each micro-batch, gradients of each step, and the weights after the last one."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    config = {"context_parallel_size": SIZE, "calculate_per_token_loss": True}
    student = contexts.model(jobs.STUDENT, seed=1, **config)
    student.config.finalize_model_grads_func = finalize
    wrapped = DistributedDataParallel(student.config, DistributedDataParallelConfig(), student).train()
    rank, data_rank = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
    own, routed = samples(data_rank, chosen.validity == "privileged"), len(chosen.link.teachers()) > 1
    batches = [batch_of(sample, number, routed) for number, sample in enumerate(own)]
    losses: list[Tensor] = []

    def forward_step(data_iterator, chunk):
        batch = next(data_iterator)
        assert parallel_state.get_tensor_model_parallel_rank() or not any(k[:5] == "vcrd_" for k in batch)
        edges = batch["cu_seqlens"][0].tolist() if "cu_seqlens" in batch else []
        columns = columns_of(rank, edges)
        positions = counted(edges).expand_as(batch["tokens"])
        given = {name: batch[name][:, columns] for name in ("labels", "loss_mask")}
        mask = given["loss_mask"]
        if edges:
            whole = packing_jobs.parametrized({**batch, "position_ids": positions}, edges)
            given["packed_seq_params"] = whole["packed_seq_params"]
        output = chunk(batch["tokens"][:, columns], positions[:, columns], None, **given)

        def loss_func(output):
            losses.append(output.detach().clone())
            return (output * mask).sum(), mask.sum().int(), {}

        return output, loss_func

    plug = distill(forward_step, chosen)
    iterator, gradients = iter(batches), []
    place = Place(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    )
    try:
        for _ in range(STEPS):
            wrapped.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=plug,
                data_iterator=iterator,
                model=[wrapped],
                num_microbatches=COUNT // STEPS,
                seq_length=jobs.SEQUENCE,
                micro_batch_size=2,
                forward_only=False,
            )
            gradients.append({name: p.main_grad.clone() for name, p in student.named_parameters()})
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter -= RATE * parameter.main_grad
        received = [each.received for each in plug._teacher.each()]
    finally:
        plug.close()
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    return SimpleNamespace(
        data_rank=data_rank,
        context_rank=rank,
        place=place,
        edges=[sample.case.edges for sample in own],
        losses=losses,
        gradients=gradients,
        weights=weights,
        received=received,
    )


def columns_of(rank: int, edges: list[int]) -> Tensor:
    spans = context_rows(jobs.SEQUENCE, rank, SIZE, edges)
    return torch.cat([torch.arange(span.start, span.stop) for span in spans])


def teach(chosen: list[DistillSettings], name: str = "") -> list[int]:
    """A teacher job for one student after another, one micro-batch in a pass."""
    from vcrd.megatron import serve

    teacher = contexts.model(seed=several_jobs.SEEDS[name or "math"])
    return [serve(teacher, several_jobs.of_teacher(each, name), microbatches=1) for each in chosen]


def truth(chosen: DistillSettings, data_size: int) -> SimpleNamespace:
    """The same steps from whole logits, each sequence alone with its teacher: reference losses, autograd."""
    student = jobs.model(jobs.STUDENT, seed=1)
    seeds = [several_jobs.SEEDS[source.name or "math"] for source in chosen.link.teachers()]
    teachers = [contexts.model(seed=seed).eval() for seed in seeds]
    everything = [samples(rank, chosen.validity == "privileged") for rank in range(data_size)]
    losses, gradients = [[] for _ in everything], []
    for step in range(STEPS):
        total, tokens = 0.0, 0.0
        for rank, own in enumerate(everything):
            for number in range(step * COUNT // STEPS, (step + 1) * COUNT // STEPS):
                batch = batch_of(own[number], number, routed=False)
                loss = reference_loss(chosen, student, teachers, own[number], batch)
                losses[rank].append(loss.detach())
                total = total + (loss * batch["loss_mask"]).sum()
                tokens = tokens + batch["loss_mask"].sum()
        student.zero_grad()
        (total / tokens).backward()
        found = {name: p.grad.clone() for name, p in student.named_parameters()}
        gradients.append(to_hugging_face({Place(): found}, jobs.STUDENT, jobs.STUDENT.layers))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= RATE * parameter.grad
    return SimpleNamespace(losses=losses, gradients=gradients)


def reference_loss(
    chosen: DistillSettings,
    student: torch.nn.Module,
    teachers: list[torch.nn.Module],
    sample: Sample,
    batch: dict,
) -> Tensor:
    from vcrd.loss import reference

    case, options = sample.case, {"vocab_size": jobs.TRUE_VOCAB, "mask": batch["loss_mask"]}
    blocks = packing_jobs.blocks(case.edges) if case.edges else None
    q = student(case.tokens, counted(case.edges).expand_as(case.tokens), blocks)
    p = judge = of_owners(teachers, sample)
    if chosen.validity == "privileged":
        p = of_owners(teachers, sample._replace(case=case._replace(contexts=[([], [])] * len(case.contexts))))
    stats = reference.statistics(q, p, batch["labels"], name=chosen.divergence, **options)
    if chosen.validity == "privileged":
        verdicts = reference.privileged_log_validities(
            lambda labels: reference.statistics(judge, judge, labels, **options),
            stats["student_action"],
            stats["teacher_action"],
        )
        weight, _ = reference.weights(*verdicts, **jobs.weight_map(chosen), mask=options["mask"])
    else:
        weight = jobs.expected_weights(chosen, stats, options["mask"])
    return weight * stats["divergence"]


def of_owners(teachers: list[torch.nn.Module], sample: Sample) -> Tensor:
    """Logits [b, s, v], for each sequence those of its teacher."""
    answers = [alone(teacher, sample.case).transpose(0, 1) for teacher in teachers]
    flat = [answer.reshape(-1, answer.shape[-1]) for answer in answers]
    cuts = zip(sample.case.cuts, sample.owners, strict=True)
    parts = [flat[owner % len(teachers)][start:stop] for (start, stop), owner in cuts]
    return torch.cat(parts).view_as(answers[0])
