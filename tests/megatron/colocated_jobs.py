"""What the processes of a student do that has its teacher in the same ranks, and the same student over the link."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jobs
import torch
from torch import Tensor

from examples.demo.model import Shape, build

# Padded as the student, so that tensor-parallel shards line up; other layers, heads and hidden size.
TEACHER = replace(jobs.TEACHER, layers=2, vocab_size=jobs.STUDENT.vocab_size)
INTERLEAVED_TEACHER = replace(TEACHER, layers=4)


def serve(settings, shape: Shape) -> int:
    from vcrd.megatron import serve

    return serve(jobs.model(shape, seed=2), settings)


def student(
    settings,
    micro_batches: int,
    teacher: Shape | None,
    per_rank: int | None = None,
    lazily: bool = False,
    **config: Any,
) -> SimpleNamespace:
    """Evaluates, takes one training step's gradients, evaluates again. teacher: None for one over the link."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    mine = jobs.chunks(jobs.STUDENT, 1, per_rank)
    wrapped = []
    for _, part in mine:
        for name, value in {**config, "variable_seq_lengths": teacher is not None}.items():
            setattr(part.config, name, value)
        part.config.finalize_model_grads_func = finalize
        wrapped.append(DistributedDataParallel(part.config, DistributedDataParallelConfig(), part))
    names = [sorted(part.state_dict()) for _, part in mine]
    theirs = [] if teacher is None else [part for _, part in jobs.chunks(teacher, 2, per_rank)]
    runs: list[bool] = []  # of the teacher: whether it was training or would have kept a graph
    for part in theirs:
        part.register_forward_hook(lambda m, *_: runs.append(m.training or torch.is_grad_enabled()))
    given: Any = theirs if per_rank else (theirs or [None])[0]
    losses: list[Tensor] = []
    plug = distill(
        jobs.plain_forward_step(losses),
        settings,
        teacher=(lambda: given) if lazily else (given if theirs else None),
    )
    data = jobs.batches(micro_batches)

    def run(forward_only: bool) -> list[Tensor]:
        losses.clear()
        iterators = [iter(data) for _ in mine]
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iterators if per_rank else iterators[0],
            model=wrapped,
            num_microbatches=micro_batches,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=forward_only,
        )
        return list(losses)

    def evaluate() -> list[Tensor]:
        for chunk in wrapped:
            chunk.eval()
        with torch.no_grad():
            found = run(forward_only=True)
        for chunk in wrapped:
            chunk.train()
        return found

    plain, ran = evaluate(), [len(runs)]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    distilled = run(forward_only=False)
    ran.append(len(runs))
    gradients = {
        place: {name: p.main_grad.clone() for name, p in part.named_parameters()} for place, part in mine
    }
    figures = plug.report.take()
    plain_again = evaluate()
    ran.append(len(runs))
    for chunk in wrapped:
        chunk.eval()
    with torch.no_grad(), plug.measure() as report:
        measured_losses = run(forward_only=True)
    plug.close()
    return SimpleNamespace(
        distilled=distilled,
        plain=[plain, plain_again],
        gradients=gradients,
        figures=figures,
        measured=report.take(),
        measured_losses=measured_losses,
        ran=ran,  # after the first evaluation, after training, after the second
        frozen=not any(runs) and all(p.grad is None for part in theirs for p in part.parameters()),
        names_unchanged=names == [sorted(part.state_dict()) for _, part in mine],
        hooks_left=sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for _, part in mine),
    )


def students(settings, micro_batches: int, variants: list[dict[str, Any]]) -> list[SimpleNamespace]:
    """One student after another, each variant as arguments of `student`, and for the settings."""
    found = []
    for variant in variants:
        variant = dict(variant)
        own = {name: variant.pop(name) for name in ("payload", "fused_head") if name in variant}
        chosen = settings.replaced(**own)
        found.append(student(chosen, micro_batches, **variant))
    return found


