"""Tiny student and teacher for the tests: what each process of a job does, and the truth computed in one process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from examples.demo.convert import Place, load, to_hugging_face, to_megatron
from examples.demo.model import Shape, build, configure

TRUE_VOCAB = 45  # divides nothing; student and teacher are padded differently
SEQUENCE = 12
STUDENT = Shape(
    layers=4,
    hidden=16,
    feed_forward=24,
    heads=4,
    groups=2,
    head_size=4,
    vocab_size=48,
    norm_epsilon=1e-5,
    rope_base=1e4,
)
TEACHER = replace(STUDENT, hidden=24, heads=6, vocab_size=52)


def weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Random weights of a whole model under Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * (1.5 / size[-1] ** 0.5)

    query, key, wide = shape.heads * shape.head_size, shape.groups * shape.head_size, shape.feed_forward
    state = {"model.embed_tokens.weight": 2 * draw(shape.vocab_size, shape.hidden)}
    state["model.norm.weight"] = 1 + 0.1 * draw(shape.hidden)
    for layer in range(shape.layers):
        state |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "self_attn.q_proj": draw(query, shape.hidden),
                "self_attn.k_proj": draw(key, shape.hidden),
                "self_attn.v_proj": draw(key, shape.hidden),
                "self_attn.o_proj": draw(shape.hidden, query),
                "mlp.gate_proj": draw(wide, shape.hidden),
                "mlp.up_proj": draw(wide, shape.hidden),
                "mlp.down_proj": draw(shape.hidden, wide),
                "input_layernorm": 1 + 0.1 * draw(shape.hidden),
                "post_attention_layernorm": 1 + 0.1 * draw(shape.hidden),
            }.items()
        }
    return state


def model(shape: Shape, seed: int) -> torch.nn.Module:
    """This rank's part of the model with those weights."""
    part = build(shape, configure(shape, shape.layers), SEQUENCE)
    load(part, weights(shape, seed).__getitem__, shape, range(shape.layers))
    return part


