"""Which micro-batches the teacher job is asked about, and what of its answers is added."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from cache_jobs import HEADERS, SMALL, VOCABULARY, add, tokens_of

from vcrd.cache.files import Cache, CacheWriter
from vcrd.cache.reading import Planner
from vcrd.link.plan import Shard
from vcrd.link.question import Question


def job(asked: list) -> SimpleNamespace:
    """A link that takes requests."""

    def request(*question: object) -> int:
        asked.append(question)
        return len(asked) - 1

    return SimpleNamespace(request=request)


def about(*numbers: int) -> Question:
    """Of sequences of equal length."""
    return Question(torch.stack([tokens_of(number) for number in numbers]))


def test_a_sequence_is_added_once_however_often_it_is_asked_for(tmp_path):
    with CacheWriter(tmp_path, SMALL) as writer:
        add(writer, 0)
    asked: list = []
    planner = Planner(Cache(tmp_path), job(asked))
    cases = [((0, 0), [], None), ((5, 0, 5), [0], 0), ((10, 5), [0], 1), ((5, 10), [], 2), ((0,), [], None)]
    for number, (sequences, lacking, live) in enumerate(cases):
        plan = planner.plan(number, about(*sequences))
        assert (plan.number, plan.lacking, plan.live) == (number, lacking, live)
    assert len(asked) == 3


def test_the_teacher_job_answers_until_the_folder_has_its_output_layer(tmp_path):
    """Its answers alone are of no use, and a writer that was killed may have left them without it."""
    header, asked = HEADERS["hidden"], []
    with CacheWriter(tmp_path, header) as writer:
        add(writer, 0)
        writer.flush()
        cache = Cache(tmp_path)
        planner = Planner(cache, job(asked))
        plan = planner.plan(0, about(0))
        assert (plan.lacking, plan.live) == ([], 0)
        writer.add_head(torch.zeros(VOCABULARY, 5, dtype=torch.bfloat16), Shard(0, VOCABULARY))
    cache.refresh()
    assert planner.plan(1, about(0)).live is None and len(asked) == 1
