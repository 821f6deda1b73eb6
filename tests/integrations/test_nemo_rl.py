"""NeMo-RL's loss function, against the float64 reference and against the formula of NeMo-RL's own.

NeMo-RL is on no package index. The arguments here have the shape of its public source: see nemo_rl_jobs.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType

import nemo_rl_jobs
import pytest
import torch
from nemo_rl_jobs import OPTIONS, SEQUENCE, VOCAB, call, case, valid_tokens
from torch import Tensor
from worlds import World, run_worlds

from vcrd.integrations.nemo_rl import ValidityCalibratedLoss
from vcrd.loss import reference


def truth() -> tuple[float, Tensor]:
    """The loss of `OPTIONS` and its gradient in float64, position by position against the next token."""
    data = case()
    student = data.student.double().requires_grad_()
    mask = data.token_mask[:, 1:] * data.sample_mask[:, None]
    stats = reference.statistics(
        student[:, :-1],
        data.teacher[:, :-1],
        data.tokens[:, 1:],
        name="jsd",
        temperature=2.0,
        vocab_size=VOCAB,
        mask=mask,
    )
    weight, _ = reference.weights(*reference.log_validities(stats, "confidence"), mask=mask)
    losses = 4 * weight * stats["divergence"] + 0.25 * stats["cross_entropy"]
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    return float(loss.detach()), student.grad


def test_value_and_gradient_are_those_of_the_reference():
    data, (true_loss, true_gradient) = case(), truth()
    student = data.student.clone().requires_grad_()
    loss, figures = call(ValidityCalibratedLoss(**OPTIONS), data, student)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(true_loss, rel=1e-5)
    assert figures["loss"] == pytest.approx(true_loss, rel=1e-5)
    assert figures["num_valid_samples"] == 4
    torch.testing.assert_close(student.grad.double(), true_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", ["DTensor", "shards", "positions"])
def test_two_ranks_are_one(split):
    true_loss, true_gradient = truth()
    (found,) = run_worlds(World(nemo_rl_jobs.ranks, 2, arguments=(split,)))
    losses, gradients, figures = zip(*found, strict=True)
    if split == "positions":
        assert sum(losses) == pytest.approx(true_loss, rel=1e-5)
        assert sum(each["kl_loss"] for each in figures) > 0
        gradient = torch.cat(gradients, 1)
    else:
        assert losses == pytest.approx([true_loss] * 2, rel=1e-5)
        gradient = torch.cat(gradients, -1)[..., :VOCAB]
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


def test_four_micro_batches_are_one():
    data, loss_fn = case(), ValidityCalibratedLoss(**OPTIONS)
    whole, parts = (data.student.clone().requires_grad_() for _ in range(2))
    loss, figures = call(loss_fn, data, whole)
    loss.backward()
    total, weight = 0.0, 0.0
    for row in range(4):
        part, found = call(loss_fn, data, parts[row : row + 1], rows=slice(row, row + 1))
        part.backward()
        total, weight = total + float(part.detach()), weight + found["weight"]
    assert total == pytest.approx(float(loss.detach()), rel=1e-6)
    assert weight == pytest.approx(figures["weight"], rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)


def test_uniform_is_nemo_rls_own_divergence_over_the_whole_vocabulary():
    """Its `averaged_logits` mode: KL by torch, a masked mean over the valid tokens, times the squared temperature."""
    data, temperature = case(), 2.0
    own, ours = (data.student.clone().requires_grad_() for _ in range(2))
    log_q = (own / temperature).log_softmax(-1)
    log_p = (data.teacher[..., :VOCAB] / temperature).log_softmax(-1)
    per_position = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    mask = torch.zeros(4, SEQUENCE)
    mask[:, :-1] = data.token_mask[:, 1:] * data.sample_mask[:, None]
    expected = (per_position * mask).sum() / valid_tokens(data) * temperature**2
    expected.backward()
    loss, _ = call(
        ValidityCalibratedLoss(vocab_size=VOCAB, validity="uniform", temperature=temperature), data, ours
    )
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, own.grad, rtol=1e-4, atol=1e-6)


def test_it_names_its_kind_in_nemo_rls_own_enumerations(monkeypatch):
    names = ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss", "nemo_rl.algorithms.loss.interfaces")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interfaces = sys.modules[names[-1]]
    interfaces.LossType = enum.Enum("LossType", ["TOKEN_LEVEL", "SEQUENCE_LEVEL"])
    interfaces.LossInputType = enum.Enum("LossInputType", ["LOGIT", "DISTILLATION_CROSS_TOKENIZER"])
    loss_fn = ValidityCalibratedLoss(vocab_size=VOCAB)
    assert loss_fn.loss_type is interfaces.LossType.TOKEN_LEVEL
    assert loss_fn.input_type is interfaces.LossInputType.DISTILLATION_CROSS_TOKENIZER


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({}, r"vocab_size: expected len\(student_tokenizer\)"),
        (
            {"vocab_size": VOCAB, "validity": "scores"},
            "validity: expected one that is read from the two models",
        ),
        (
            {"vocab_size": VOCAB, "validity": "privileged"},
            "validity: expected one that is read from the two models",
        ),
        ({"vocab_size": VOCAB, "normalization": "mean"}, "normalization: expected 'none'"),
        ({"vocab_size": VOCAB, "weighting": "gap"}, "weighting: expected 'sigmoid'"),
    ],
)
def test_settings_that_the_batches_cannot_serve(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ValidityCalibratedLoss(**options)


def test_several_teachers_are_refused():
    data = case()
    loss_fn = ValidityCalibratedLoss(vocab_size=VOCAB)
    with pytest.raises(ValueError, match="teachers: expected one, got 2"):
        loss_fn({}, None, None, data.student, data.student, {0: data.teacher, 1: data.teacher}, {})
