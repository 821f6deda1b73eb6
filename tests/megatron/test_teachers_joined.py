"""Several teacher jobs of one student job, through Megatron's schedules, links and figures."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
import several_jobs as several
import test_metrics
import torch
import training_chaos as chaos
from patience import make_links_wait_shortly
from test_distillation import settings as of_one
from worlds import World, Worlds, run_worlds

from examples.demo.convert import to_hugging_face
from vcrd.link.errors import HandshakeRefused, TeacherLost
from vcrd.settings import DistillSettings


def check_against_direct(
    students: list[SimpleNamespace], truth: SimpleNamespace, count: int, tolerance: float = 2e-5
) -> None:
    last = [rank for rank in students if rank.has_loss]
    for rank in last:
        mine = slice(rank.data_rank * count, (rank.data_rank + 1) * count)
        for loss, expected in zip(rank.distilled, truth.distilled[mine], strict=True):
            torch.testing.assert_close(loss.double(), expected, atol=tolerance, rtol=tolerance)
        for each, (tokens, divergence, weight) in zip(rank.figures.teachers, truth.sums, strict=True):
            assert each.tokens == tokens > 0 and each.wait > 0
            assert each.divergence == pytest.approx(divergence / tokens, rel=1e-3)
            assert each.weight == pytest.approx(weight / tokens, rel=1e-3)
        assert rank.own_loss_again
    shards = {
        place: part for rank in students if rank.data_rank == 0 for place, part in rank.gradients.items()
    }
    gradients = to_hugging_face(shards, jobs.STUDENT, jobs.STUDENT.layers)
    for name, expected in truth.gradients.items():
        scale = expected.abs().max()
        torch.testing.assert_close(gradients[name] / scale, expected / scale, atol=2e-4, rtol=0, msg=name)


ALL = {"top_k": f"code={jobs.TRUE_VOCAB},law={jobs.TRUE_VOCAB}"}  # all of them hold the whole distribution


@pytest.mark.parametrize(
    ("changes", "size", "tensor", "pipeline", "teachers"),
    [
        ({"ce_weight": 0.3}, 4, 2, 2, [(1, 1, 1), (2, 2, 1), (2, 1, 2)]),
        (
            {"payload": "math=hidden,code=topk,law=float32", "divergence": "jsd", **ALL},
            2,
            1,
            1,
            [(1, 1, 1)] * 3,
        ),
        (
            {
                # Two teachers of different weights in one form.
                "payload": "math=hidden,code=topk,law=topk",
                **ALL,
                "teacher_weights": "math=2,law=0.5",
                "fused_head": "on",
                "validity": "margin",
            },
            2,
            2,
            1,
            [(1, 1, 1), (1, 1, 1), (2, 2, 1)],
        ),
    ],
    ids=["pipeline", "data", "fused"],
)
def test_a_student_learns_each_sample_from_its_teacher(changes, size, tensor, pipeline, teachers):
    """Losses, gradients and figures, over layouts of the student and of each teacher, against the reference."""
    chosen, count, data = several.settings(**changes), 4, size // tensor // pipeline
    students, (truth,), *served = run_worlds(
        World(several.student, size, tensor, pipeline, arguments=(chosen, count)),
        World(several.direct, arguments=(chosen, count, data)),
        *[
            World(several.serve, *layout, arguments=(chosen, name))
            for name, layout in zip(several.NAMES, teachers, strict=True)
        ],
    )
    check_against_direct(students, truth, count)
    for rank in students:
        is_fused = chosen.fused_head == "on" and rank.has_loss
        assert set(rank.upstream) == ({"look"} if is_fused else set()), "the head is computed twice"
    batches = [batch for rank in range(data) for batch in several.batches(count, rank)]
    for number, ranks in enumerate(served):
        # In training and in the measurement after it.
        asked = sum(number in several.owners_of(batch) for batch in batches)
        assert ranks == [2 * asked] * len(ranks)


def one_after_another(chosen: list[DistillSettings]) -> list[list[torch.Tensor]]:
    return [jobs.student_job(each, 3).distilled for each in chosen]


def serve_one_after_another(chosen: list[DistillSettings]) -> None:
    for each in chosen:
        own = each.replaced(link=each.link.of(each.link.teachers()[0]))
        jobs.teacher_job(own)


def test_a_single_teacher_with_a_name_is_one_without():
    named, plain = several.settings(("math",), payload="float16"), of_one(payload="float16")
    (ranks, _) = run_worlds(
        World(one_after_another, 2, tensor=2, arguments=([named, plain],)),
        World(serve_one_after_another, arguments=([named, plain],)),
    )
    for with_name, without in ranks:
        assert all(map(torch.equal, with_name, without))


@pytest.mark.slow
def test_one_teacher_may_be_a_job_and_another_a_folder(tmp_path):
    """A run whose jobs fill a folder of one teacher's answers, and one that reads them there: the same bits."""
    one = several.settings(payload="float16")
    filled = one.replaced(teacher=f"law=cache:{tmp_path}/law")
    other = several.settings(("math", "code"), payload="float16")
    read = other.replaced(teacher=f"law=cache:{tmp_path}/law")
    first, *_ = run_worlds(
        World(several.student, 2, tensor=2, arguments=(filled, 3)),
        *[World(several.serve, arguments=(one, name)) for name in several.NAMES],
    )
    again, *_ = run_worlds(
        World(several.student, 2, tensor=2, arguments=(read, 3)),
        *[World(several.serve, arguments=(other, name)) for name in ("math", "code")],
    )
    for mine, before in zip(again, first, strict=True):
        assert all(map(torch.equal, mine.distilled, before.distilled))
        assert [each.tokens for each in mine.figures.teachers] == [
            each.tokens for each in before.figures.teachers
        ]


