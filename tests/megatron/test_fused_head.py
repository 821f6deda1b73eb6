"""The plug with the fused head: losses and gradients of the model equal those of the plug that stores the logits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import jobs
import pytest
import torch
from test_distillation import check_against_direct, settings
from worlds import World, run_worlds

import vcrd
from vcrd.megatron.fused_head import FusedHeadLoss
from vcrd.megatron.hooks import LossHook
from vcrd.settings import DistillSettings


def build(tied: bool, **changes) -> torch.nn.Module:
    """This rank's part of a small model, drawn alike whatever the number of ranks."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from examples.demo.model import configure

    shape = jobs.STUDENT
    model = GPTModel(
        replace(configure(shape, 1), **changes),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab_size,
        max_sequence_length=jobs.SEQUENCE,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        whole = list(parameter.shape)
        dimension = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        if dimension is not None:
            from megatron.core import parallel_state

            whole[dimension] *= parallel_state.get_tensor_model_parallel_world_size()
        drawn = torch.randn(whole, generator=generator) * (1.5 / whole[-1] ** 0.5)
        if dimension is not None:
            drawn = drawn.chunk(whole[dimension] // parameter.shape[dimension], dimension)[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        parameter.data.copy_(drawn)
    return model.train()


def step(model: torch.nn.Module, arguments: dict, fused: bool) -> tuple[torch.Tensor, dict]:
    """One micro-batch's loss [b, s] and all gradients, with random teacher logits."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    (batch,) = jobs.batches(1)
    generator = torch.Generator().manual_seed(9)
    width = jobs.STUDENT.vocab_size
    teacher = 3 * torch.randn(jobs.SEQUENCE, 2, width, generator=generator)
    teacher = teacher.chunk(group.size(), -1)[group.rank()]
    head = FusedHeadLoss(model, group if group.size() > 1 else None) if fused else None
    seen = []

    def loss(labels, mask, logits):
        seen.append(tuple(logits.shape))
        out = (head.loss if fused else vcrd.validity_calibrated_kl)(
            *(logits, teacher, labels.transpose(0, 1)),
            mask=mask.transpose(0, 1),
            vocab_size=jobs.TRUE_VOCAB,
            group=group if group.size() > 1 else None,
            **arguments,
        )
        return out.loss.transpose(0, 1).contiguous()

    hook = LossHook(model, loss)
    positions = torch.arange(jobs.SEQUENCE).expand_as(batch["tokens"])
    for parameter in model.parameters():
        parameter.grad = None
    with hook.active():
        for _ in range(2):  # the first gets logits of test states, the second those of a row of zeros
            for parameter in model.parameters():
                parameter.grad = None
            if fused:
                with head.captured():
                    output = model(batch["tokens"], positions, None, **_targets(batch))
            else:
                output = model(batch["tokens"], positions, None, **_targets(batch))
            ((output * batch["loss_mask"]).sum() / batch["loss_mask"].sum()).backward()
    hook.undo()
    assert not model.output_layer._forward_hooks and not model.output_layer._forward_pre_hooks
    if fused:
        assert 1 < seen[0][0] < jobs.SEQUENCE and seen[1][0] == 1, seen
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def _targets(batch: dict) -> dict:
    return {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}


def both_heads() -> float:
    """The largest error of losses and gradients, relative to the largest value of each."""
    worst = 0.0
    for tied in (True, False):
        for arguments in (
            {"ce_weight": 0.3},
            {"divergence": "jsd", "normalization": "mean", "validity": "margin"},
        ):
            model = build(tied)
            expected, expected_gradients = step(model, arguments, fused=False)
            found, gradients = step(model, arguments, fused=True)
            assert gradients.keys() == expected_gradients.keys()
            pairs = [(found, expected), *((gradients[name], g) for name, g in expected_gradients.items())]
            for actual, truth in pairs:
                worst = max(worst, float((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-3)))
    return worst


@pytest.mark.parametrize("tensor", [1, 2])
def test_losses_and_gradients_equal_those_of_stored_logits(tensor):
    ((*ranks,),) = run_worlds(World(both_heads, tensor, tensor=tensor))
    assert max(ranks) <= 1e-5, ranks


def into_main_grad() -> tuple[float, bool, bool]:
    """As Megatron's data parallelism has it: error, the flag of the output weight, and whether .grad stayed empty."""
    model = build(tied=False)
    _, truth = step(model, {}, fused=False)
    weight = model.output_layer.weight
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    weight.zero_out_wgrad = True
    model.output_layer.gradient_accumulation_fusion = True
    step(model, {}, fused=True)
    expected = truth["output_layer.weight"]
    error = (weight.main_grad - 1 - 2 * expected).abs().max() / expected.abs().max()  # of two backward passes
    return float(error), weight.grad_added_to_main_grad, not bool(weight.grad.any())


def test_gradients_are_accumulated_into_main_grad():
    (((error, announced, empty),),) = run_worlds(World(into_main_grad))
    assert error <= 1e-5 and announced and empty


class Finisher(torch.nn.Module):
    """A model that is nothing but an output layer, and what it does to logits afterwards."""

    def __init__(
        self, finish=lambda logits: logits, *, bias: bool = False, cut_with: str = "", **config
    ) -> None:
        super().__init__()
        layer = torch.nn.Linear(8, 20, bias=bias)
        if cut_with:
            setattr(layer.weight, cut_with, True)
        layer.forward = lambda states, weight=None, plain=layer.forward: (plain(states), None)
        self.output_layer, self.finish, self.config = layer, finish, SimpleNamespace(**config)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.finish(self.output_layer(states)[0])


def test_the_scale_and_the_soft_cap_of_a_model_are_honoured():
    model = Finisher(
        lambda logits: 2 * torch.tanh(0.25 * logits / 2),
        use_mup=True,
        mup_output_mult=0.25,
        logit_softcap=2.0,
    )
    states, teacher, labels = torch.randn(6, 2, 8) * 9, torch.randn(6, 2, 20), torch.randint(20, (6, 2))
    expected = vcrd.validity_calibrated_kl(model.logits(states), teacher, labels)
    expected.loss.sum().backward()
    truth, model.output_layer.weight.grad = model.output_layer.weight.grad, None
    own = model.output_layer.forward
    head = FusedHeadLoss(model, None)
    for _ in range(2):
        model.output_layer.weight.grad = None
        with head.captured():
            found = head.loss(model.logits(states), teacher, labels)
        found.loss.sum().backward()
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.output_layer.weight.grad, truth, rtol=1e-5, atol=1e-5)
    assert model.output_layer.forward is own


def test_a_model_whose_logits_are_made_otherwise_is_found_out():
    model = Finisher(lambda logits: logits + 1)
    head = FusedHeadLoss(model, None)
    with (
        head.captured(),
        pytest.raises(ValueError, match="fused_head: expected a model whose logits are scale"),
    ):
        head.loss(model.logits(torch.randn(3, 2, 8)), None, None)
    with (
        head.captured(),
        pytest.raises(ValueError, match="expected a model that calls its output_layer before"),
    ):
        head.loss(torch.zeros(1), None, None)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Finisher(mtp_num_layers=1), "without multi-token prediction, .* got mtp_num_layers 1"),
        (Finisher(bias=True), "an output layer without a bias"),
        (Finisher(defer_embedding_wgrad_compute=True), "defer_embedding_wgrad_compute False, got True"),
        (Finisher(cross_entropy_fusion_impl="linear"), "another cross_entropy_fusion_impl"),
        (Finisher(fp8_output_proj=True), "fp8_output_proj False, .*, got True"),
        (
            Finisher(cut_with="__fsdp_param__"),
            "Megatron's own data parallelism, got a weight sharded by FSDP",
        ),
        (Finisher(cut_with="device_mesh"), "Megatron's own data parallelism, got a weight sharded by FSDP"),
    ],
)
def test_what_clashes_is_one_sentence(model, sentence):
    with pytest.raises(ValueError, match=f"fused_head: expected .*{sentence}"):
        FusedHeadLoss(model, None)


