"""A student on Megatron's schedules that trains from a cache has the losses and gradients of the link, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
import torch
import torch.distributed as dist
from packing_jobs import known_forms
from resume_jobs import Case, Outcome, stop_and_resume, train
from test_distillation import settings
from test_resume import STEPS, check, same
from worlds import World, run_worlds

from vcrd.settings import DistillSettings


def chosen_for(folder: Path, **changes) -> dict[str, DistillSettings]:
    """Settings for a student of a teacher job, one that fills a cache from it, and one that has the cache alone."""
    live = settings(**changes)
    cache = f"cache:{folder}"
    return {
        "live": live.replaced(name="live"),
        "filling": live.replaced(name="filling", teacher=cache),
        "cached": live.replaced(name="cached", teacher=cache, address=None),
    }


def study(chosen: list[DistillSettings]) -> list[SimpleNamespace]:
    return [jobs.student_job(each, 2) for each in chosen]


def teach(chosen: list[DistillSettings]) -> list[int]:
    """One micro-batch at a time: a model's rounding depends on the shape of its input."""
    return [jobs.teacher_job(each, 1) for each in chosen]


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param("logits_8bit"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "float32", "topk", "hidden")),
    ],
)
def test_losses_and_gradients_equal_those_over_the_link(payload, tmp_path):
    """The cache is filled by two data ranks, and read by two of two tensor ranks each."""
    chosen = chosen_for(tmp_path, payload=payload, top_k=7)
    run_worlds(
        World(study, 2, arguments=([chosen["filling"]],)), World(teach, 1, arguments=([chosen["filling"]],))
    )
    students, ((served,),) = run_worlds(
        World(study, 4, tensor=2, arguments=([chosen["live"], chosen["cached"]],)),
        World(teach, 1, arguments=([chosen["live"]],)),
    )
    assert served == 2 * 2 * 2, "two data ranks, training and measuring, two micro-batches"
    for live, cached in students:
        assert len(live.distilled) == 2 and live.gradients.keys() == cached.gradients.keys()
        same([live.distilled, live.plain[0]], [cached.distilled, cached.plain[0]], payload)
        for place, gradients in live.gradients.items():
            for name, gradient in gradients.items():
                assert torch.equal(gradient, cached.gradients[place][name]), (place, name)
        assert cached.figures.loss == live.figures.loss and cached.figures.link_bytes > 0


def study_and_wait(chosen: list[DistillSettings], per_rank: int | None) -> list[SimpleNamespace]:
    """One student after another. Each begins when all ranks have ended the one before, and its files are there."""
    found = []
    for each in chosen:
        found.append(jobs.student_job(each, 4, per_rank))
        dist.barrier()
    return found


@pytest.mark.parametrize(
    ("pipeline", "per_rank"),
    [(2, 2), pytest.param(2, None, marks=pytest.mark.slow)],
    ids=["interleaved", "one"],
)
def test_a_student_with_a_pipeline_fills_and_reads_what_the_link_delivers(pipeline, per_rank, tmp_path):
    chosen = chosen_for(tmp_path)
    live, filling = chosen["live"], chosen["filling"]
    ranks, _ = run_worlds(
        World(
            study_and_wait,
            pipeline,
            pipeline=pipeline,
            virtual=per_rank,
            arguments=([live, filling, chosen["cached"]], per_rank),
        ),
        World(teach, 1, arguments=([live, filling],)),
    )
    assert any(rank[0].has_loss for rank in ranks)
    for live, *others in ranks:
        for other in others:
            same([live.distilled, *live.plain], [other.distilled, *other.plain], "losses")
            for place, gradients in live.gradients.items():
                assert all(torch.equal(gradients[name], other.gradients[place][name]) for name in gradients)


def cached_runs(chosen: DistillSettings, cases: dict[str, Case], per_rank: int | None = None):
    return stop_and_resume(chosen, cases, STEPS, 2, per_rank)


def fill(chosen: DistillSettings, cases: dict[str, Case]) -> dict[str, Outcome]:
    return {title: train(chosen.replaced(name=f"fill {title}"), case, STEPS) for title, case in cases.items()}


def serve(chosen: DistillSettings, cases: dict[str, Case]) -> None:
    for title in cases:
        jobs.teacher_job(chosen.replaced(name=f"fill {title}"), 1)


def check_resumed(cases: dict[str, Case], folder: Path, **layout) -> None:
    chosen = chosen_for(folder)
    ((filled,), _) = run_worlds(
        World(fill, arguments=(chosen["filling"], cases)), World(serve, arguments=(chosen["filling"], cases))
    )
    (ranks,) = run_worlds(World(cached_runs, arguments=(chosen["cached"], cases), **layout))
    for found in ranks:
        for title, of_case in found.items():
            check(title, of_case)
            assert of_case["whole"].repeated.keys() == set(cases[title].rejected)
            if not layout:
                same(of_case["plain"].losses, filled[title].losses, title)


def test_a_run_that_resumes_or_runs_a_step_again_reads_the_same_answers(tmp_path):
    check_resumed(
        {"data": Case(rejected=(1, 2), evaluate=True), "dropout": Case(draws=(), dropout=0.2)}, tmp_path
    )


@pytest.mark.slow
def test_a_tensor_parallel_run_that_resumes_reads_the_same_answers(tmp_path):
    check_resumed(
        {"data": Case(rejected=(1, 2)), "both": Case(dropout=0.2, rejected=(1,))}, tmp_path, size=2, tensor=2
    )


def pack(chosen: list[DistillSettings]) -> list[list[torch.Tensor]]:
    return [known_forms(each) for each in chosen]


@pytest.mark.slow
def test_packed_sequences_are_found_in_every_form(tmp_path):
    chosen = chosen_for(tmp_path)
    ((filled, cached),), _ = run_worlds(
        World(pack, arguments=([chosen["filling"], chosen["cached"]],)),
        World(teach, arguments=([chosen["filling"]],)),
    )
    same([filled], [cached], "packed")
    # The student has its teacher's weights, so another sequence's answer would show.
    assert len(cached) > 5 and all(loss.abs().max() < 1e-4 for loss in cached)


def lack(chosen: DistillSettings) -> str:
    from vcrd.cache.reading import AnswersMissing

    with pytest.raises(AnswersMissing) as error:
        jobs.student_job(chosen, 3)
    return str(error.value)


def test_a_missing_sample_ends_every_rank_with_one_sentence(tmp_path):
    chosen = chosen_for(tmp_path)
    run_worlds(
        World(study, arguments=([chosen["filling"]],)), World(teach, 1, arguments=([chosen["filling"]],))
    )
    (sentences,) = run_worlds(World(lack, 2, tensor=2, arguments=(chosen["cached"],)))
    assert len(set(sentences)) == 1 and "of micro-batch 2, got none to 2 of 2" in sentences[0]
