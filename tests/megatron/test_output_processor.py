"""`output_processor` of Megatron-Core and a replaced method give the same bits. Core 0.16 has the second way only."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import extra_heads_jobs
import jobs
import pytest
import torch
from test_fused_head import build
from worlds import World, run_worlds

from vcrd.megatron import distill, hooks
from vcrd.settings import DistillSettings

CASES = {
    "logits": {"payload": "float32", "ce_weight": 0.3},
    "scaled logits": {"payload": "float32"},
    "fused head": {"payload": "float32", "fused_head": "on"},
    "hidden": {"payload": "hidden"},
    "hidden, fused head": {"payload": "hidden", "fused_head": "on", "divergence": "jsd"},
    "extra heads": {"payload": "hidden"},
}


def models(case: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    if case == "extra heads":
        teacher = replace(jobs.TEACHER, vocab_size=jobs.STUDENT.vocab_size)
        return extra_heads_jobs.model(jobs.STUDENT, 1).train(), extra_heads_jobs.model(teacher, 2)
    student = build(tied=False)
    if case == "scaled logits":  # read when the model runs; 0.16 has no such scale
        student.config.use_mup, student.config.mup_output_mult = True, 0.25
    return student, build(tied=True)


def one_step(case: str, processor: bool) -> SimpleNamespace:
    """Losses and gradients of a step of two micro-batches. processor: whether the models' argument is used."""
    student, teacher = models(case)
    losses: list[torch.Tensor] = []
    replaced: list[str] = []
    names = {"loss": (student, "compute_language_model_loss"), "student": (student.output_layer, "forward")}
    names["teacher"] = (teacher.output_layer, "forward")

    def look(module, args) -> None:
        replaced.extend(name for name, (owner, method) in names.items() if method in vars(owner))

    student.decoder.final_layernorm.register_forward_pre_hook(look)
    teacher.decoder.final_layernorm.register_forward_pre_hook(look)
    settings = DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(**CASES[case])
    with contextlib.ExitStack() as stack:
        if not processor:
            stack.enter_context(patch.object(hooks, "takes_output_processor", lambda chunk: False))
        plug = distill(jobs.plain_forward_step(losses), settings, teacher=teacher)
        jobs.one_step(plug, student)
        plug.close()
    return SimpleNamespace(
        takes=hooks.takes_output_processor(student),
        losses=losses,
        gradients={name: p.grad for name, p in student.named_parameters()},
        replaced=sorted(set(replaced)),
        left=[name for name, (owner, method) in names.items() if method in vars(owner)],
    )


def both_ways(case: str) -> tuple[SimpleNamespace, SimpleNamespace]:
    return one_step(case, processor=True), one_step(case, processor=False)


# The models with extra heads are for one tensor rank.
@pytest.mark.parametrize(
    ("case", "tensor"),
    [(case, size) for case in CASES for size in (1, 2) if (case, size) != ("extra heads", 2)],
)
def test_both_ways_give_the_same_bits(case, tensor):
    (ranks,) = run_worlds(World(both_ways, tensor, tensor=tensor, arguments=(case,)))
    for by_processor, by_replacing in ranks:
        assert by_processor.left == by_replacing.left == []
        assert by_replacing.replaced == ["loss"]  # and no output layer's forward
        assert by_processor.replaced == ([] if by_processor.takes else ["loss"])
        assert len(by_processor.losses) == 2 and len(by_processor.gradients) > 4
        for one, other in zip(by_processor.losses, by_replacing.losses, strict=True):
            assert torch.equal(one, other)
        for name, gradient in by_processor.gradients.items():
            assert torch.equal(gradient, by_replacing.gradients[name]), name


def with_a_processor_of_the_scripts_own() -> SimpleNamespace:
    """The script's processor computes the loss of Megatron's argument, and another micro-batch has no labels."""
    student = build(tied=False)
    if not hooks.takes_output_processor(student):
        return SimpleNamespace(takes=False)
    called: list[object] = []

    def process(*, hidden_states, output_layer, labels, compute_language_model_loss, context, **_):
        called.append(context)
        return compute_language_model_loss(labels, output_layer(hidden_states)[0])

    losses: list[torch.Tensor] = []
    for own in ({"output_processor": process, "output_processor_context": "own"}, {}):

        def forward_step(data_iterator, model, own=own):
            batch = next(data_iterator)
            positions = torch.arange(jobs.SEQUENCE).expand_as(batch["tokens"])
            targets = {name: batch[name] for name in ("labels", "loss_mask")}
            losses.append(model(batch["tokens"], positions, None, **targets, **own))
            return losses[-1], lambda output: (output.sum(), {})

        plug = distill(
            forward_step,
            DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(payload="float32"),
            teacher=build(tied=True),
        )
        plug(iter(jobs.batches(1)), student)
        plug.close()
    return SimpleNamespace(takes=True, losses=[loss.detach() for loss in losses], called=called)


def test_a_processor_of_the_scripts_own_is_given_the_loss():
    ((found,),) = run_worlds(World(with_a_processor_of_the_scripts_own))
    if not found.takes:
        pytest.skip("this Megatron-Core has no output_processor")
    assert found.called == ["own"]  # the student's, and not the teacher's
    assert torch.equal(*found.losses)