def reruns(chosen: DistillSettings, rejected: tuple[int, ...]) -> list[list[torch.Tensor]]:
    jobs.batches = several.batches
    return test_metrics.train_with_reruns(chosen, 4, rejected)


def test_a_rewound_step_asks_each_teacher_again():
    """With requests ahead of time, against a run without any and without reruns."""
    one, other = several.settings(credits=3), several.settings(credits=0)
    again, undisturbed, *_ = run_worlds(
        World(reruns, 2, tensor=2, arguments=(one, (1, 2))),
        World(reruns, 2, tensor=2, arguments=(other, ())),
        *[World(several.serve, arguments=(each, name)) for each in (one, other) for name in several.NAMES],
    )
    for mine, plain in zip(again, undisturbed, strict=True):
        assert [step for step, *_ in mine] == [0, 1, 1, 2, 2, 3]
        for step, *losses in mine:
            assert all(map(torch.equal, losses, plain[step][1:]))


def refused(chosen: DistillSettings) -> str:
    with pytest.raises(HandshakeRefused) as error:
        jobs.student_job(chosen, 2)
    return str(error.value)


def serve_another_vocabulary(chosen: DistillSettings, name: str) -> str:
    wrong = several.of_teacher(chosen, name).replaced(vocab_size=jobs.TRUE_VOCAB - 1, connect_timeout=3)
    with pytest.raises(HandshakeRefused) as error:
        jobs.teacher_job(wrong)
    return str(error.value)


def test_a_teacher_of_another_vocabulary_is_refused_by_its_name_on_every_rank():
    chosen = several.settings(("math", "code"))
    said, _, _ = run_worlds(
        World(refused, 2, tensor=2, arguments=(chosen,)),
        World(several.serve, arguments=(chosen, "math")),
        World(serve_another_vocabulary, arguments=(chosen, "code")),
    )
    for each in said:
        assert each.startswith(
            "teacher code: the link is refused: vocab_size is 45 for the student and 44 for"
        )


def wrong_field(chosen: DistillSettings) -> str:
    def batches(count: int, data_rank: int) -> list[dict]:
        found = several.batches(count, data_rank)
        found[0]["vcrd_teacher"] = ["math", "poetry"]
        return found

    jobs.batches = batches
    with pytest.raises(ValueError) as error:
        jobs.student_job(chosen, 4)
    return str(error.value)


