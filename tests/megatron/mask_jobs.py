"""What processes do in the tests of the loss mask and of a step's micro-batches, and the same from the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jobs
import torch
from torch import Tensor

from vcrd.settings import DistillSettings

TEACHER = replace(jobs.TEACHER, vocab_size=jobs.STUDENT.vocab_size)
# Where a script keeps its loss mask.
PLACES = ("model", "batch", "labels", "script")


def batches(
    count: int, seed: int = 0, kept: tuple[int, ...] = (14, 5, 23), reasoning: bool = False
) -> list[dict[str, Tensor]]:
    """Micro-batches [2, 12] in which 14, 5, 23, 14, .. of the 24 tokens count. reasoning: with steps of reasoning."""
    generator = torch.Generator().manual_seed(200 + seed)
    found = []
    for number, batch in enumerate(jobs.batches(count, seed)):
        order = torch.randperm(24, generator=generator)
        mask = (order < kept[number % len(kept)]).float().view(2, 12)
        steps = torch.randint(-1, 3, (2, 12), generator=generator)
        found.append({**batch, "loss_mask": mask, **({"vcrd_steps": steps} if reasoning else {})})
    return found


def drawn(batch: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The micro-batch as the data iterator of a script yields it that keeps its mask there."""
    if place in ("model", "batch"):
        return batch
    seen = {key: value for key, value in batch.items() if key != "loss_mask"}
    if place == "labels":
        seen["labels"] = torch.where(batch["loss_mask"] != 0, batch["labels"], -100)
    return seen


def forward_step_of(place: str, data: list[dict[str, Tensor]], losses: list[Tensor]) -> Callable[..., Any]:
    """A script's forward step that draws one micro-batch and always trains on the tokens of `data`'s masks."""
    position = 0

    def forward_step(data_iterator, model):
        nonlocal position
        next(data_iterator)
        batch = data[position % len(data)]
        position += 1
        labels = drawn(batch, place)["labels"]
        given = {"loss_mask": batch["loss_mask"]} if place == "model" else {}
        positions = torch.arange(jobs.SEQUENCE).expand_as(labels)
        output = model(batch["tokens"], positions, None, labels=labels, **given)

        def loss_func(output):
            losses.append(output.detach().clone())
            mask = batch["loss_mask"]
            return (output * mask).sum(), mask.sum().int(), {}

        return output, loss_func

    return forward_step


def step(
    settings: DistillSettings,
    place: str,
    micro_batches: int = 1,
    steps: int = 1,
    data: list[dict[str, Tensor]] | None = None,
    seen: Callable[[list[dict[str, Tensor]]], Iterable[dict[str, Tensor]]] = lambda found: found,
    measured_first: bool = False,
    **config: Any,
) -> SimpleNamespace:
    """Steps through Megatron's schedule with a teacher in the same ranks. seen: changes what is drawn here."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    model = jobs.model(jobs.STUDENT, seed=1)
    model.config.finalize_model_grads_func = finalize
    for name, value in {"variable_seq_lengths": True, **config}.items():
        setattr(model.config, name, value)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    data = batches(micro_batches * steps, parallel_state.get_data_parallel_rank()) if data is None else data
    losses: list[Tensor] = []
    plug = distill(forward_step_of(place, data, losses), settings, teacher=jobs.model(TEACHER, seed=2))
    iterator = iter(seen([drawn(batch, place) for batch in data]))
    error = figures = None
    with jobs.warnings() as said:
        try:
            if measured_first:
                with plug.measure():
                    plug(iter([drawn(data[0], place)]), wrapped)
            for _ in range(steps):
                wrapped.zero_grad_buffer()
                get_forward_backward_func()(
                    forward_step_func=plug,
                    data_iterator=iterator,
                    model=[wrapped],
                    num_microbatches=micro_batches,
                    seq_length=jobs.SEQUENCE,
                    micro_batch_size=2,
                    forward_only=False,
                )
            figures = plug.report.take(parallel_state.get_data_parallel_group())
        except ValueError as found:
            error = str(found)
    plug.close()
    last = parallel_state.is_pipeline_last_stage()
    return SimpleNamespace(
        losses=losses,
        norm=model.decoder.final_layernorm.weight.main_grad.clone() if last else None,
        figures=figures,
        # These teachers know nothing, which is said too.
        warnings=[line for line in said if not line.startswith(jobs.OF_TEACHER)],
        error=error,
    )


def direct(settings: DistillSettings, data: list[dict[str, Tensor]]) -> SimpleNamespace:
    """A step of these micro-batches from the reference: losses, and the gradient of the last norm."""
    from vcrd.loss import reference

    student, teacher = jobs.model(jobs.STUDENT, seed=1), jobs.model(TEACHER, seed=2)
    losses, total = [], 0.0
    for batch in data:
        mask, positions = batch["loss_mask"], torch.arange(jobs.SEQUENCE).expand_as(batch["tokens"])
        q, p = (model(batch["tokens"], positions, None) for model in (student, teacher))
        labels = batch["labels"]
        stats = reference.statistics(q, p.detach(), labels, vocab_size=jobs.TRUE_VOCAB, mask=mask)
        steps = batch.get("vcrd_steps")
        if steps is not None:
            steps = torch.where(steps >= 0, steps + 1000 * torch.arange(2)[:, None], -1)
        weight = jobs.expected_weights(settings, stats, mask, steps=steps)
        losses.append((weight * stats["divergence"]).detach())
        total = total + (weight * stats["divergence"] * mask).sum() / mask.sum() / len(data)
    total.backward()
    return SimpleNamespace(losses=losses, norm=student.decoder.final_layernorm.weight.grad)
