"""The loss mode "vcrd" inside verl, against the float64 reference and against verl's own loss."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed")

from verl.trainer.distillation import losses
from verl_jobs import VOCAB, Case, configs, run, two_ranks
from worlds import World, run_worlds

import vcrd
from vcrd.integrations import verl
from vcrd.loss import reference


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """verl without the loss mode, again after each test."""
    monkeypatch.setattr(losses, "compute_topk_loss", losses.compute_topk_loss)
    for registry in (losses.DISTILLATION_LOSS_REGISTRY, losses.DISTILLATION_SETTINGS_REGISTRY):
        monkeypatch.delitem(registry, "vcrd", raising=False)
    yield
    for registry in (losses.DISTILLATION_LOSS_REGISTRY, losses.DISTILLATION_SETTINGS_REGISTRY):
        registry.pop("vcrd", None)


def weight_of(found: dict[str, Tensor], validity: str) -> Tensor:
    if validity == "uniform":
        return torch.ones_like(found["divergence"])
    student, teacher = {
        "label": (found["student_label_logprob"], found["teacher_label_log_validity"]),
        "confidence": (-found["student_entropy"], -found["teacher_entropy"]),
    }[validity]
    return 0.1 + 1.8 * torch.sigmoid(4 * (teacher - student)).detach()


def truth(case: Case, validity: str, divergence: str) -> tuple[Tensor, Tensor]:
    """The mean over the tokens that count, and its gradient, in float64; the tail from float64 log-probabilities."""
    student = case.student.double().requires_grad_()
    logprobs, ids = case.teacher.double().log_softmax(-1).topk(case.ids.shape[1])
    tail = (1 - logprobs.exp().sum(-1)).clamp(min=2.0**-60).log()
    found = reference.topk_statistics(
        student, logprobs, ids, tail, case.labels, name=divergence, mask=case.mask
    )
    loss = (weight_of(found, validity) * found["divergence"]).sum() / case.mask.sum()
    loss.backward()
    return loss.detach(), student.grad


def ours(case: Case, mode: str = "vcrd", **more) -> tuple[Tensor, Tensor, dict]:
    logits = case.student.clone().requires_grad_()
    loss, figures = run(*configs(mode=mode), case.data(**more), logits[None])
    loss.backward()
    return loss.detach(), logits.grad, figures


@pytest.mark.parametrize("validity, divergence", [("label", "forward_kl"), ("confidence", "jsd")])
def test_value_and_gradient_are_those_of_the_reference(validity, divergence):
    verl.register(vcrd.LossConfig(validity=validity, divergence=divergence))
    case = Case()
    loss, gradient, figures = ours(case)
    true_loss, true_gradient = truth(case, validity, divergence)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(gradient.abs().sum(-1) > 0, case.mask > 0)
    mass = (case.logprobs.exp().sum(-1) * case.mask).sum() / case.mask.sum()
    assert figures["distillation/teacher_mass"].aggregate() == pytest.approx(float(mass), rel=1e-5)


def test_at_the_teacher_verl_has_a_gradient_and_vcrd_has_none():
    verl.register(validity="uniform")
    case = Case(same=True)
    tokens = case.mask.sum()
    own = ours(case, mode="forward_kl_topk")[1] * tokens  # per token, not divided by their number
    with_tail = ours(case)[1] * tokens
    assert own.abs().max() > 0.05
    assert with_tail.abs().max() < 1e-6


def test_uniform_is_verls_own_loss_where_the_top_k_is_the_vocabulary():
    verl.register(validity="uniform")
    case = Case(top_k=VOCAB)
    own_loss, own_gradient, _ = ours(case, mode="forward_kl_topk")
    loss, gradient, figures = ours(case)
    torch.testing.assert_close(loss, own_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-4, atol=1e-6)
    assert figures["distillation/weight"].aggregate() == pytest.approx(1)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_four_micro_batches_are_one(aggregation):
    verl.register()
    case, settings = Case(), configs(aggregation=aggregation)
    whole, parts = (case.student.clone().requires_grad_() for _ in range(2))
    loss, figures = run(*settings, case.data(), whole[None])
    loss.backward()
    total, weights = 0.0, []
    for first in range(4):
        part, found = run(*settings, case.data(first, first + 1), parts[case.rows(first, first + 1)][None])
        part.backward()
        total += float(part.detach())
        weights.append(found["distillation/weight"].aggregate())
    assert total == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-8)
    assert sum(weights) == pytest.approx(figures["distillation/weight"].aggregate(), rel=1e-6)


def test_two_data_parallel_ranks_are_one():
    """verl takes the mean over these ranks, of their gradients and of their figures."""
    from verl.utils.metric import Metric

    verl.register()
    case = Case()
    logits, total, figures = case.student.clone().requires_grad_(), 0.0, []
    for rows in ((0, 1), (1, 4)):
        loss, found = run(*configs(), case.data(*rows, dp_size=2), logits[case.rows(*rows)][None])
        (loss / 2).backward()
        total += loss.detach() / 2
        figures.append(found)
    true_loss, true_gradient = truth(case, "label", "forward_kl")
    torch.testing.assert_close(total.double(), true_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), true_gradient, rtol=1e-4, atol=1e-6)
    whole = ours(case)[2]
    for name in ("weight", "relative_validity", "teacher_mass"):
        key = f"distillation/{name}"
        mean = Metric.aggregate_dp([each[key] for each in figures])
        assert mean == pytest.approx(whole[key].aggregate(), rel=1e-5)


def test_verls_fsdp_engine_calls_it_and_carries_its_results():
    """The method of the engine that has the logits and makes the model's output of them."""
    engine = pytest.importorskip("verl.workers.engine.fsdp.transformer_impl", reason="peft is not installed")
    verl.register(validity="confidence")
    case, settings = Case(), configs()
    data = case.data(distillation_use_topk=True)
    logits = case.student.clone().requires_grad_()
    output = engine.FSDPEngineWithLMHead.prepare_model_outputs(
        SimpleNamespace(_gather_and_unpad_packed=lambda values, pad: values),
        SimpleNamespace(logits=logits[None]),
        {
            "input_ids_rmpad_rolled": case.tokens.roll(-1),
            "temperature_rmpad": torch.ones(len(case.tokens)),
            "temperature_is_one": True,
            "pad_size": 0,
        },
        data,
        partial(losses.distillation_ppo_loss, *settings),
    )
    loss, _ = losses.distillation_ppo_loss(*settings, model_output=output, data=data)
    loss.backward()
    expected_loss, expected_gradient, _ = ours(case)
    assert torch.equal(loss.detach(), expected_loss)
    assert torch.equal(logits.grad, expected_gradient)


