"""A teacher with rows that are no distribution, over the link: skipped and counted, or the step stops on every rank."""

from __future__ import annotations

from types import SimpleNamespace

import jobs
import pytest
import torch
from test_distillation import settings
from worlds import World, run_worlds

from vcrd.settings import DistillSettings

BAD = {3: torch.nan, 5: torch.inf, 8: -torch.inf}  # what is among the teacher's logits, by position
PAYLOADS = ["float32", "float16", "logits_8bit", "topk", "hidden"]


def serve_invalid_rows(chosen: DistillSettings) -> int:
    """In the logits of the last tensor rank alone, where they are what is sent; else in the states of every rank."""
    from megatron.core import parallel_state

    from vcrd.megatron import serve

    teacher = jobs.model(jobs.TEACHER, seed=2)
    group = parallel_state.get_tensor_model_parallel_group()

    def spoil(module, arguments, output):
        states = isinstance(output, torch.Tensor)
        tensor = (output if states else output[0]).clone()
        for position, value in BAD.items():
            if value == -torch.inf and not states:
                tensor[position] = value
            elif states or group.rank() == group.size() - 1:
                tensor[position, :, 1] = value
        return tensor if states else (tensor, *output[1:])

    hidden = chosen.link.payload == "hidden"
    (teacher.decoder.final_layernorm if hidden else teacher.output_layer).register_forward_hook(spoil)
    return serve(teacher, chosen)


def step(chosen: DistillSettings, micro_batches: int) -> SimpleNamespace:
    """One step; gradients, or the sentence with which it stopped before the optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    model = jobs.model(jobs.STUDENT, seed=1)
    model.config.finalize_model_grads_func = finalize
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    losses: list = []
    plug = distill(jobs.plain_forward_step(losses), chosen)
    error = None
    try:
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iter(jobs.batches(micro_batches)),
            model=wrapped,
            num_microbatches=micro_batches,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
    except RuntimeError as raised:
        error = str(raised)
    figures = plug.report.take()
    plug.close()
    own_again = model.config.finalize_model_grads_func is finalize
    return SimpleNamespace(
        losses=losses,
        figures=figures,
        gradients=[p.main_grad.clone() for p in model.parameters()],
        error=error,
        own_again=own_again,
        is_last=parallel_state.is_pipeline_last_stage(),
    )


def masks(micro_batches: int) -> list[torch.Tensor]:
    return [batch["loss_mask"] for batch in jobs.batches(micro_batches)]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_invalid_rows_of_the_teacher_are_skipped_and_counted(payload):
    chosen = settings(payload=payload, top_k=7, normalization="mean")
    students, _ = run_worlds(
        World(step, 2, tensor=2, arguments=(chosen, 1)),
        World(serve_invalid_rows, 2, tensor=2, arguments=(chosen,)),
    )
    for rank in students:
        assert rank.error is None and rank.own_again
        bad = 0
        for loss, mask in zip(rank.losses, masks(1), strict=True):
            assert loss.isfinite().all()
            assert (loss[:, list(BAD)] == 0).all()
            bad += int(mask[:, list(BAD)].sum())
        assert rank.figures.invalid_rows == bad > 0
        assert rank.figures.tokens == sum(int(mask.sum()) for mask in masks(1)) - bad
        assert rank.figures.loss > 0 and rank.figures.weight == pytest.approx(1, rel=1e-5)
        assert sum(rank.figures.weight_histogram) == rank.figures.tokens
        assert all(gradient.isfinite().all() for gradient in rank.gradients)
        assert any((gradient != 0).any() for gradient in rank.gradients)


def test_a_run_that_is_to_stop_does_so_on_every_rank_before_the_optimizer():
    chosen = settings(invalid_rows="stop")
    students, _ = run_worlds(
        World(step, 4, tensor=2, pipeline=2, arguments=(chosen, 2)),
        World(serve_invalid_rows, arguments=(chosen,)),
    )
    bad = sum(int(mask[:, list(BAD)].sum()) for mask in masks(2))
    for rank in students:
        assert rank.error.startswith(
            f"invalid_rows: expected a teacher of finite logits, got {bad} tokens in this step with a NaN"
        )
        assert "the first in micro-batch 0 on data rank 0" in rank.error and rank.own_again
    assert [len(rank.losses) for rank in students if rank.is_last] == [2, 2], "two tensor ranks, one count"


def test_the_setting_is_one_of_two():
    with pytest.raises(ValueError, match="INVALID_ROWS .*: expected one of skip, stop, got 'ignore'"):
        DistillSettings(invalid_rows="ignore")
