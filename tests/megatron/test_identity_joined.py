"""The plug and the teacher's job state their tokenizers and weights to each other."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jobs
import torch
from patience import make_links_wait_shortly
from test_distillation import settings
from worlds import World, run_worlds
from wrong_teachers import steps

from vcrd.link.errors import HandshakeRefused, LinkError
from vcrd.settings import DistillSettings

WORDS = {f"token {number}": number for number in range(jobs.TRUE_VOCAB)}
PERMUTED = {token: (number + 7) % jobs.TRUE_VOCAB for token, number in WORDS.items()}
UNKNOWN = "tokenizer: not known in the {} job, so it is not compared: pass one to {}()"


def tokenizer_with(vocabulary: dict[str, int] | None) -> Any:
    return None if vocabulary is None else SimpleNamespace(get_vocab=lambda: vocabulary)


def refused(work: Callable[[], Any]) -> SimpleNamespace:
    """The sentence with which this job was refused, "" for none, and the warnings that it logged."""
    with jobs.warnings() as lines:
        try:
            work()
        except HandshakeRefused as error:
            return SimpleNamespace(sentence=str(error), lines=list(lines))
    return SimpleNamespace(sentence="", lines=list(lines))


def join(settings: DistillSettings, vocabulary: dict[str, int] | None) -> SimpleNamespace:
    student, tokenizer = jobs.model(jobs.STUDENT, seed=2), tokenizer_with(vocabulary)
    # Every token counts: different numbers of them would be said as well.
    data = [{**batch, "loss_mask": torch.ones_like(batch["loss_mask"])} for batch in jobs.batches(4)]
    return refused(lambda: steps(settings, student, data, tokenizer=tokenizer))


def teach(
    settings: DistillSettings, vocabulary: dict[str, int] | None, seeds: tuple[int, ...] = (2,)
) -> SimpleNamespace:
    """seeds: of each replica's weights."""
    from megatron.core import parallel_state

    from vcrd.megatron import serve

    teacher = jobs.model(jobs.STUDENT, seed=seeds[parallel_state.get_data_parallel_rank()])
    return refused(
        lambda: serve(teacher, settings, tokenizer=tokenizer_with(vocabulary), checkpoint="/run/a")
    )


def end_of(work: Callable[[], Any]) -> str:
    """The error with which this rank ended; the others of its job, too, once one of them was refused."""
    try:
        work()
    except (LinkError, RuntimeError) as error:
        return str(error)
    return ""


def join_or_fail(settings: DistillSettings) -> str:
    make_links_wait_shortly(1.0)
    student, own = jobs.model(jobs.STUDENT, seed=2), torch.distributed.get_rank()
    return end_of(lambda: steps(settings, student, jobs.batches(4, own)))


def teach_or_fail(settings: DistillSettings, seeds: tuple[int, ...]) -> str:
    from vcrd.megatron import serve

    make_links_wait_shortly(1.0)
    teacher = jobs.model(jobs.STUDENT, seed=seeds[torch.distributed.get_rank()])
    return end_of(lambda: serve(teacher, settings, checkpoint="/run/a"))


def test_vocabularies_are_compared_and_another_one_is_refused_on_every_rank():
    chosen = settings()
    students, teachers = run_worlds(
        World(join, 2, tensor=2, arguments=(chosen, WORDS)),
        World(teach, 2, pipeline=2, arguments=(chosen, PERMUTED)),
    )
    for rank in (*students, *teachers):
        assert "tokenizer is SimpleNamespace of 45 tokens (vocabulary " in rank.sentence
        assert rank.sentence.endswith(
            "which give other tokens to the same ids; identity 'warn' would let it in"
        )


def test_the_same_vocabulary_is_let_in_without_a_word():
    chosen = settings(identity="insist", payload="topk", top_k=7)
    students, teachers = run_worlds(
        World(join, arguments=(chosen, WORDS)), World(teach, 2, tensor=2, arguments=(chosen, WORDS))
    )
    for rank in (*students, *teachers):
        assert (rank.sentence, rank.lines) == ("", [])


def test_a_tokenizer_that_nobody_knows_is_said_once_in_each_job():
    chosen = settings()
    students, teachers = run_worlds(
        World(join, 2, tensor=2, arguments=(chosen, None)),
        World(teach, 2, tensor=2, arguments=(chosen, None)),
    )
    assert sum((rank.lines for rank in students), []) == [UNKNOWN.format("student", "distill")]
    assert sum((rank.lines for rank in teachers), []) == [UNKNOWN.format("teacher", "serve")]


def test_replicas_with_other_weights_are_refused():
    """Which of the two is the first is chance; the other one and its student end with the sentence."""
    chosen = settings(payload="float16", connect_timeout=20)
    students, teachers = run_worlds(
        World(join_or_fail, 2, arguments=(chosen,)), World(teach_or_fail, 2, arguments=(chosen, (2, 3)))
    )
    for ranks in (students, teachers):
        sentences = [rank for rank in ranks if "this teacher has the weights" in rank]
        assert len(sentences) == 1 and sentences[0].count("(/run/a)") == 2
