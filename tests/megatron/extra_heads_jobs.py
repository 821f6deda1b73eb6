"""Models with heads of multi-token prediction: a teacher that serves without them, a student that trains with them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jobs
import torch
from torch import Tensor

from examples.demo.model import Shape, configure

HEADS = 2
TEACHER = replace(
    jobs.TEACHER, vocab_size=jobs.STUDENT.vocab_size
)  # padded as the student, as in the same ranks


def model(shape: Shape, seed: int) -> torch.nn.Module:
    """This rank's part of `jobs.model`, with heads of random weights on its last stage."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    plain = dict(jobs.model(shape, seed).named_parameters())
    config = replace(configure(shape, shape.layers), mtp_num_layers=HEADS)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    last = parallel_state.is_pipeline_last_stage()
    part = GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=jobs.SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=last,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_base),
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if last else None,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            # The last stage keeps the embedding for its heads, and none of the output layer's own.
            same = plain.get(name, plain.get("output_layer.weight") if "word_embeddings" in name else None)
            random = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(random if same is None else same)
    return part


def count_runs(part: torch.nn.Module) -> list[str]:
    """Names of the heads' modules, each added when it runs."""
    ran: list[str] = []
    for name, module in part.named_modules():
        if name.startswith("mtp.layers"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def serve(settings, shape: Shape = jobs.TEACHER) -> SimpleNamespace:
    """Serves; then says what of the heads ran, and whether they are as before."""
    from vcrd.megatron import serve

    part = model(shape, seed=2)
    ran = count_runs(part)
    served = serve(part, settings)
    block = getattr(part, "mtp", None)
    return SimpleNamespace(
        served=served,
        ran=ran,
        as_before=part.config.mtp_num_layers == HEADS and (block is None or "forward" not in vars(block)),
        has_heads=block is not None,
    )


def beside(settings, shape: Shape, extra: bool) -> SimpleNamespace:
    """One step of a student with such a teacher in the same ranks. extra: whether it has heads."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    student = jobs.model(jobs.STUDENT, seed=1).train()
    student.config.variable_seq_lengths = True
    student.config.finalize_model_grads_func = finalize
    wrapped = DistributedDataParallel(student.config, DistributedDataParallelConfig(), student)
    teacher = model(shape, seed=2) if extra else jobs.model(shape, seed=2)
    ran, losses = count_runs(teacher), []
    plug = distill(jobs.plain_forward_step(losses), settings, teacher=teacher)
    get_forward_backward_func()(
        forward_step_func=plug,
        data_iterator=iter(jobs.batches(2)),
        model=wrapped,
        num_microbatches=2,
        seq_length=jobs.SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    plug.close()
    gradients = {name: p.main_grad.clone() for name, p in student.named_parameters()}
    return SimpleNamespace(losses=losses, gradients=gradients, ran=ran, has_heads=hasattr(teacher, "mtp"))


def student(settings) -> SimpleNamespace:
    """Two micro-batches of a student with heads. plain: the gradients of the heads in the script's own training."""
    from vcrd.megatron import distill

    def gradients(step: Any, losses: list[Tensor]) -> dict[str, Tensor]:
        part.zero_grad()
        losses.clear()
        iterator = iter(jobs.batches(2))
        for _ in range(2):
            output, loss_func = step(iterator, part)
            loss_func(output)[0].backward()
        return {name: p.grad.clone() for name, p in part.named_parameters()}

    part = model(jobs.STUDENT, seed=1).train()
    losses: list[Tensor] = []
    step = jobs.plain_forward_step(losses)
    plain = gradients(step, losses)
    plug = distill(step, settings)
    distilled = gradients(plug, losses)
    plug.close()
    return SimpleNamespace(distilled=losses, plain_gradients=plain, gradients=distilled)
