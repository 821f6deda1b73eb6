"""A short real training of student and teacher that writes records, and their page."""

from __future__ import annotations

import importlib.util
import re

import pretrain_jobs
import pytest
import training_jobs
from test_distillation import settings
from worlds import World, run_worlds

from vcrd.__main__ import main
from vcrd.monitor.bottleneck import WORTH_SAYING
from vcrd.monitor.records import read_records

STEPS = 5
SLEEP = 0.3  # seconds of the teacher for each answer


def records(folder, name: str) -> dict[str, list[dict]]:
    """The records of one rank, by kind."""
    found: dict[str, list[dict]] = {}
    for record in read_records(folder / f"{name}.jsonl"):
        found.setdefault(record["kind"], []).append(record)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, tokens of each step) for two tensor ranks that wait for a sleeping teacher."""
    folder = tmp_path_factory.mktemp("run")
    chosen = settings(credits=2, telemetry_dir=str(folder))
    (tokens, _), _ = run_worlds(
        World(training_jobs.student, 2, tensor=2, arguments=(chosen, STEPS)),
        World(training_jobs.slow_teacher, arguments=(chosen, SLEEP)),
    )
    return folder, tokens


def test_every_rank_writes_its_records(trained):
    folder, tokens = trained
    names = {path.stem for path in folder.glob("*.jsonl")}
    assert names == {"student-00000", "student-00001", "teacher-00000"}
    for name in sorted(names):
        found = records(folder, name)
        (start,) = found["start"]
        role, rank = name.split("-")
        assert (start["role"], start["rank"], start["world"]) == (
            role,
            int(rank),
            2 if role == "student" else 1,
        )
        assert start["settings"]["payload"] == "float32" and start["host"]
        assert all(record["host_memory_bytes"] > 1e7 for record in found["rank"])
        assert sum(record.get("steps", 0) for record in found["rank"]) == (STEPS if role == "student" else 0)
    figures = records(folder, "student-00001")["figures"]
    assert [record["iteration"] for record in figures] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in figures] == tokens
    for record in figures:
        first, counts = record["weight_histogram"]
        assert sum(counts) == record["tokens"] == sum(record["validity_histogram"]) and 0 < first < 256
        parts = [record[name] for name in ("forward", "backward", "gradients", "between")]
        assert all(part >= 0 for part in parts) and record["forward"] > 0 and record["backward"] > 0
        # The first step starts with its first forward step.
        assert sum(parts) <= record["seconds"] + 0.05 and sum(parts) > 0.5 * record["seconds"]
        assert record["forward"] >= record["teacher_wait_by_replica"]["0"]
        assert record["steps"] == 1 and 0 < record["teacher_wait_by_replica"]["0"] <= record["seconds"]


def test_the_waits_of_the_student_agree_with_the_work_of_the_teacher(trained):
    folder, _ = trained
    student, teacher = records(folder, "student-00000"), records(folder, "teacher-00000")
    busy = sum(record.get("answering", 0) for record in teacher["rank"])
    assert busy > 0.95 * SLEEP * 2 * STEPS, "it slept as long"
    assert sum(record.get("answers", 0) for record in teacher["rank"]) == 2 * STEPS
    received = sum(record["link_bytes"] for record in student["rank"] if "link_bytes" in record)
    assert 0 < received <= sum(record.get("bytes_sent", 0) for record in teacher["rank"])
    # On a busy machine the student's own steps take so long that later answers are there in time.
    waits = {
        record["iteration"]: record["teacher_wait_by_replica"]["0"] / record["seconds"]
        for record in records(folder, "student-00001")["figures"]
    }
    said = {record["iteration"]: record for record in student["starved"]}
    # The clock is read once more between the two records.
    assert {step for step, share in waits.items() if share > 1.01 * WORTH_SAYING} <= set(said)
    assert set(said) <= {step for step, share in waits.items() if share > 0.99 * WORTH_SAYING}
    assert all("of the step for teacher replica 0" in record["sentence"] for record in said.values())
    # Nothing was asked before the first step, so that the teacher sleeps while the student waits.
    assert said[1]["cause"] in ("teacher", "bursts")
    assert "which had not begun to answer" in said[1]["sentence"]


def test_the_records_give_a_page(trained, capsys):
    folder, _ = trained
    assert main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    for text in (
        "2 ranks: tensor 2",
        "waiting for teacher replica 0",
        "% forward, ",
        "Weights of the tokens",
        "No GPU was measured",
    ):
        assert text in page
    assert f"1 to {STEPS}" in page and "Teacher replica 0" in page and "Link between the jobs" in page


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.19, which needs Python 3.12",
)
@pytest.mark.slow
def test_with_megatrons_training_loop(tmp_path):
    """The last rank writes the metrics of both data ranks and the machine of each rank to TensorBoard; a resumed run
    appends to the same files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    pretrain_jobs.save_weights(tmp_path / "teacher", pretrain_jobs.TEACHER, 120)
    ours = f"--vcrd-telemetry-dir {run}"
    teacher = f"{pretrain_jobs.TEACHER} --load {tmp_path / 'teacher'} --global-batch-size 1 {ours}"
    student = f"{pretrain_jobs.STUDENT} --tensorboard-dir {tmp_path / 'events'} --eval-interval 100 {ours}"
    student += (
        f" --save {tmp_path / 'saved'} --load {tmp_path / 'saved'} --save-interval 100 --log-interval 2"
    )
    for exits, first in (("--exit-interval 4", 2), ("", 6)):
        text = pretrain_jobs.train(tmp_path, f"{student} --train-iters 6 {exits}", teacher, 2)
        assert re.search(rf"\[vcrd\] iteration +{first}/", text)
    figures = records(run, "student-00001")["figures"]
    assert [(record["iteration"], record["steps"]) for record in figures] == [(2, 2), (4, 2), (6, 2)]
    assert "figures" not in records(run, "student-00000")
    for rank in range(2):
        found = records(run, f"student-{rank:05d}")
        assert len(found["start"]) == 2 and sum(r.get("steps", 0) for r in found["rank"]) == 6
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for tag in (
        "host_memory_bytes_max",
        "host_memory_bytes/rank_0",
        "host_memory_bytes/rank_1",
        "teacher_wait_share",
    ):
        assert events.Scalars(f"vcrd/{tag}")[-1].value > 0
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<dd>once</dd>" in page and "2 ranks: data 2" in page
