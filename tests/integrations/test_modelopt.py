"""The criteria for ModelOpt's distillation against the reference, and against ModelOpt's own."""

from __future__ import annotations

import re
from pathlib import Path

import modelopt_jobs
import pytest
import torch
from calibrated import per_token
from jobs import STUDENT
from modelopt_jobs import HIDDEN
from worlds import World, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd import LossConfig
from vcrd.integrations.modelopt import LogitsLoss

mtd = pytest.importorskip("modelopt.torch.distill")
LAYOUTS = [(1, 1), (2, 1), (1, 2)]  # ranks of tensor and pipeline parallelism


@pytest.fixture(scope="module")
def ranks():
    """By layout and run, what the two ranks returned. One world for all, because importing ModelOpt takes long."""
    ((first, second),) = run_worlds(World(modelopt_jobs.all_layouts, 2, arguments=(LAYOUTS,)))
    return {
        (layout, run): [first[layout][run], second[layout][run]]
        for layout in LAYOUTS
        for run in first[layout]
    }


def whole(found):
    """The gradients of the whole model, from those of its parts."""
    return to_hugging_face({one.place: one.gradients for one in found}, STUDENT, STUDENT.layers)


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(found[name].double(), gradient.double(), rtol=0, atol=close, msg=name)


@pytest.mark.parametrize(
    ("layout", "run"),
    [((1, 1), "without mask"), ((1, 1), "mean"), *((layout, "calibrated") for layout in LAYOUTS)],
)
def test_value_and_gradient_are_those_of_the_reference(ranks, layout, run):
    expected = ranks[(1, 1), "reference mean" if run == "mean" else "reference"][0]
    found = ranks[layout, run]
    for one in found:
        if one.place.stage == one.place.stages - 1:
            masks = [batch["loss_mask"] for batch in modelopt_jobs.jobs.batches(4)]
            for loss, exact, mask in zip(one.per_token, expected.per_token, masks, strict=True):
                torch.testing.assert_close(loss.double() * mask, exact, rtol=1e-4, atol=1e-6)
        else:
            assert one.per_token == []
    assert_same(whole(found), expected.gradients)


def test_four_micro_batches_are_one(ranks):
    assert_same(whole(ranks[(1, 1), "accumulated"]), whole(ranks[(1, 1), "calibrated"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uniform_forward_kl_is_modelopts_own_loss(ranks, layout):
    ours, own = ranks[layout, "uniform"], ranks[layout, "own"]
    assert_same(whole(ours), whole(own))
    for one, other in zip(ours[-1].sums, own[-1].sums, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_the_gradient_of_modelopts_own_top_k_is_twice_too_large_on_two_tensor_ranks(ranks):
    """With every token among the top k its loss is the plain KL, and its gradient should be, too."""
    for layout, times in (((1, 1), 1), ((2, 1), 2)):
        plain, top_k = ranks[layout, "own at 1"], ranks[layout, "own top k"]
        assert top_k[0].sums[0]["kd_loss"] == pytest.approx(plain[0].sums[0]["kd_loss"], rel=1e-5)
        assert_same(whole(top_k), {name: times * gradient for name, gradient in whole(plain).items()})


def test_losses_of_hidden_states_stay_as_they_are(ranks):
    found, own, plain = (ranks[(1, 1), run][0].sums for run in ("hidden", "own hidden", "calibrated"))
    for ours, theirs, alone in zip(found, own, plain, strict=True):
        assert HIDDEN and ours["intermediate_loss"] == theirs["intermediate_loss"] > 0
        assert ours["logits_loss"] == alone["logits_loss"] == alone["kd_loss"]
        assert ours["kd_loss"] == pytest.approx(2 * alone["kd_loss"])  # the balancer makes both terms equal


class Output(torch.nn.Module):
    """A language model of one layer, whose output has `logits`, as a Hugging Face model's has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(8, 33)

    def forward(self, states):
        return Logits(self.layer(states))


class Logits:
    def __init__(self, logits):
        self.logits = logits


def plain_model(criterion) -> torch.nn.Module:
    options = {"teacher_model": Output(2), "criterion": criterion}
    return mtd.convert(Output(1), mode=[("kd_loss", options)])


def test_the_code_of_the_page_for_a_plain_model_runs():
    page = Path(__file__).parents[2] / "docs/integrations/modelopt.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[-1]
    names = {
        "student": Output(1),
        "teacher": Output(2),
        "config": LossConfig(divergence="jsd"),
        "tokens": torch.randn(2, 4, 8),
        "labels": torch.zeros(2, 4, dtype=torch.long),
        "tokens_that_count": 8,
    }
    exec(code, names)
    names["loss"].backward()
    assert names["student"].layer.weight.grad.abs().max() > 0


def test_a_plain_model_has_the_value_and_the_gradient_of_the_reference():
    torch.manual_seed(3)
    states, labels = torch.randn(2, 5, 8), torch.randint(-1, 33, (2, 5))
    mask = labels >= 0
    model = plain_model(LogitsLoss(LossConfig(divergence="jsd", temperature=2.0)))
    model(states)
    loss = model.compute_kd_loss(labels=labels, loss_reduction_fn=lambda loss: loss.sum() / mask.sum())
    loss.backward()
    student, teacher = Output(1), Output(2)
    expected = per_token(
        student(states).logits, teacher(states).logits, labels, mask, divergence="jsd", temperature=2.0
    )
    expected = 4 * expected.sum() / mask.sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.layer.weight.grad, student.layer.weight.grad, rtol=1e-4, atol=1e-7)


def test_uniform_forward_kl_of_a_plain_model_is_modelopts_own_loss():
    class OwnLogits(mtd.LogitsDistillationLoss):
        def forward(self, student, teacher):
            return super().forward(student.logits, teacher.logits)

    torch.manual_seed(3)
    states, found = torch.randn(2, 5, 8), []
    for criterion in (
        LogitsLoss(LossConfig(validity="uniform", temperature=2.0)),
        OwnLogits(temperature=2.0, reduction="none"),
    ):
        model = plain_model(criterion)
        model(states)
        loss = model.compute_kd_loss()
        loss.sum().backward()
        found.append((loss.detach(), model.layer.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_labels_that_are_no_tensor_are_refused():
    logits = torch.randn(2, 3, 8)
    with pytest.raises(TypeError, match="labels: expected .*, got list"):
        LogitsLoss()(logits, logits, [[1, 2, 3], [4, 5, 6]])


def test_cross_entropy_of_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="ce_weight: expected 0"):
        LogitsLoss(LossConfig(ce_weight=0.1))
    with pytest.raises(TypeError, match="config: expected a LossConfig or None, got dict"):
        LogitsLoss({})
