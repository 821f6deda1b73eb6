"""A model that trains on more of its logits than the loss: its gradient is right through the plug, or refused."""

from __future__ import annotations

from functools import partial, wraps
from types import SimpleNamespace
from unittest.mock import patch

import jobs
import pytest
import torch
from test_fused_head import build
from worlds import World, run_worlds

import vcrd
from vcrd.megatron import distillation
from vcrd.settings import DistillSettings

Z = 0.05


class Scaled(torch.autograd.Function):
    """Like Megatron's MoEAuxLossAutoScaler: passes the logits on, and in backward also gives the term a gradient."""

    @staticmethod
    def forward(ctx, logits, term):
        ctx.save_for_backward(term)
        return logits

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.full_like(ctx.saved_tensors[0], Z)


def z(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., : jobs.TRUE_VOCAB].float().logsumexp(-1).square()


def with_term(model: torch.nn.Module, how: str) -> torch.nn.Module:
    """The model, which adds a z-loss to its loss, or lets one ride on its logits, or only looks at them later."""
    whole = model.forward
    seen = []

    def after_the_layer(module, given, output):
        logits, bias = output
        if how == "rides on the logits":
            logits = Scaled.apply(logits, z(logits))
        elif how == "is saved by the last operation":
            logits = torch.tanh(logits)
        elif how == "is added to the loss":
            seen[:] = [z(logits).mean()]
        elif how == "is looked at later":
            model.kept = logits
            model.kept_as_it_was = logits.detach().clone()
        return logits, bias

    @wraps(whole)
    def forward(*given, **more):
        loss = whole(*given, **more)
        return loss + seen.pop() if seen else loss

    model.output_layer.register_forward_hook(after_the_layer)
    model.forward = forward
    return model


def gradients(how: str, loss, **settings) -> SimpleNamespace:
    """Of one step of two micro-batches through the plug; and how often logits became their own gradient."""

    model = with_term(build(tied=False), how)
    plug = vcrd.megatron.distill(
        jobs.plain_forward_step([]),
        DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(payload="float32", **settings),
        teacher=build(tied=True),
    )
    overwritten = []
    plain = vcrd.loss.ops.gradient_

    def counted(*given):
        overwritten.append(True)
        return plain(*given)

    error = None
    with (
        patch.object(distillation, "validity_calibrated_kl", loss),
        patch.object(vcrd.loss.ops, "gradient_", counted),
    ):
        try:
            jobs.one_step(plug, model)
        except RuntimeError as found:
            error = str(found)
    plug.close()
    return SimpleNamespace(
        gradients={name: p.grad for name, p in model.named_parameters()},
        overwritten=len(overwritten),
        error=error,
        unchanged=not hasattr(model, "kept") or torch.equal(model.kept, model.kept_as_it_was),
    )


TERMS = {
    "none": 2,
    "rides on the logits": 0,
    "is saved by the last operation": 0,
    "is added to the loss": None,  # where its backward runs first, nothing needs the logits any more
    "is looked at later": 0,
}


def with_each_term() -> dict[str, tuple[SimpleNamespace, SimpleNamespace]]:
    buffered = partial(vcrd.validity_calibrated_kl, inplace_gradient=False)
    return {how: (gradients(how, vcrd.validity_calibrated_kl), gradients(how, buffered)) for how in TERMS}


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_plug_writes_over_logits_that_nobody_else_needs(tensor):
    (ranks,) = run_worlds(World(with_each_term, tensor, tensor=tensor))
    for found in ranks:
        for how, (run, truth) in found.items():
            assert run.error is None and truth.error is None and truth.overwritten == 0
            assert run.unchanged, how
            assert TERMS[how] is None or run.overwritten == TERMS[how], (how, run.overwritten)
            for name, expected in truth.gradients.items():
                torch.testing.assert_close(
                    run.gradients[name], expected, rtol=1e-5, atol=1e-6, msg=f"{how} {name}"
                )


def with_a_fused_head() -> list[SimpleNamespace]:
    return [
        gradients(how, vcrd.validity_calibrated_kl, fused_head="on")
        for how in ("none", "rides on the logits", "is added to the loss")
    ]


def test_the_fused_head_which_has_no_logits_refuses_another_term_of_them():
    ((found,),) = run_worlds(World(with_a_fused_head))
    alone, *others = found
    assert alone.error is None
    for run in others:
        assert run.error.startswith(
            "fused_head: expected nothing but the loss to learn from the model's logits"
        )