def test_two_ranks_are_one():
    """Tensor and context parallelism of verl's Megatron engine, sequence parallelism of its FSDP engine."""
    options = {"validity": "label", "vocab_size": VOCAB}
    (ranks,) = run_worlds(World(two_ranks, 2, tensor=2, arguments=(options,)), seconds=280)
    true_loss, true_gradient = truth(Case(), "label", "forward_kl")
    for split in ("tensor", "context", "ulysses"):
        losses, gradients = zip(*(found[split] for found in ranks), strict=True)
        for loss in losses:
            torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
        gradient = torch.cat(gradients, -1) if split == "tensor" else sum(gradients)
        torch.testing.assert_close(gradient[:, :VOCAB].double(), true_gradient, rtol=1e-4, atol=1e-6)
        assert not gradient[:, VOCAB:].any()


def test_logits_that_verl_overwrites_later_do_not_reach_the_gradient():
    verl.register()
    case = Case()
    logits = case.student.clone().requires_grad_()
    scaled = logits / 1
    loss, _ = run(*configs(), case.data(distillation_only=False), scaled[None])
    scaled.data.zero_()
    loss.backward()
    torch.testing.assert_close(logits.grad, ours(case)[1])


@pytest.mark.slow
def test_the_module_of_the_page_registers_while_verl_is_imported(tmp_path):
    """And the adapter alone does not import verl."""
    page = Path(__file__).parents[2] / "docs/integrations/verl.md"
    (module,) = re.findall(r"```python\n# my_vcrd.py\n(.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "my_vcrd.py").write_text(module)
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    code = (
        "import sys, vcrd.integrations.verl\n"
        "assert 'verl' not in sys.modules\n"
        "from verl.workers.config import DistillationLossConfig\n"
        "print(DistillationLossConfig(loss_mode='vcrd').loss_settings.use_topk)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "my_vcrd"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"temperature": 2.0}, "temperature: expected 1"),
        ({"validity": "scores"}, "validity: expected one that is read from the two models"),
        ({"validity": "privileged"}, "validity: expected one that is read from the two models"),
        ({"normalization": "mean"}, "normalization: expected 'none'"),
        ({"weighting": "gap"}, "weighting: expected 'sigmoid'"),
    ],
)
def test_settings_that_verls_batches_cannot_serve(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        verl.register(**options)


@pytest.mark.parametrize(
    "loss, batch, sentence",
    [
        ({"use_policy_gradient": True}, {}, "use_policy_gradient: expected False"),
        ({"log_prob_min_clamp": -10.0}, {}, "log_prob_min_clamp: expected None"),
        ({}, {"temperature": 0.7}, "temperature: expected 1: verl divides .* got 0.7"),
    ],
)
def test_settings_of_verl_that_it_cannot_follow(loss, batch, sentence):
    verl.register()
    case = Case()
    with pytest.raises(ValueError, match=sentence):
        run(*configs(**loss), case.data(**batch), case.student[None])


def test_logits_in_the_place_of_logprobs_are_refused():
    verl.register()
    case = Case()
    case.logprobs = case.logprobs + 3.0
    with pytest.raises(
        ValueError, match="teacher_logprobs: expected log-probabilities over the whole vocabulary"
    ):
        run(*configs(), case.data(), case.student[None])


def test_megatrons_padding_must_be_known():
    verl.register()
    with pytest.raises(ValueError, match="vocab_size: expected one in the LossConfig"):
        verl._true_columns(configs("megatron")[0])


def test_fused_kernels_are_refused():
    """They fill in verl's own loss, and never ask for another one."""
    verl.register()
    case = Case()
    zeros = torch.nested.nested_tensor_from_jagged(
        torch.zeros(len(case.tokens)), case.data()["input_ids"].offsets()
    )
    with pytest.raises(ValueError, match="use_fused_kernels: expected False"):
        losses.distillation_ppo_loss(
            *configs(), model_output={"distillation_losses": zeros}, data=case.data()
        )


def test_a_tail_below_the_resolution_is_not_zero():
    logprobs = torch.tensor([[0.0, -40.0]])
    tail = verl.log_tail(logprobs, torch.ones(1))
    torch.testing.assert_close(tail.exp(), torch.tensor([2.0**-23]))
