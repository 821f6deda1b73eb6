"""Students whose teacher is as it should be, or plainly wrong, and what their log says of it."""

from __future__ import annotations

from collections.abc import Callable

import jobs
import torch
from torch import Tensor

from vcrd.settings import DistillSettings

Change = Callable[[Tensor], Tensor]
PERMUTED = torch.arange(48).roll(7)
CHANGES: dict[str, Change] = {
    "as it is": lambda logits: logits,
    "permuted": lambda logits: logits[..., PERMUTED.argsort()[: logits.shape[-1]]],
    "zeroed": torch.zeros_like,
    # As where nobody says the true vocabulary: the padding's logits are 0, all others far below.
    "padding": lambda logits: torch.cat([logits[..., :45] - 40, 0 * logits[..., 45:]], -1),
    "NaN": lambda logits: logits * torch.nan,
    "some NaN": lambda logits: torch.where(torch.arange(len(logits))[:, None, None] < 5, torch.nan, logits),
}


def spoil(model: torch.nn.Module, change: Change) -> torch.nn.Module:
    if getattr(model, "post_process", True):
        model.output_layer.register_forward_hook(lambda _, __, output: (change(output[0]), *output[1:]))
    return model


def untrained(seed: int) -> torch.nn.Module:
    """As Megatron initialises it."""
    part = jobs.model(jobs.STUDENT, seed=1)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    return part


def labelled(data: list[dict[str, Tensor]], teacher: torch.nn.Module) -> list[dict[str, Tensor]]:
    """The data with the teacher's own best tokens for labels: what a teacher that knows its text predicts."""
    found = []
    for batch in data:
        positions = torch.arange(jobs.SEQUENCE).expand_as(batch["tokens"])
        with torch.no_grad():
            logits = teacher(batch["tokens"], positions, None)
        found.append({**batch, "labels": logits[..., : jobs.TRUE_VOCAB].argmax(-1)})
    return found


def steps(settings: DistillSettings, student: torch.nn.Module, data: list, **given) -> list[list[str]]:
    """What was said in the first step of two micro-batches, in the second, and with the report after it."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    student.config.finalize_model_grads_func = lambda *_, **__: None
    found = []
    with jobs.warnings() as lines:
        plug = distill(jobs.plain_forward_step([]), settings, **given)
        source = iter(data)
        for _ in range(2):
            get_forward_backward_func()(
                forward_step_func=plug,
                data_iterator=source,
                model=student.train(),
                num_microbatches=2,
                seq_length=jobs.SEQUENCE,
                micro_batch_size=2,
                forward_only=False,
            )
            found.append([line for line in lines if line.startswith(jobs.OF_TEACHER)])
            lines.clear()
        plug.report.take(parallel_state.get_data_parallel_group(with_context_parallel=True))
        found.append([line for line in lines if line.startswith(jobs.OF_TEACHER)])
        plug.close()
    return found


def local_students(settings: DistillSettings, cases: list[tuple[str, str, str, int | None]]) -> list:
    """Each case: the student, the teacher's change, the labels, the vocabulary; the teacher is in the same ranks."""
    found = []
    for who, change, labels, vocab_size in cases:
        if who == "untrained":
            student, teacher = untrained(5), untrained(4)
        else:
            student = jobs.model(jobs.STUDENT, seed={"the teacher": 2, "another": 1}[who])
            teacher = jobs.model(jobs.STUDENT, seed=2)
        data = jobs.batches(4)
        if labels == "the teacher's":
            data = labelled(data, teacher)
        chosen = settings.replaced(vocab_size=vocab_size)
        found.append(steps(chosen, student, data, teacher=spoil(teacher, CHANGES[change])))
    return found


def linked_student(settings: DistillSettings) -> list[list[str]]:
    """With the teacher's weights, on this data rank's data."""
    from megatron.core import parallel_state

    student = jobs.model(jobs.STUDENT, seed=2)
    return steps(settings, student, jobs.batches(4, parallel_state.get_data_parallel_rank()))


def serve(settings: DistillSettings, change: str, only: int | None = None) -> int:
    """only: the replica whose teacher is changed; None for every one."""
    from megatron.core import parallel_state

    from vcrd.megatron import serve

    teacher = jobs.model(jobs.STUDENT, seed=2)
    if only in (None, parallel_state.get_data_parallel_rank()):
        spoil(teacher, CHANGES[change])
    return serve(teacher, settings)