def serve_until_lost(chosen: DistillSettings, name: str) -> str:
    from vcrd.link.errors import LinkError

    make_links_wait_shortly(1.0)
    try:
        return str(several.serve(chosen, name))
    except LinkError as error:
        return str(error)


def serve_and_die(chosen: DistillSettings, name: str) -> None:
    from vcrd.megatron import serve

    model, calls = jobs.model(jobs.TEACHER, seed=3), []

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            os._exit(1)  # as a killed process does, without a word

    model.register_forward_pre_hook(count)
    serve(model, several.of_teacher(chosen, name))


def lose_a_teacher(chosen: DistillSettings) -> str:
    make_links_wait_shortly(1.0)
    jobs.batches = several.batches
    with pytest.raises(TeacherLost) as error:
        jobs.student_job(chosen, 8)
    return str(error.value)


def test_a_teacher_that_does_not_come_back_is_named_on_every_rank():
    chosen = several.settings()
    with Worlds() as worlds:
        students = worlds.start(World(lose_a_teacher, 2, tensor=2, arguments=(chosen,)))
        others = [worlds.start(World(serve_until_lost, arguments=(chosen, name))) for name in ("math", "law")]
        worlds.start(World(serve_and_die, arguments=(chosen, "code")))
        said, *_ = worlds.wait(students, *others)
    for each in said:
        assert re.match("teacher code: teacher replica 0 is lost .* none came back within 1 seconds", each)


def test_a_teacher_that_is_not_there_is_one_sentence_on_every_rank():
    chosen = several.settings()
    said, *_ = run_worlds(
        World(wrong_field, 2, tensor=2, arguments=(chosen,)),
        *[World(serve_until_lost, arguments=(chosen, name)) for name in several.NAMES],
    )
    assert set(said) == {"vcrd_teacher: expected names of teachers (math, code, law), got 'poetry'"}


def train(*arguments) -> SimpleNamespace:
    jobs.batches = several.batches
    return chaos.train(*arguments)


@pytest.mark.slow
def test_three_teachers_of_which_one_is_killed_and_comes_back_change_no_bit(tmp_path):
    results = []
    for kills in (0, 2):
        chosen = several.settings(payload="math=topk,code=float16,law=logits_8bit", top_k=8)
        progress = Path(f"{tmp_path}/{kills}.progress")
        with Worlds() as worlds:
            arguments = (chosen, 10, f"{tmp_path}/{kills}", None)
            student = worlds.start(World(train, 2, tensor=2, arguments=arguments))
            for name in ("math", "law"):
                worlds.start(World(several.serve, arguments=(chosen, name)))
            for moment in range(kills):
                teacher = worlds.start(World(several.serve, 2, pipeline=2, arguments=(chosen, "code")))
                while int(progress.read_text() or 0 if progress.exists() else 0) < 3 * (moment + 1):
                    student.check()
                    teacher.processes[0].join(0.001)
                teacher.kill()
            worlds.start(World(several.serve, 2, pipeline=2, arguments=(chosen, "code")))
            results.append(worlds.wait(student, seconds=300)[0])
    assert chaos.equal(*results)
    assert len({tuple(loss.flatten().tolist()) for loss in results[0][0].curve}) == 10  # it did train


@pytest.mark.slow
def test_a_run_that_resumes_finds_its_teachers_and_its_curve(tmp_path):
    curves = []
    for stop in (None, 3):
        chosen = several.settings(credits=3 if stop else 1)
        checkpoint = f"{tmp_path}/{stop}"
        with Worlds() as worlds:
            for name in several.NAMES:
                worlds.start(World(several.serve, arguments=(chosen, name)))
            if stop is not None:
                first = worlds.start(World(train, 2, tensor=2, arguments=(chosen, 6, checkpoint, stop)))
                for process in first.processes:
                    process.join(100)
            student = worlds.start(World(train, 2, tensor=2, arguments=(chosen, 6, checkpoint, None)))
            curves.append(worlds.wait(student, seconds=300)[0])
    assert chaos.equal(*curves)
