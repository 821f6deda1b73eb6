"""A student on Megatron's schedules whose data draws from the random state, stopped and resumed as from a checkpoint.

Nothing is learnt: the losses tell the samples and the dropout apart, to the last bit.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jobs
import numpy
import torch
import torch.distributed as dist

from vcrd.settings import DistillSettings

MICRO_BATCHES = 2
_GENERATORS = ("torch", "numpy", "random")


@dataclass(frozen=True)
class Case:
    """draws: generators that each micro-batch is drawn from. dropout: of the student. rejected: steps to run again.

    evaluate: after each step, with data that draws too. saves: whether the loader saves its own state, and resumes
    from it and not from the number of samples.
    """

    draws: tuple[str, ...] = _GENERATORS
    dropout: float = 0.0
    evaluate: bool = False
    rejected: tuple[int, ...] = ()
    saves: bool = False


class Data:
    """Micro-batch n is a function of n and of what is drawn."""

    def __init__(self, draws: tuple[str, ...], start: int = 0) -> None:
        self._draws = draws
        self._state = {"next": start}

    def __iter__(self) -> Data:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        number = self._state["next"]
        self._state["next"] += 1
        drawn = {
            "torch": lambda: int(torch.randint(jobs.TRUE_VOCAB, ())),
            "numpy": lambda: int(numpy.random.randint(jobs.TRUE_VOCAB)),
            "random": lambda: random.randrange(jobs.TRUE_VOCAB),
        }
        shift = number + sum((3**power) * drawn[name]() for power, name in enumerate(self._draws))
        row = torch.arange(2 * jobs.SEQUENCE).view(2, jobs.SEQUENCE) * (1 + shift) + shift
        return {
            "tokens": row % jobs.TRUE_VOCAB,
            "labels": (row + 1) % jobs.TRUE_VOCAB,
            "loss_mask": torch.ones(2, jobs.SEQUENCE),
        }


class SavableData(Data):
    """As Megatron's example wraps Energon's loader: `save_state` is all that --dataloader-save asks for."""

    def save_state(self) -> dict[str, int]:
        return self._state


@dataclass
class Outcome:
    losses: list[list[torch.Tensor]] = field(default_factory=list)  # by step
    repeated: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    evaluated: list[list[torch.Tensor]] = field(default_factory=list)
    checkpoints: list[SimpleNamespace] = field(default_factory=list)  # after each step
    pending: list[int] = field(default_factory=list)
    source_back: bool = False  # whether Megatron's iterator has its own source again after close()


def checkpoint(step: int, iterator: Any) -> SimpleNamespace:
    """What `megatron.training` saves, and nothing of the package's."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    source = getattr(iterator, "iterable", None)
    return SimpleNamespace(
        step=step,
        random=random.getstate(),
        numpy=numpy.random.get_state(),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state(),
        tracker=get_cuda_rng_tracker().get_states(),
        loader=copy.deepcopy(source.save_state()) if hasattr(source, "save_state") else None,
    )


def load(saved: SimpleNamespace) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(saved.random)
    numpy.random.set_state(saved.numpy)
    torch.set_rng_state(saved.torch)
    torch.cuda.set_rng_state(saved.cuda)
    get_cuda_rng_tracker().set_states(dict(saved.tracker))


def student(case: Case, per_rank: int | None) -> list[torch.nn.Module]:
    parts = [part for _, part in jobs.chunks(jobs.STUDENT, 1, per_rank)]
    for part in parts:
        part.config.finalize_model_grads_func = lambda *args, **kwargs: None
        for module in part.modules():
            if hasattr(module, "hidden_dropout"):
                module.hidden_dropout = case.dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = case.dropout
    return parts


