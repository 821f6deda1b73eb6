"""Megatron's schedule that overlaps the communication of experts computes the loss after the forward step."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import jobs
import pytest
import torch
import torch.distributed as dist
from ports import free_port
from worlds import World, run_worlds

from vcrd.settings import DistillSettings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="plans of the forward take an output_processor from megatron-core 0.19 on, which needs Python 3.12",
)

MICRO_BATCHES = 3


def with_experts(overlap: bool) -> torch.nn.Module:
    """A student of four experts on two ranks. The schedule needs bfloat16."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from examples.demo.model import configure

    torch.manual_seed(3)
    config = replace(
        configure(jobs.STUDENT, 2),
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=2,
        overlap_moe_expert_parallel_comm=overlap,
        perform_initialization=True,
        init_method_std=0.3,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    spec = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm")
    model = GPTModel(
        config,
        spec,
        vocab_size=jobs.STUDENT.vocab_size,
        max_sequence_length=jobs.SEQUENCE,
        position_embedding_type="rope",
    )
    return model.bfloat16().train()


def one_step(settings: DistillSettings, overlap: bool) -> SimpleNamespace:
    """Losses, gradients and figures of a step, and an evaluation of the model's own loss before it."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    model, losses = with_experts(overlap), []

    def forward_step(data_iterator, model, return_schedule_plan=False):
        batch = next(data_iterator)
        positions = torch.arange(jobs.SEQUENCE).expand_as(batch["tokens"])
        call = model.build_schedule_plan if return_schedule_plan else model
        output = call(batch["tokens"], positions, None, labels=batch["labels"], loss_mask=batch["loss_mask"])

        def loss_func(output):
            losses.append(output.detach().clone())
            mask = batch["loss_mask"]
            return (output * mask).sum(), mask.sum().int(), {}

        return output, loss_func

    plug = distill(forward_step, settings)

    def run(forward_only: bool) -> None:
        model.train(not forward_only)
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iter(jobs.batches(MICRO_BATCHES, dist.get_rank())),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=jobs.SEQUENCE,
            micro_batch_size=2,
            forward_only=forward_only,
        )

    with torch.no_grad():
        run(forward_only=True)
    run(forward_only=False)
    figures = plug.report.take()
    plug.close()
    return SimpleNamespace(
        losses=losses,
        tokens=figures.tokens,
        gradients={name: p.grad for name, p in model.named_parameters()},
        left=[name for name in ("build_schedule_plan", "compute_language_model_loss") if name in vars(model)],
    )


def student(cases: list[tuple[DistillSettings, bool]]) -> list[SimpleNamespace]:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    return [one_step(*case) for case in cases]


def test_losses_and_gradients_are_those_of_the_plain_schedule():
    def settings(fused_head: str) -> DistillSettings:
        return DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(
            payload="float32",
            fused_head=fused_head,
            address=f"127.0.0.1:{free_port()}",
            timeout=100,
            connect_timeout=100,
        )

    cases = [(settings("off"), False), (settings("off"), True), (settings("on"), True)]
    teachers = [World(jobs.teacher_job, arguments=(chosen,)) for chosen, _ in cases]
    ranks, *_ = run_worlds(World(student, 2, arguments=(cases,)), *teachers)
    for plain, overlapped, fused in ranks:
        assert len(plain.losses) == 2 * MICRO_BATCHES and plain.tokens == overlapped.tokens > 0
        assert not torch.equal(plain.losses[0], plain.losses[MICRO_BATCHES]), "evaluation is cross-entropy"
        for mine, truth in zip(overlapped.losses, plain.losses, strict=True):
            assert torch.equal(mine, truth)
        for name, truth in plain.gradients.items():
            assert torch.equal(overlapped.gradients[name], truth), name
            torch.testing.assert_close(
                fused.gradients[name], truth, rtol=0.1, atol=0.02 * float(truth.abs().max())
            )
        for mine, truth in zip(fused.losses, plain.losses, strict=True):
            torch.testing.assert_close(mine, truth, rtol=0.02, atol=0.01)
        assert plain.left == overlapped.left == fused.left == []
