"""Top k and hidden states through the plug: the teacher's own logits are what the student learns from."""

from __future__ import annotations

import jobs
import pytest
import torch
from patience import wait_shortly
from ports import free_port
from test_distillation import check_against_direct, settings
from test_teacher import connect
from worlds import World, run_worlds

from vcrd.link import LinkSettings, TeacherLost, host_rendezvous
from vcrd.megatron.packing import packed
from vcrd.settings import DistillSettings


@pytest.mark.parametrize("payload", [{"payload": "hidden"}, {"payload": "topk", "top_k": jobs.TRUE_VOCAB}])
def test_a_payload_that_holds_everything_trains_as_the_logits_do(payload):
    chosen = settings(**payload)
    students, (served, _), (truth,) = run_worlds(
        World(jobs.student_job, 2, tensor=2, arguments=(chosen, 2)),
        World(jobs.teacher_job, 2, tensor=2, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 2)),
    )
    if payload["payload"] == "hidden":  # the output layer came once, with the first micro-batches
        for rank in students:
            before, trained, after, measured = rank.received
            layer = measured - 2 * (measured - trained)
            assert layer > 0 and after == trained
            rank.received = [before, trained - layer, after - layer, measured - layer]
            rank.figures.__dict__["link_bytes"] -= layer
    check_against_direct(students, truth, 2)
    assert served == 2 * 2


def test_the_teachers_pipeline_sends_hidden_states_of_its_last_stage():
    chosen = settings(payload="hidden")
    students, _, (truth,) = run_worlds(
        World(jobs.student_job, arguments=(chosen, 3)),
        World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 3)),
    )
    for loss, expected in zip(students[0].distilled, truth.distilled, strict=True):
        torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-5)


def test_the_tail_is_one_outcome():
    """With few tokens the loss is that of k + 1 outcomes: never above the whole divergence."""
    chosen = settings(payload="topk", top_k=5, validity="uniform")
    (student,), _, (truth,) = run_worlds(
        World(jobs.student_job, arguments=(chosen, 2)),
        World(jobs.teacher_job, 2, tensor=2, arguments=(chosen,)),
        World(jobs.direct, arguments=(chosen, 2)),
    )
    for loss, whole in zip(student.distilled, truth.distilled, strict=True):
        assert (loss.double() <= whole + 1e-5).all()
        assert 0.2 * whole.sum() < loss.sum() < whole.sum()


def ask_packed(chosen: DistillSettings) -> list[torch.Tensor]:
    """Logits of sequences packed into one row, and of each by itself."""
    rendezvous = host_rendezvous(chosen.link)
    link = connect(chosen, jobs.TRUE_VOCAB)
    tokens = jobs.batches(1)[0]["tokens"][:1]
    edges = [0, 5, 6, jobs.SEQUENCE]
    numbers = [link.request(tokens, edges)]
    numbers += [link.request(tokens[:, a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    whole, *parts = [link.receive(number).logits for number in numbers]
    link.close()
    rendezvous.close()
    return [whole, torch.cat(parts)]


def test_packed_sequences_are_answered_as_if_each_were_alone():
    chosen = settings()
    ((answer,), _) = run_worlds(
        World(ask_packed, arguments=(chosen,)), World(jobs.teacher_job, 2, pipeline=2, arguments=(chosen,))
    )
    torch.testing.assert_close(answer[0], answer[1], atol=1e-5, rtol=1e-5)


def test_edges_of_a_megatron_batch_follow_each_other():
    tokens = torch.arange(12).view(2, 6)
    assert packed({"tokens": tokens}, tokens)[0] is tokens
    row, edges = packed({"cu_seqlens": torch.tensor([[0, 2, 6, 6], [0, 5, 6, 6]])}, tokens)
    assert row.tolist() == [list(range(12))]
    assert edges.tolist() == [0, 2, 6, 11, 12]
    _, edges = packed({"cu_seqlens": torch.tensor([[0, 3, 6], [0, 6, 6]]), "cu_seqlens_padded": None}, tokens)
    assert edges.tolist() == [0, 3, 6, 12]


def serve_another_output_layer(chosen: DistillSettings) -> str:
    from vcrd.megatron import serve

    teacher = jobs.model(jobs.TEACHER, seed=2)
    plain = teacher.output_layer.forward
    teacher.output_layer.forward = lambda *args, **kwargs: (plain(*args, **kwargs)[0] ** 2, None)
    with pytest.raises(ValueError) as error:
        serve(teacher, chosen)
    return str(error.value)


def ask_in_vain(chosen: DistillSettings) -> None:
    rendezvous = host_rendezvous(chosen.link)
    link = connect(chosen, jobs.TRUE_VOCAB)
    wait_shortly(link, 1.0)
    with pytest.raises(TeacherLost):
        link.receive(link.request(jobs.batches(1)[0]["tokens"]))
    link.close()
    rendezvous.close()


def test_an_output_layer_that_is_no_matrix_product_is_refused():
    chosen = settings(payload="hidden")
    _, (sentence,) = run_worlds(
        World(ask_in_vain, arguments=(chosen,)), World(serve_another_output_layer, arguments=(chosen,))
    )
    assert sentence.startswith(
        "payload 'hidden': expected a model whose logits are scale * states @ weight.T"
    ), sentence


def test_top_k_needs_temperature_one():
    link = LinkSettings(address=f"127.0.0.1:{free_port()}", payload="topk")
    with pytest.raises(ValueError, match="VCRD_TEMPERATURE .*: expected 1 with the payload topk"):
        DistillSettings(temperature=2.0, link=link)