class _Script:
    """A script's own functions: `losses` are those of the last pass."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def forward_step(self, data_iterator, model):
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        batch = [None if data_iterator is None else next(data_iterator)]
        if group.size() > 1:  # as Megatron's get_batch: one rank of a tensor group draws
            dist.broadcast_object_list(batch, dist.get_process_group_ranks(group)[0], group)
        return jobs.plain_forward_step(self.losses)(iter(batch), model)


def train(
    settings: DistillSettings,
    case: Case,
    steps: int,
    start: SimpleNamespace | None = None,
    per_rank: Any = None,
) -> Outcome:
    """Steps from a checkpoint, or from the beginning, to `steps`."""
    from megatron.core import parallel_state, rerun_state_machine
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from vcrd.megatron import distill

    parts, script, found = student(case, per_rank), _Script(), Outcome()
    first = 0 if start is None else start.step
    position = MICRO_BATCHES * first if start is None or start.loader is None else start.loader["next"]
    kind = SavableData if case.saves else Data
    sources = [kind(case.draws, position) for _ in parts]
    draws_data = parallel_state.get_tensor_model_parallel_rank() == 0
    iterators = [rerun_state_machine.RerunDataIterator(source) if draws_data else None for source in sources]
    given = iterators if per_rank else iterators[0]
    plug = distill(script.forward_step, settings)
    mode = rerun_state_machine.RerunMode.VALIDATE_RESULTS if case.rejected else "disabled"
    rerun_state_machine.initialize_rerun_state_machine(
        state_save_func=lambda: get_cuda_rng_tracker().get_states(),  # as megatron.training does
        state_restore_func=lambda states: get_cuda_rng_tracker().set_states(dict(states)),
        mode=rerun_state_machine.RerunMode(mode),
    )
    machine = rerun_state_machine.get_rerun_state_machine()

    def run(data: Any, forward_only: bool) -> list[torch.Tensor]:
        script.losses.clear()
        for part in parts:
            part.train(not forward_only)
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=data,
            model=parts if per_rank else parts[0],
            num_microbatches=MICRO_BATCHES,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=forward_only,
        )
        return list(script.losses)

    if start is None:
        random.seed(3)
        numpy.random.seed(4)
        model_parallel_cuda_manual_seed(5)
    else:
        load(start)
    for step in range(first, steps):
        while machine.should_run_forward_backward(given):
            losses = run(given, forward_only=False)
            if machine.state.name.startswith("RERUNNING"):
                found.repeated[step] = losses
            else:
                found.losses.append(losses)
            if case.rejected:
                machine.validate_result(
                    result=torch.tensor(1.0),
                    rejection_func=lambda _, step=step: step in case.rejected,
                    message="drill",
                    fatal=False,
                )
        assert not machine.should_checkpoint_and_exit()[1]
        if case.evaluate:
            held_out = [Data(case.draws, 1000 * step) if draws_data else None for _ in parts]
            found.evaluated.append(run(held_out if per_rank else held_out[0], forward_only=True))
        found.checkpoints.append(checkpoint(step + 1, iterators[-1]))
        ahead = plug._teacher._ahead
        found.pending.append(0 if ahead is None else ahead.pending)
    plug.close()
    found.source_back = all(
        iterator is None or iterator.iterable is source
        for iterator, source in zip(iterators, sources, strict=True)
    )
    rerun_state_machine.destroy_rerun_state_machine()
    return found


def plans(case: Case, ahead: int, steps: int) -> list[tuple[str, int, int | None]]:
    """Name of the link, what is asked ahead, and the step to resume from: without looking ahead, with, resumed."""
    return [("plain", 0, None), ("whole", ahead, None), *[(f"from {n}", ahead, n) for n in range(1, steps)]]


def stop_and_resume(
    settings: DistillSettings, cases: dict[str, Case], steps: int, ahead: int = 2, per_rank: int | None = None
) -> dict[str, dict[str, Outcome]]:
    """By case and name of `plans`, what each run did."""
    found: dict[str, dict[str, Outcome]] = {}
    for title, case in cases.items():
        mine = found[title] = {}
        for name, early, step in plans(case, ahead, steps):
            start = None if step is None else mine["whole"].checkpoints[step - 1]
            chosen = settings.replaced(name=f"{title} {name}", credits=early)
            mine[name] = train(chosen, case, steps, start, per_rank)
    return found


def serve(settings: DistillSettings, cases: dict[str, Case], steps: int, ahead: int = 2) -> None:
    for title, case in cases.items():
        for name, _, _ in plans(case, ahead, steps):
            jobs.teacher_job(settings.replaced(name=f"{title} {name}"))
