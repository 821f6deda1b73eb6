"""What each of two ranks runs in test_modelopt.py: tiny Megatron models in ModelOpt's distillation."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import torch
import torch.distributed as dist
from calibrated import per_token
from jobs import SEQUENCE, STUDENT, TRUE_VOCAB
from torch import Tensor

from examples.demo.convert import Place, to_hugging_face
from vcrd import LossConfig
from vcrd.integrations.modelopt import MegatronLogitsLoss, attach

# ModelOpt compares shards of equal width. The hidden states are of different sizes.
TEACHER = replace(STUDENT, hidden=24, heads=6)
CALIBRATED = LossConfig(divergence="jsd", temperature=2.0, ce_weight=0.1, vocab_size=TRUE_VOCAB)
MEAN = replace(CALIBRATED, normalization="mean")
UNIFORM = LossConfig(validity="uniform", temperature=2.0)
HIDDEN = [("decoder.final_layernorm", "decoder.final_layernorm")]


def all_layouts(layouts: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
    """The runs of each (tensor, pipeline) layout of the two ranks, one layout after the other."""
    from megatron.core import parallel_state

    found = {}
    for tensor, pipeline in layouts:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor, pipeline)
        runs = {
            "calibrated": step(CALIBRATED),
            "uniform": step(UNIFORM),
            "own": step(None, logit_kl_temperature=2.0),
        }
        if pipeline == 1:
            runs["own at 1"] = step(None)
            runs["own top k"] = step(None, logit_kl_topk=STUDENT.vocab_size)
        if tensor * pipeline == 1:
            runs["without mask"] = step(CALIBRATED, with_mask=False)
            runs["accumulated"] = step(CALIBRATED, micro_batches=1)
            runs["hidden"] = step(CALIBRATED, intermediate_layer_pairs=HIDDEN)
            runs["own hidden"] = step(None, intermediate_layer_pairs=HIDDEN)
            runs["mean"] = step(MEAN)
            runs["reference"], runs["reference mean"] = reference(CALIBRATED), reference(MEAN)
            check_refusals()
        found[tensor, pipeline] = runs
    return found


def converted(**settings: Any) -> torch.nn.Module:
    """This rank's part of the student, converted as Megatron-Bridge and Megatron-LM do it."""
    import modelopt.torch.distill as mtd
    import modelopt.torch.distill.plugins.megatron as plugin

    ((_, student),) = jobs.chunks(STUDENT, 1, None)
    ((_, teacher),) = jobs.chunks(TEACHER, 2, None)
    torch.manual_seed(5)  # a projection of hidden states is random
    config = plugin.setup_distillation_config(
        plugin.DistillationConfig(**settings), student.config, teacher.config
    )
    names = ("criterion", "loss_balancer")
    options = {"teacher_model": teacher, **{name: getattr(config, name) for name in names}}
    model = mtd.convert(student, mode=[("kd_loss", options)])
    plugin.adjust_distillation_model_for_mcore(model, config)
    return model


