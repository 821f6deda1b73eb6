"""Steps, scores and a verifier's verdicts reach the loss on every rank, and what is wrong is said on every rank."""

from __future__ import annotations

import external_validity_jobs
import pytest
import torch
from ports import free_port
from worlds import World, run_worlds

from vcrd.loss import reference
from vcrd.megatron.external_validity import ExternalValidity
from vcrd.settings import DistillSettings


def test_weights_and_gradients_through_tensor_and_pipeline_parallelism_equal_the_reference():
    chosen = DistillSettings(vocab_size=external_validity_jobs.jobs.TRUE_VOCAB).replaced(
        address=f"127.0.0.1:{free_port()}", payload="float32", timeout=100, connect_timeout=100
    )
    students, _, (truth,) = run_worlds(
        World(external_validity_jobs.student_job, 4, tensor=2, pipeline=2, arguments=(chosen,)),
        World(external_validity_jobs.teacher_job, arguments=(chosen,)),
        World(external_validity_jobs.direct, arguments=(chosen,)),
    )
    last = [results for results in students if results is not None]
    assert len(last) == 2
    for mode, expected in truth.items():
        for rank in last:
            found = rank[mode]
            assert len(found.weights) == len(found.losses) == external_validity_jobs.MICRO_BATCHES
            for weight, loss, right, right_loss in zip(
                found.weights, found.losses, expected.weights, expected.losses, strict=True
            ):
                torch.testing.assert_close(weight.double(), right, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(loss.double(), right_loss, atol=5e-5, rtol=5e-5)
            scale = expected.norm.abs().max()
            torch.testing.assert_close(found.norm / scale, expected.norm / scale, atol=2e-4, rtol=0, msg=mode)
            assert all(keys == {"tokens", "labels", "loss_mask"} for keys in found.keys)
            assert found.agreement == pytest.approx(expected.agreement), mode
    weights = [torch.stack(results.weights) for mode, results in truth.items() if "best" not in mode]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(weights, weights[1:], strict=False))
    judged, other = (rank["judged"] for rank in last)
    assert len(judged.calls) == external_validity_jobs.MICRO_BATCHES and not other.calls, "one rank judges"
    assert judged.seconds == other.seconds > 0
    for call in judged.calls:
        assert torch.equal(call["action"] == -1, call["mask"] == 0)
    assert last[0]["scores"].seconds == 0


@pytest.mark.parametrize("edges", [[], [0, 8, 24]])
@pytest.mark.parametrize("judged", [False, True])
def test_context_parallel_ranks_together_equal_one_process(edges, judged):
    """The split by hand, for context parallelism itself needs Transformer Engine. Steps span the ranks."""
    (ranks,) = run_worlds(World(external_validity_jobs.context_parallel, 2, arguments=(2, edges, judged)))
    whole = ranks[0]["whole"]
    stats = reference.statistics(whole["student"], whole["teacher"], whole["tokens"], mask=whole["mask"])
    who = ("student", "teacher")
    if judged:
        both = [external_validity_jobs.verdict(whole["tokens"], stats[f"{w}_action"]).log() for w in who]
    else:
        both = [whole[f"vcrd_{w}_validity"].log() for w in who]
    sample = torch.arange(len(whole["tokens"]))[:, None]
    if edges:
        sample = torch.bucketize(torch.arange(24), torch.tensor(edges[1:]), right=True)[None]
    steps = torch.where(whole["vcrd_steps"] >= 0, whole["vcrd_steps"] + 100 * sample, -1)
    weight, _ = reference.weights(*both, steps=steps, mask=whole["mask"])
    for rank in ranks:
        columns = rank["columns"]
        assert len(columns) == 12
        torch.testing.assert_close(rank["weight"].double(), weight[:, columns], atol=1e-5, rtol=1e-5)
        expected = (weight * stats["divergence"])[:, columns]
        torch.testing.assert_close(rank["loss"].double(), expected, atol=1e-5, rtol=1e-5)


def test_wrong_fields_are_one_sentence_on_every_tensor_rank():
    ((first, second),) = run_worlds(World(external_validity_jobs.sentences_of_wrong_fields, 2, tensor=2))
    beginnings = [
        "vcrd_steps: expected in the micro-batch, a tensor [2, 4], got the ke",
        "vcrd_student_validity: expected the tokens' shape [2, 4], got [4]",
        "vcrd_teacher_validity: expected values in [0, 1], got ",
        "vcrd_teacher_validity: expected values in [0, 1], got nan to nan",
        "vcrd_steps: expected integers, got torch.float32",
        "vcrd_steps: expected values from -1 to 2^31 - 1, got -2 to 1",
        "tokens: expected [2, 4] in the micro-batch, for the labels that",
        "data_iterator: expected forward_step to draw one micro-batch from it per call on tensor rank 0",
        "data_iterator: expected forward_step to draw one micro-batch from it per call on tensor rank 0",
        "right",
    ]
    assert len(first) == len(beginnings)
    # The message holds what 24 numbers of 4 bytes hold: here that cuts long sentences short.
    for one, other, beginning in zip(first, second, beginnings, strict=True):
        assert one == other and one.startswith(beginning), one


def test_a_check_that_comes_late_is_neutral_first_and_then_said_on_every_tensor_rank():
    ((first, second),) = run_worlds(World(external_validity_jobs.a_check_that_comes_late, 2, tensor=2))
    assert first == second and len(first) == 5
    assert first[0] == first[1] and first[0].startswith("[")
    assert first[2] == first[4] == "[-8.0, 8.0, 8.0]", "no steps, all validities equal"
    assert first[3].startswith("vcrd_steps: expected in the micro-batch")


def test_a_verifier_that_fails_is_one_sentence_on_every_tensor_rank():
    ((first, second),) = run_worlds(World(external_validity_jobs.sentences_of_failing_verifiers, 2, tensor=2))
    assert first == second
    assert first[:4] == [
        "verifier: KeyError: 'no such problem'",
        "verifier: expected a return of (student, teacher), got NoneType",
        "verifier: expected the student's validity as a tensor [2, 4], go",
        "verifier: the teacher's validity: expected values in [0, 1], got",
    ]
    assert first[4] == "4 8.0 0.0"


def test_settings_that_clash_with_a_verifier_are_one_sentence():
    with pytest.raises(TypeError, match="verifier: expected a callable, got str"):
        ExternalValidity(DistillSettings(), "tokens", "arithmetic")
    with pytest.raises(ValueError, match="expected none with the settings' validity 'scores'"):
        ExternalValidity(DistillSettings(validity="scores"), "tokens", lambda *_: None)


def test_nothing_is_sent_where_there_is_nothing_to_send():
    external = ExternalValidity(DistillSettings(), "tokens", None)
    external.place(external_validity_jobs.layout())
    batch = {"tokens": torch.zeros(1, 1)}
    assert list(external.watched(iter([batch]))) == [batch]
    assert external.arguments(torch.zeros(1, 1), None) == {}