def save_and_load(folder: str) -> tuple[bool, bool]:
    """Whether a teacher is another's equal before and after it was loaded from the other's distributed checkpoint."""
    from megatron.core import dist_checkpointing

    saved, loaded = jobs.model(TEACHER, seed=2), jobs.model(TEACHER, seed=3)

    def equal() -> bool:
        ours, theirs = dict(saved.named_parameters()), dict(loaded.named_parameters())
        return all(torch.equal(p, theirs[name]) for name, p in ours.items())

    before = equal()
    # Megatron writes with processes of its own, which the children of daemons may not have.
    multiprocessing.current_process()._config["daemon"] = False
    dist_checkpointing.save({"model": saved.sharded_state_dict()}, folder)
    state = dist_checkpointing.load({"model": loaded.sharded_state_dict()}, folder)
    loaded.load_state_dict(state["model"])
    return before, equal()


def refusals(settings) -> list[str]:
    """Sentences for teachers that do not fit, each at the first training step of a student in one process."""
    from vcrd.megatron import distill

    student = jobs.model(jobs.STUDENT, seed=1).train()
    fitting = jobs.model(TEACHER, seed=2)
    plain = jobs.plain_forward_step([])
    other = jobs.model(jobs.TEACHER, seed=2)
    short = build(TEACHER, fitting.config, jobs.SEQUENCE - 1)
    sequence_parallel = jobs.model(TEACHER, seed=2)
    sequence_parallel.config.sequence_parallel = True
    delayed, multiplying_in_fp8 = jobs.model(TEACHER, seed=2), jobs.model(TEACHER, seed=2)
    delayed.config.fp8, delayed.config.fp8_recipe = "hybrid", "delayed"
    multiplying_in_fp8.config.fp8, multiplying_in_fp8.config.fp8_recipe = "hybrid", "mxfp8"
    tail = build(TEACHER, fitting.config, jobs.SEQUENCE, pre_process=False)

    def embedded(data_iterator: Any, model: torch.nn.Module) -> tuple:
        batch = next(data_iterator)
        states = torch.zeros(jobs.SEQUENCE, 2, jobs.STUDENT.hidden)
        return model(batch["tokens"], None, None, decoder_input=states, labels=batch["labels"]), None

    sentences = []

    def refuse(teacher: Any, settings=settings, step=plain) -> None:
        try:
            plug = distill(step, settings, teacher=teacher)
            plug(iter(jobs.batches(1)), student)
        except (ValueError, TypeError) as error:
            sentences.append(f"{type(error).__name__}: {error}")
        else:
            sentences.append("accepted")
        student.train()

    refuse(fitting, settings.replaced(payload="topk"))
    refuse("a checkpoint")
    refuse(student)
    refuse([fitting, fitting])
    refuse(lambda: "a path")
    refuse(torch.nn.Linear(2, 2))
    refuse(sequence_parallel)
    refuse(delayed)
    refuse(multiplying_in_fp8)
    refuse(tail)
    refuse(other, settings.replaced(vocab_size=None))
    refuse(short)
    refuse(fitting, step=embedded)
    refuse(fitting)
    return sentences


def refuse_padding(settings) -> str:
    """The sentence of a tensor-parallel student for a teacher that is padded otherwise."""
    from vcrd.megatron import distill

    student = jobs.model(jobs.STUDENT, seed=1).train()
    plug = distill(jobs.plain_forward_step([]), settings, teacher=jobs.model(jobs.TEACHER, seed=2))
    try:
        plug(iter(jobs.batches(1)), student)
    except ValueError as error:
        return str(error)
    return "accepted"


def refuse_fixed_shapes(settings) -> str:
    """The sentence of either stage of a pipeline whose tensors have fixed shapes, outside of any schedule."""
    from vcrd.megatron import distill

    student = jobs.model(jobs.STUDENT, seed=1).train()
    plug = distill(jobs.plain_forward_step([]), settings, teacher=jobs.model(TEACHER, seed=2))
    try:
        plug(iter(jobs.batches(1)), student)
    except ValueError as error:
        return str(error)
    return "accepted"