def step(
    config: LossConfig | None, micro_batches: int = 4, with_mask: bool = True, **settings: Any
) -> SimpleNamespace:
    """One training step's losses per token, sums of losses, and gradients. config: None for ModelOpt's own loss."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from modelopt.torch.distill.plugins.megatron import get_tensor_shapes_adjust_fn_for_distillation

    model = converted(**settings)
    if config is not None:
        attach(model, config)
    model.config.finalize_model_grads_func = finalize
    model.config.calculate_per_token_loss = True  # the gradient is that of the mean over all tokens
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    per_token: list[Tensor] = []
    sums: list[dict[str, float]] = []

    def forward_step(data_iterator, wrapped):
        batch = next(data_iterator)
        positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
        mask, given = batch["loss_mask"], {"loss_mask": batch["loss_mask"]} if with_mask else {}
        output = wrapped(batch["tokens"], positions, None, labels=batch["labels"], **given)

        def loss_func(output):
            reduce = lambda loss: summed(loss, mask, per_token)  # noqa: E731
            losses = model.compute_kd_loss(student_loss=(output * mask).sum(), loss_reduction_fn=reduce)
            sums.append({key: float(value) for key, value in losses.items()})
            return losses["kd_loss"], mask.sum().int(), {}

        return output, loss_func

    parts = jobs.batches(4)
    if micro_batches == 1:
        parts = [{key: torch.cat([part[key] for part in parts]) for key in parts[0]}]
    sizes = {"seq_length": SEQUENCE, "micro_batch_size": 8 // micro_batches}
    wrapped.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(parts),
        model=[wrapped],
        num_microbatches=micro_batches,
        forward_only=False,
        adjust_tensor_shapes_fn=get_tensor_shapes_adjust_fn_for_distillation(
            [wrapped], **sizes, decoder_seq_length=SEQUENCE
        ),
        **sizes,
    )
    gradients = {
        name: p.main_grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("_")
    }
    return SimpleNamespace(place=place(), per_token=per_token, sums=sums, gradients=gradients)


def summed(loss: Any, mask: Tensor, per_token: list[Tensor]) -> Tensor:
    """The sum over the tokens that count, as Megatron's loops reduce each of ModelOpt's losses."""
    from megatron.core import parallel_state

    loss, tp_reduce, _ = loss
    assert loss.shape == mask.shape
    per_token.append(loss.detach().clone())
    total = (loss.float() * mask).sum()
    if tp_reduce:
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


def place() -> Place:
    from megatron.core import parallel_state as state

    return Place(
        state.get_tensor_model_parallel_rank(),
        state.get_tensor_model_parallel_world_size(),
        state.get_pipeline_model_parallel_rank(),
        state.get_pipeline_model_parallel_world_size(),
    )


def reference(config: LossConfig) -> SimpleNamespace:
    """The same step from both models' whole logits, by autograd and in float64 from the logits on."""
    student, teacher = jobs.model(STUDENT, 1), jobs.model(TEACHER, 2)
    losses, total, count = [], 0.0, 0.0
    for batch in jobs.batches(4):
        positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
        q, p = (model(batch["tokens"], positions, None) for model in (student, teacher))
        fields = ("divergence", "validity", "temperature", "ce_weight", "vocab_size", "normalization")
        options = {name: getattr(config, name) for name in fields}
        losses.append(per_token(q, p, batch["labels"], batch["loss_mask"], **options))
        total, count = total + losses[-1].sum(), count + batch["loss_mask"].sum()
    (total / count).backward()
    gradients = to_hugging_face(
        {Place(): {name: p.grad for name, p in student.named_parameters()}}, STUDENT, STUDENT.layers
    )
    return SimpleNamespace(per_token=[loss.detach() for loss in losses], gradients=gradients)


def check_refusals() -> None:
    def refused(message: str, model: Any, config: LossConfig | None = None, error: type = ValueError) -> None:
        with pytest.raises(error, match=re.escape(message)):
            attach(model, config)

    refused("skip_lm_loss: expected True", converted(skip_lm_loss=False))
    refused("criterion: expected LogitsKLLoss with temperature 1", converted(logit_kl_topk=8))
    refused("got LogitsKLLoss with temperature 2.0", converted(logit_kl_temperature=2.0))
    refused(
        "model: expected a Megatron language model that mtd.convert", jobs.model(STUDENT, 1), error=TypeError
    )
    model = converted()
    for validity in ("scores", "privileged"):
        refused("validity: expected one without scores", model, LossConfig(validity=validity))
    refused("model: expected one chunk", [model, model])
    model.config.use_mup = True
    refused("got use_mup", model)
    layer = ("output_layer", "output_layer")
    refused("config: expected None", converted(criterion={layer: MegatronLogitsLoss()}), LossConfig())
    refused("criterion: expected one of the logits", converted(criterion={}))

    model = attach(converted(criterion={layer: MegatronLogitsLoss(LossConfig(normalization="mean"))}))
    with pytest.raises(ValueError, match="model: expected one forward"):
        model.compute_kd_loss()
    batch = jobs.batches(1)[0]
    model(batch["tokens"], torch.arange(SEQUENCE).expand_as(batch["tokens"]), None, labels=batch["labels"])
    with pytest.raises(ValueError, match="loss_mask: expected one as the model's argument"):
        model.compute_kd_loss()