def test_the_environment_asks_for_it():
    assert DistillSettings.from_environment({"VCRD_FUSED_HEAD": "on"}).fused_head == "on"
    assert DistillSettings.from_environment({}).fused_head == "off"
    with pytest.raises(ValueError, match="FUSED_HEAD .*: expected one of off, on, recompute, got True"):
        DistillSettings(fused_head=True)


def test_through_the_link_a_tensor_and_pipeline_parallel_student_equals_direct_computation():
    chosen = settings(fused_head="on", divergence="jeffreys", ce_weight=0.25)
    students, _, (truth,) = run_worlds(
        World(jobs.student_job, 4, tensor=2, pipeline=2, arguments=(chosen, 2)),
        World(jobs.teacher_job, 1, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 2)),
    )
    check_against_direct(students, truth, 2)


def _steps(loss_funcs: list, **changes) -> SimpleNamespace:
    """One training step of two micro-batches per loss_func, without an optimizer, as on a device that makes one wait.

    Of each step: what the fused head was told, and the gradients as they are handed to the optimizer.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill, fused_head

    settings_, per_token = changes.pop("settings", {}), changes.pop("per_token", False)
    model = build(
        tied=False, calculate_per_token_loss=per_token, finalize_model_grads_func=finalize_model_grads
    )
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    told, gradients, error = [], [], None
    plain = fused_head.fused_validity_calibrated_kl

    def loss(*given, **arguments):
        told.append(arguments["head"].upstream)
        return plain(*given, **arguments)

    position = 0

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        positions = torch.arange(jobs.SEQUENCE).expand_as(batch["tokens"])
        output = model(batch["tokens"], positions, None, **_targets(batch))
        return output, lambda losses: loss_funcs[position](losses, batch["loss_mask"])

    plug = distill(
        forward_step,
        DistillSettings(vocab_size=jobs.TRUE_VOCAB, ce_weight=0.2).replaced(credits=0, **settings_),
        teacher=jobs.model(replace(jobs.TEACHER, vocab_size=jobs.STUDENT.vocab_size), 2),
    )
    with (
        patch.object(fused_head, "fused_validity_calibrated_kl", loss),
        patch.object(FusedHeadLoss, "_looking_waits", lambda head, weight: True),
    ):
        for position in range(len(loss_funcs)):  # noqa: B007  read by forward_step
            wrapped.zero_grad_buffer()
            try:
                get_forward_backward_func()(
                    forward_step_func=plug,
                    data_iterator=iter(jobs.batches(2)),
                    model=[wrapped],
                    num_microbatches=2,
                    seq_length=jobs.SEQUENCE,
                    micro_batch_size=2,
                    forward_only=False,
                )
            except ValueError as found:
                error = str(found)
            gradients.append({name: p.main_grad.clone() for name, p in model.named_parameters()})
    plug.close()
    return SimpleNamespace(told=told, gradients=gradients, error=error)


def masked_sum(losses, mask):
    """As Megatron's scripts have it."""
    return (losses.float() * mask).sum(), mask.sum().int(), {}


