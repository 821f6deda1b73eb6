"""The teacher's job: any request is answered with the model's own logits, and it ends when it should."""

from __future__ import annotations

import os
import re
from functools import partial

import jobs
import pytest
import torch
from patience import make_links_wait_shortly, wait_shortly
from ports import free_port
from worlds import World, run_worlds

from vcrd.link.errors import HandshakeRefused, LinkError, StudentLost, TeacherLost
from vcrd.link.rendezvous import host_rendezvous
from vcrd.settings import DistillSettings


def settings(**changes) -> DistillSettings:
    link = {
        "address": f"127.0.0.1:{free_port()}",
        "payload": "float32",
        "timeout": 60,
        "connect_timeout": 100,
    }
    return DistillSettings(vocab_size=jobs.TRUE_VOCAB).replaced(**{**link, **changes})


def connect(settings: DistillSettings, vocab_size: int):
    """A student of one rank, without Megatron."""
    from vcrd.link.student import StudentLink

    return StudentLink.connect(
        settings.link,
        vocab_size=vocab_size,
        padded_vocab_size=jobs.STUDENT.vocab_size,
        sequence_length=jobs.SEQUENCE,
        tensor_rank=0,
        tensor_size=1,
        data_rank=0,
        data_size=1,
    )


def requests() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 12), (2, 12), (2, 12), (1, 5), (3, 1), (1, 12), (1, 12)]
    return [torch.randint(jobs.TRUE_VOCAB, shape, generator=generator) for shape in shapes]


def ask(settings: DistillSettings) -> list[torch.Tensor]:
    rendezvous = host_rendezvous(settings.link)
    link = connect(settings, jobs.TRUE_VOCAB)
    numbers = [link.request(tokens) for tokens in requests()]
    answers = [link.receive(number).logits for number in numbers]
    link.close()
    rendezvous.close()
    return answers


def compute() -> list[torch.Tensor]:
    teacher = jobs.model(jobs.TEACHER, seed=2)
    with torch.no_grad():
        return [teacher(t, torch.arange(t.shape[1]).expand_as(t), None) for t in requests()]


def serve_and_restore(settings: DistillSettings) -> tuple[int, bool]:
    from vcrd.megatron import serve

    teacher = jobs.model(jobs.TEACHER, seed=2).train()
    return serve([teacher], settings), teacher.training


def test_every_request_is_answered_with_the_models_logits_and_goodbye_ends_it():
    chosen = settings(credits=5)
    (answers,), served, (expected,) = run_worlds(
        World(ask, arguments=(chosen,)),
        World(serve_and_restore, 4, tensor=2, pipeline=2, arguments=(chosen,)),
        World(compute),
    )
    assert served == [(len(requests()), True)] * 4
    for answer, logits in zip(answers, expected, strict=True):
        # [s, b, columns] without padding, each row up to a shift; logits are [b, s, padded].
        answer, logits = answer.transpose(0, 1), logits[..., : jobs.TRUE_VOCAB]
        torch.testing.assert_close(answer.log_softmax(-1), logits.log_softmax(-1), atol=2e-5, rtol=1e-4)


def vanish(settings: DistillSettings) -> None:
    host_rendezvous(settings.link)
    link = connect(settings, jobs.TRUE_VOCAB)
    link.receive(link.request(requests()[0]))
    link.request(requests()[0])
    os._exit(0)  # as a killed process does: no goodbye, no result


def serve_until_lost(settings: DistillSettings) -> str:
    from vcrd.megatron import serve

    make_links_wait_shortly(1.0)
    with pytest.raises(StudentLost) as lost:
        serve(jobs.model(jobs.TEACHER, seed=2), settings)
    return str(lost.value)


def test_a_student_that_vanishes_is_one_sentence_on_every_rank_of_the_teacher():
    chosen = settings()
    with pytest.raises(FileNotFoundError, match="0-0.result"):  # the one that vanished left none
        run_worlds(
            World(vanish, arguments=(chosen,)), World(serve_until_lost, 2, pipeline=2, arguments=(chosen,))
        )


def ask_one_after_the_other(folder: str) -> list[int]:
    """Two jobs that fit, and between them one that does not."""
    lengths = []
    for name, vocab in (("a", jobs.TRUE_VOCAB), ("b", jobs.TRUE_VOCAB - 1), ("c", jobs.TRUE_VOCAB)):
        chosen = settings(address=f"file:{folder}/{name}", interface="127.0.0.1")
        rendezvous = host_rendezvous(chosen.link)
        try:
            link = connect(chosen, vocab)
        except HandshakeRefused:
            rendezvous.close()
            continue
        lengths += [link.receive(link.request(tokens)).logits.shape[0] for tokens in requests()[:2]]
        link.close()
        rendezvous.close()
    return lengths


def stay(folder: str) -> int:
    from vcrd.megatron import serve, serving

    serving._AFTER_REFUSAL = 0.1
    chosen = settings(address=f"file:{folder}/*", connect_timeout=8)
    return serve(jobs.model(jobs.TEACHER, seed=2), chosen, stay=True)


