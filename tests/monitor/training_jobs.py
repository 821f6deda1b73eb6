"""The processes of a short training with telemetry: Megatron's schedules, without megatron.training."""

from __future__ import annotations

import time

import jobs
import torch.distributed as dist


def student(settings, steps: int) -> list[int]:
    """Trains. Every rank records the metrics of each step. Returns the tokens of each step."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    model = jobs.model(jobs.STUDENT, seed=1)
    losses: list = []
    plug = distill(jobs.plain_forward_step(losses), settings)
    data = iter(jobs.batches(2 * steps))
    tokens = []
    for step in range(steps):
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=data,
            model=model,
            num_microbatches=2,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        figures = plug.report.take()
        tokens.append(figures.tokens)
        plug.record(step + 1, figures)
    plug.close()
    return tokens


def slow_teacher(settings, seconds: float) -> int:
    """A teacher whose model takes a given time for each micro-batch."""
    from vcrd.megatron import serve

    model = jobs.model(jobs.TEACHER, seed=2)
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    served = serve(model, settings)
    dist.barrier()
    return served