def chunks(shape: Shape, seed: int, per_rank: int | None) -> list[tuple[Place, torch.nn.Module]]:
    """This rank's parts of the model, interleaved over the pipeline `per_rank` times, and where each is in it."""
    from megatron.core import parallel_state

    tensor = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    rank, size = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if per_rank is None:
        return [(Place(*tensor, rank, size), model(shape, seed))]
    # Two stages send both ways between the same two ranks: Megatron needs its overlapped communication for that.
    config = replace(
        configure(shape, shape.layers),
        virtual_pipeline_model_parallel_size=per_rank,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    found = []
    for number in range(per_rank):
        place = Place(*tensor, number * size + rank, per_rank * size)
        first, last = place.stage == 0, place.stage == place.stages - 1
        part = build(shape, config, SEQUENCE, pre_process=first, post_process=last, vp_stage=number)
        part.load_state_dict(to_megatron(weights(shape, seed).__getitem__, shape, range(shape.layers), place))
        found.append((place, part))
    return found


def batches(count: int, data_rank: int = 0, size: int = 2) -> list[dict[str, Tensor]]:
    """Micro-batches in which some tokens are masked."""
    generator = torch.Generator().manual_seed(100 + data_rank)
    found = []
    for _ in range(count):
        tokens = torch.randint(TRUE_VOCAB, (size, SEQUENCE), generator=generator)
        labels = torch.randint(TRUE_VOCAB, (size, SEQUENCE), generator=generator)
        mask = (torch.rand(size, SEQUENCE, generator=generator) < 0.7).float()
        found.append({"tokens": tokens, "labels": labels, "loss_mask": mask})
    return found


def plain_forward_step(losses: list):
    """A script's own forward step; each micro-batch's losses [b, s] are appended to `losses`."""

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
        output = model(batch["tokens"], positions, None, labels=batch["labels"], loss_mask=batch["loss_mask"])

        def loss_func(output):
            losses.append(output.detach().clone())
            mask = batch["loss_mask"]
            return (output * mask).sum(), mask.sum().int(), {}

        return output, loss_func

    return forward_step


def student_job(settings, micro_batches: int, per_rank: int | None = None) -> SimpleNamespace:
    """Evaluates, takes one training step's gradients through the plug, evaluates again, measures."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads as finalize
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vcrd.megatron import distill

    parts = chunks(STUDENT, 1, per_rank)
    wrapped = []
    for _, part in parts:
        part.config.finalize_model_grads_func = finalize
        wrapped.append(DistributedDataParallel(part.config, DistributedDataParallelConfig(), part))
    losses: list[Tensor] = []
    plug = distill(plain_forward_step(losses), settings)
    data = batches(micro_batches, parallel_state.get_data_parallel_rank())
    plain, received = [], []

    def run(forward_only: bool) -> list[Tensor]:
        losses.clear()
        iterators = [iter(data) for _ in parts]
        get_forward_backward_func()(
            forward_step_func=plug,
            data_iterator=iterators if per_rank else iterators[0],
            model=wrapped,
            num_microbatches=micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=forward_only,
        )
        received.append(plug._teacher.bytes_received)
        return list(losses)

    def set_training(training: bool) -> None:
        for chunk in wrapped:
            chunk.train(training)

    def evaluate() -> list[Tensor]:
        set_training(False)
        with torch.no_grad():
            found = run(forward_only=True)
        set_training(True)
        return found

    plain.append(evaluate())
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    distilled = run(forward_only=False)
    gradients = {
        place: {name: p.main_grad.clone() for name, p in part.named_parameters()} for place, part in parts
    }
    plain.append(evaluate())
    figures = plug.report.take(parallel_state.get_data_parallel_group())
    observed: list = []
    set_training(False)
    with torch.no_grad(), plug.measure(observed.append) as report:
        run(forward_only=True)
    measured = report.take()
    plug.close()
    original = type(parts[-1][1]).compute_language_model_loss
    return SimpleNamespace(
        has_loss=parallel_state.is_pipeline_last_stage(),
        data_rank=parallel_state.get_data_parallel_rank(),
        distilled=distilled,
        plain=plain,
        received=received,
        gradients=gradients,
        figures=figures,
        measured=measured,
        observed=[(o.number, o.out.weight) for o in observed],
        own_loss_again=parts[-1][1].compute_language_model_loss.__func__ is original,
    )


def teacher_job(settings, microbatches: int | None = None) -> int:
    from vcrd.megatron import serve

    return serve(model(TEACHER, seed=2), settings, microbatches=microbatches)


def weight_map(settings) -> dict[str, float]:
    """sharpness, floor and ceiling, those that the settings leave to the weighting as it has them."""
    from vcrd.loss.config import LossConfig

    return LossConfig(**settings.loss_arguments()).weight_map._asdict()


def expected_weights(settings, stats: dict[str, Tensor], mask: Tensor, **more) -> Tensor:
    """The reference's, of an estimator that reads nothing but these statistics of all tokens of a micro-batch."""
    from vcrd.loss import reference

    weight, _ = reference.weights(
        *reference.log_validities(stats, settings.validity),
        **weight_map(settings),
        mask=mask,
        normalization=settings.normalization,
        divergence=stats["divergence"],
        gap=reference.gaps(stats) if settings.weighting == "gap" else None,
        **more,
    )
    return weight


def direct(settings, micro_batches: int, data_size: int = 1) -> SimpleNamespace:
    """The same step in one process, from both models' whole logits: reference losses, autograd, no plug, no link."""
    from torch.nn.functional import cross_entropy

    from vcrd.loss import reference

    student, teacher = model(STUDENT, seed=1), model(TEACHER, seed=2)
    losses, plain, weights_, total = [], [], [], 0.0
    for data_rank in range(data_size):
        for batch in batches(micro_batches, data_rank):
            positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
            p = teacher(batch["tokens"], positions, None)
            q = student(batch["tokens"], positions, None)
            options = {
                "name": settings.divergence,
                "temperature": settings.temperature,
                "alpha": settings.alpha,
                "beta": settings.beta,
            }
            labels, mask = batch["labels"], batch["loss_mask"]
            stats = reference.statistics(q, p, labels, vocab_size=TRUE_VOCAB, mask=mask, **options)
            weight = expected_weights(settings, stats, mask)
            loss = weight * stats["divergence"] + settings.ce_weight * stats["cross_entropy"]
            losses.append(loss.detach())
            weights_.append(weight)
            # Megatron's own cross-entropy counts the padding columns.
            plain.append(cross_entropy(q.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels))
            total = total + (loss * mask).sum() / mask.sum() / micro_batches / data_size
    total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return SimpleNamespace(
        distilled=losses,
        weights=weights_,
        plain=[loss.detach() for loss in plain],
        gradients=to_hugging_face({Place(): gradients}, STUDENT, STUDENT.layers),
    )


# How each warning of a teacher that is plainly wrong begins: vcrd.megatron.teacher_check.
OF_TEACHER = ("in the first step: ", "since the last report: ")


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """What vcrd warns of in this process while the block is open."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("vcrd").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("vcrd").removeHandler(handler)


def one_step(forward_step, model: torch.nn.Module) -> None:
    """Two micro-batches forward and backward, by Megatron's schedule without a pipeline."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches(2)),
        model=[model],
        num_microbatches=2,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