def mean_of_samples(losses, mask):
    """Each sample counts the same, whatever its length: tokens of different samples have different factors."""
    return ((losses * mask).sum(1) / mask.sum(1)).sum(), torch.tensor(len(losses)), {}


OUTPUT = "output_layer.weight"


def many_steps() -> dict[str, SimpleNamespace]:
    recompute = {"fused_head": "recompute"}
    fused = {"settings": {"fused_head": "on"}}
    return {
        **{
            f"masked sum {per_token}": _steps([masked_sum] * 3, per_token=per_token, **fused)
            for per_token in (False, True)
        },
        "samples": _steps([mean_of_samples] * 2, **fused),
        "stored samples": _steps([mean_of_samples]),
        "changes": _steps([masked_sum, mean_of_samples], **fused),
        "changes, recomputed": _steps([masked_sum, mean_of_samples], settings=recompute),
    }


def test_from_the_second_step_on_no_backward_waits_where_loss_func_is_a_masked_sum():
    ((found,),) = run_worlds(World(many_steps))
    for per_token in (False, True):
        run = found[f"masked sum {per_token}"]
        assert run.told == ["look"] * 2 + ["even"] * 4 and run.error is None
        for later in run.gradients[1:]:
            assert all(torch.equal(later[name], first) for name, first in run.gradients[0].items())
    # Another loss_func is made again from the second step on, and its gradients are right in each.
    run, (stored,) = found["samples"], found["stored samples"].gradients
    assert run.told == ["look"] * 2 + ["uneven"] * 2 and run.error is None
    for gradients in run.gradients:
        for name, truth in stored.items():
            torch.testing.assert_close(
                gradients[name], truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max())
            )
    # One that changes its mind gets no gradient of the output layer that is a number, and a sentence.
    run = found["changes"]
    assert run.told == ["look"] * 2 + ["even"] * 2
    assert (
        run.error.startswith("fused_head: expected loss_func to give all tokens") and "recompute" in run.error
    )
    assert run.gradients[1][OUTPUT][: jobs.TRUE_VOCAB].isnan().all()
    run = found["changes, recomputed"]
    assert run.told == ["uneven"] * 4 and run.error is None
    torch.testing.assert_close(run.gradients[1][OUTPUT], stored[OUTPUT], rtol=1e-4, atol=1e-6)


def with_parameters_gathered_in_hooks(fused_head: str) -> list[torch.Tensor]:
    """Losses of three steps whose optimizer has a shard on each data rank, and gathers a layer's as it is called."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from vcrd.megatron import distill

    model = build(tied=False, finalize_model_grads_func=finalize_model_grads)
    # Small buckets, so that the output layer's is not gathered with that of a layer before it.
    options = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(**options, bucket_size=1), model
    )
    config = OptimizerConfig(
        optimizer="adam", lr=0.1, min_lr=0.1, use_distributed_optimizer=True, overlap_param_gather=True
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    losses: list[torch.Tensor] = []
    plug = distill(
        jobs.plain_forward_step(losses),
        DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(payload="float32", fused_head=fused_head),
        teacher=jobs.model(replace(jobs.TEACHER, vocab_size=jobs.STUDENT.vocab_size), 2),
    )
    for _ in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        jobs.one_step(plug, wrapped)
        optimizer.step()
    plug.close()
    return losses


def with_either_head() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return with_parameters_gathered_in_hooks("off"), with_parameters_gathered_in_hooks("on")


def test_parameters_that_a_hook_of_the_output_layer_gathers_are_up_to_date():
    (ranks,) = run_worlds(World(with_either_head, 2))
    for stored, fused in ranks:
        assert len(stored) == 6 and float((stored[-1] - stored[1]).abs().max()) > 0.1, "it did train"
        for mine, truth in zip(fused, stored, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)
