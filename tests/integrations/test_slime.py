"""slime's custom loss with a linked teacher, against the float64 reference of each sample by itself.

slime is on no package index. Its batches here have the shape of its public source: see slime_jobs.
"""

from __future__ import annotations

from collections import deque

import jobs
import pytest
import slime_jobs
import torch
from ports import free_port
from worlds import World, run_worlds

from vcrd.integrations import slime
from vcrd.settings import DistillSettings, LinkSettings

CHOICES = {
    "label": {"validity": "label"},
    "confidence": {"validity": "confidence", "divergence": "jsd"},
    "scores": {"validity": "scores"},
}
# Tensor, pipeline and context ranks of the student, and what it is told.
LAYOUTS = {"one rank": (1, 1, 1, "scores"), "tensor": (2, 1, 1, "label"), "pipeline": (1, 2, 1, "confidence")}
LAYOUTS["context"] = (1, 1, 2, "scores")


@pytest.fixture(scope="module")
def truth():
    ((found,),) = run_worlds(World(slime_jobs.truth, arguments=(CHOICES,)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_each_sample_alone(layout, truth):
    tensor, pipeline, context, choice = LAYOUTS[layout]
    address, options = f"127.0.0.1:{free_port()}", CHOICES[choice]
    link = LinkSettings(address=address, payload="float32", name="slime")
    settings = DistillSettings(vocab_size=jobs.TRUE_VOCAB, sequence_length=jobs.SEQUENCE, link=link)
    chosen = {"address": address, "payload": "float32", "name": "slime", **options}
    environment = {f"VCRD_{name.upper()}": value for name, value in chosen.items()}
    size = tensor * pipeline * context
    student = World(
        slime_jobs.train, size, tensor, pipeline, arguments=(environment, tensor, pipeline, context)
    )
    ranks, served = run_worlds(student, World(jobs.teacher_job, arguments=(settings,)))
    assert [found is None for found in ranks] == [rank < size - tensor * context for rank in range(size)]
    ranks = [found for found in ranks if found is not None]
    rollouts = 2 if choice == "scores" else 3
    assert served == [{2: 5, 3: 6}[rollouts]]
    right = truth[choice]
    for number in range(rollouts):
        steps = [found[number] for found in ranks]
        # Tensor ranks hold the same loss; context ranks each a part of it.
        parts = steps[:: tensor if context == 1 else 1]
        assert sum(step.loss for step in parts) == pytest.approx(right.loss, rel=1e-5)
        assert sum(step.figures["weight"] for step in parts) == pytest.approx(right.weight, rel=1e-5)
        assert sum(step.figures["loss"] for step in parts) == pytest.approx(right.loss, rel=1e-5)
        for sample, expected in enumerate(right.gradients):
            if context == 1:
                got = torch.cat([step.gradients[sample] for step in steps], -1)
            else:
                got = sum(step.gradients[sample] for step in steps)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
            assert expected.any()


def asked(row: slime.Row) -> slime.Student:
    """A student that waits for nothing but the loss of this micro-batch."""
    student = slime.Student.__new__(slime.Student)
    student._asked = deque([row])
    return student


def test_another_micro_batch_than_the_one_that_was_asked_for_is_refused():
    data = slime_jobs.rollout()
    row = slime.Row.of(data["tokens"][:1], [5], 4, (0, 1), {})
    for samples in ([1], [0, 1]):
        batch = slime_jobs.micro_batch(data, samples, (0, 1), 4)
        with pytest.raises(
            ValueError, match=r"batch: expected what the teacher was asked for, samples of \[9\]"
        ):
            asked(row).loss(batch, torch.zeros(1, batch["tokens"].shape[1], 48), sum)


def test_a_rollout_with_images_is_refused(monkeypatch):
    monkeypatch.setattr(slime.parallel_state, "is_pipeline_last_stage", lambda **_: True)
    student = slime.Student.__new__(slime.Student)
    student._asked = deque()
    with pytest.raises(ValueError, match="multimodal_train_inputs: expected none"):
        student.ask({"multimodal_train_inputs": [None, {"pixel_values": torch.zeros(1)}]})


def test_scores_must_come_with_the_rollout():
    student = slime.Student.__new__(slime.Student)
    student._settings = DistillSettings(validity="scores")
    with pytest.raises(
        ValueError, match=r"rollout_data\['student_validity'\]: expected a validity for each sample"
    ):
        student._row({"tokens": []}, [0])


def test_without_init_nothing_works():
    with pytest.raises(
        ValueError, match="--custom-megatron-init-path: expected vcrd.integrations.slime.init"
    ):
        slime.ask_ahead(None, 0, {})


@pytest.mark.parametrize(
    "given, settings, sentence",
    [
        ({"recompute_loss_function": True}, {}, "--recompute-loss-function: expected off"),
        ({"allgather_cp": True, "context_parallel_size": 2}, {}, "--allgather-cp: expected off"),
        ({"use_critic": True}, {}, "--advantage-estimator: expected another than ppo"),
        ({"qkv_format": "bshd"}, {}, "--qkv-format: expected thd"),
        ({}, {"normalization": "mean"}, "VCRD_NORMALIZATION: expected none"),
        ({}, {"weighting": "gap"}, "VCRD_WEIGHTING: expected sigmoid"),
        ({}, {"invalid_rows": "stop"}, "VCRD_INVALID_ROWS: expected skip"),
        ({}, {"fused_head": "on"}, "VCRD_FUSED_HEAD: expected off"),
        ({}, {"telemetry_dir": "records"}, "VCRD_TELEMETRY_DIR: expected none"),
        ({}, {"validity": "labels"}, "validity: expected one of label, "),
        (
            {},
            {"validity": "privileged", "teacher_context_length": 8},
            "VCRD_VALIDITY: expected another one, because the teacher is asked once",
        ),
        ({}, {"address": "a=host:1,b=host:2"}, "VCRD_ADDRESS: expected that of one teacher"),
    ],
)
def test_what_the_loss_cannot_follow(given, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        slime._refuse(slime_jobs.arguments(**given), DistillSettings().replaced(**settings))
