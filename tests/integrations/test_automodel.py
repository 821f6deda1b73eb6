"""The loss for NeMo Automodel against the reference, and against Automodel's own `KDLoss`."""

from __future__ import annotations

import re
from pathlib import Path

import automodel_jobs
import pytest
import torch
import yaml
from automodel_jobs import IGNORED, batch, loss_and_gradient
from calibrated import per_token
from sharded_jobs import spawn

from vcrd.integrations.automodel import CalibratedKDLoss

kd = pytest.importorskip("nemo_automodel.components.loss.kd_loss")


@pytest.mark.parametrize("number", [None, 50])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.5, "divergence": "jsd", "validity": "confidence"},
        {"divergence": "reverse_kl", "validity": "margin", "vocab_size": 250},
    ],
)
def test_value_and_gradient_are_those_of_the_reference(options, number):
    student, teacher, labels = batch()
    labels = torch.where(labels >= 250, 0, labels)
    mask = labels != IGNORED
    loss, gradient = loss_and_gradient(CalibratedKDLoss(**options), student, teacher, labels, number)
    exact = student.double().requires_grad_()
    expected = per_token(exact, teacher, labels, mask, **options).sum() / (number or mask.sum())
    expected = expected * options.get("temperature", 1.0) ** 2
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("number", [None, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_forward_kl_is_automodels_own_loss(dtype, temperature, number):
    student, teacher, labels = batch(dtype=dtype)
    calibrated = CalibratedKDLoss(temperature=temperature, validity="uniform")
    loss, gradient = loss_and_gradient(calibrated, student, teacher, labels, number)
    for chunk_size in (0, 7):
        own = kd.KDLoss(temperature=temperature, chunk_size=chunk_size)
        expected, expected_gradient = loss_and_gradient(own, student, teacher, labels, number)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6)


def test_flat_logits_and_another_ignored_label():
    student, teacher, labels = batch()
    labels = torch.where(labels == IGNORED, 7, labels)
    flat = student.flatten(0, 1), teacher.flatten(0, 1), labels
    ours = loss_and_gradient(CalibratedKDLoss(ignore_index=7, validity="uniform"), *flat)
    own = loss_and_gradient(kd.KDLoss(ignore_index=7), *flat)
    torch.testing.assert_close(ours[0], own[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1], own[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("number", [None, 0, 50])
def test_a_batch_in_which_no_token_counts_has_no_loss_and_no_gradient(number):
    student, teacher, labels = batch()
    student[:] = torch.nan
    loss, gradient = loss_and_gradient(
        CalibratedKDLoss(), student, teacher, torch.full_like(labels, IGNORED), number
    )
    assert loss == 0 and not gradient.any()


def test_four_micro_batches_are_one():
    student, teacher, labels = batch(rows=4)
    number = int((labels != IGNORED).sum())
    loss, gradient = loss_and_gradient(CalibratedKDLoss(), student, teacher, labels, number)
    parts = [
        loss_and_gradient(CalibratedKDLoss(), student[n, None], teacher[n, None], labels[n, None], number)
        for n in range(4)
    ]
    torch.testing.assert_close(sum(part for part, _ in parts), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("job", ["check_shards", "check_own", "check_refusals"])
def test_two_ranks(job, tmp_path):
    spawn(getattr(automodel_jobs, job), 2, tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce_weight": 0.1}, "ce_weight: expected 0, because the recipe's kd_ratio"),
        ({"validity": "scores"}, "validity: expected one without scores"),
        ({"validity": "privileged"}, "validity: expected one without scores"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"divergense": "jsd"}, "divergense: expected an argument of this function or a field of LossConfig"),
        ({"ignore_index": None}, "ignore_index: expected an integer, got NoneType"),
        ({"tp_group": 3}, "tp_group: expected a process group or None, got int"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        CalibratedKDLoss(**options)


def test_labels_of_another_size_are_refused():
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match="labels: expected one for each of 36 tokens, got 27"):
        CalibratedKDLoss()(student, teacher, labels[:3])


def test_what_is_no_tensor_is_refused():
    student, teacher, labels = batch()
    with pytest.raises(TypeError, match="labels: expected a tensor, got NoneType"):
        CalibratedKDLoss()(student, teacher, None)
    with pytest.raises(TypeError, match="student_logits: expected a tensor, got list"):
        CalibratedKDLoss()([student], teacher, labels)
    with pytest.raises(TypeError, match="num_batch_labels: expected an integer or None, got str"):
        CalibratedKDLoss()(student, teacher, labels, num_batch_labels="8")


def test_the_configuration_of_the_page_makes_this_loss():
    from nemo_automodel.components.loss.loss import build_loss_module

    loader = pytest.importorskip("nemo_automodel.components.config.loader")
    page = Path(__file__).parents[2] / "docs/integrations/automodel.md"
    (of_the_page,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    found = loader.ConfigNode(yaml.safe_load(of_the_page)).kd_loss_fn.instantiate()
    assert isinstance(found, CalibratedKDLoss) and found.config.divergence == "jsd"
    # What it does with a class of the name KDLoss is to make its own.
    assert isinstance(build_loss_module(CalibratedKDLoss, temperature=2.0), CalibratedKDLoss)