def test_a_teacher_that_stays_serves_one_job_after_another_until_none_comes(tmp_path):
    (lengths,), served = run_worlds(
        World(ask_one_after_the_other, arguments=(str(tmp_path),)),
        World(stay, 2, pipeline=2, arguments=(str(tmp_path),)),
    )
    assert lengths == [12] * 4 and served == [4, 4]
    assert list(tmp_path.iterdir()) == []


def join_with_another_vocabulary(settings: DistillSettings) -> str:
    with pytest.raises(HandshakeRefused) as refused:
        host_rendezvous(settings.link)
        connect(settings, jobs.TRUE_VOCAB - 1)
    return str(refused.value)


def be_refused(settings: DistillSettings) -> str:
    from vcrd.megatron import serve

    with pytest.raises(HandshakeRefused) as refused:
        serve(jobs.model(jobs.TEACHER, seed=2), settings)
    return str(refused.value)


def test_another_vocabulary_is_refused_with_the_same_sentence_on_both_sides():
    chosen = settings()
    (student,), teachers = run_worlds(
        World(join_with_another_vocabulary, arguments=(chosen,)),
        World(be_refused, 2, pipeline=2, arguments=(chosen,)),
    )
    assert "vocab_size is 44 for the student and 45 for the teacher" in student
    assert teachers == [student] * 2


def ask_and_be_left(settings: DistillSettings) -> None:
    rendezvous = host_rendezvous(settings.link)
    link = connect(settings, jobs.TRUE_VOCAB)
    wait_shortly(link, 1.0)
    with pytest.raises(TeacherLost):
        link.receive(link.request(requests()[0]))
    link.close()
    rendezvous.close()


def serve_in_fp8(settings: DistillSettings) -> str:
    from vcrd.megatron import serve

    # Without Transformer Engine Megatron's layers multiply as ever, whatever this says.
    teacher = jobs.model(jobs.TEACHER, seed=2)
    teacher.config.fp8, teacher.config.fp8_recipe = "hybrid", "mxfp8"
    with pytest.raises(ValueError) as error:
        serve(teacher, settings)
    return str(error.value)


def test_tokens_that_fp8_does_not_take_are_one_sentence_on_every_rank_of_the_teacher():
    chosen = settings()
    _, sentences = run_worlds(
        World(ask_and_be_left, arguments=(chosen,)), World(serve_in_fp8, 2, pipeline=2, arguments=(chosen,))
    )
    expected = "tokens: expected micro-batches of a multiple of 32 tokens, .* FP8 .*, got \\[2, 12\\]"
    assert all(re.match(expected, sentence) for sentence in sentences), sentences


def refuse_what_cannot_be_served(settings: DistillSettings) -> list[str]:
    from vcrd.megatron import serve

    teacher = jobs.model(jobs.TEACHER, seed=2)
    wrong = [
        lambda: serve([teacher, teacher], settings),
        lambda: serve(teacher, settings, microbatches=0),
        lambda: serve(teacher, settings.replaced(vocab_size=53)),
        lambda: serve(torch.nn.Linear(2, 2), settings),
        lambda: serve(teacher, settings.replaced(connect_timeout=0.2)),
    ]
    sentences = []
    for call in wrong:
        with pytest.raises((ValueError, LinkError)) as error:
            call()
        sentences.append(str(error.value))
    return sentences


def test_what_cannot_be_served_is_one_sentence():
    ((sentences,),) = run_worlds(World(refuse_what_cannot_be_served, arguments=(settings(),)))
    assert sentences[0].startswith("model: expected one chunk")
    assert sentences[1] == "microbatches: expected at least 1, got 0"
    assert sentences[2] == "vocab_size: expected at most the model's 52 columns, got 53"
    assert sentences[3] == "model: expected a language model with a vocab_size, got Linear"
    assert "within 0.2 seconds (connect_timeout)" in sentences[4]


def refused_parallelism(folder: str, **sizes: int) -> list[str]:
    """What `serve` and a fill say of a teacher whose replicas do not answer alone; "" if they go on."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from vcrd.megatron import fill_cache, serve

    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(1)
    teacher, said = jobs.model(jobs.TEACHER, seed=2), []
    teacher.config.expert_model_parallel_size = sizes.get("expert_model_parallel_size", 1)
    chosen = settings(connect_timeout=0.1, sequence_length=jobs.SEQUENCE)
    for answer in (lambda: serve(teacher, chosen), lambda: fill_cache(teacher, [], folder, chosen)):
        try:
            answer()
            said.append("")
        except ValueError as error:
            said.append(str(error))
        except LinkError:  # no student came
            said.append("")
    return said


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"expert_model_parallel_size": 2},
            "expert_model_parallel_size: expected one within the tensor and pipeline ranks of a teacher, each replica "
            "of which answers alone, got 2",
        ),
        (
            {"context_parallel_size": 2},
            "context_parallel_size: expected 1 for a teacher, each replica of which answers whole sequences, got 2",
        ),
        (
            {
                "tensor_model_parallel_size": 2,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
            "",
        ),
    ],
    ids=["experts of all replicas", "context", "experts of tensor ranks"],
)
def test_replicas_that_do_not_answer_alone_are_refused_on_every_rank(sizes, sentence, tmp_path):
    world = World(partial(refused_parallelism, **sizes), 2, tensor=0, arguments=(str(tmp_path / "cache"),))
    assert run_worlds(world) == [[[sentence, sentence]] * 2]
