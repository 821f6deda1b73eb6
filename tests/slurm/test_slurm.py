"""The batch scripts of examples/slurm, submitted to a real Slurm."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import page_environment
import pretrain_jobs as pretrain
import pytest
import torch
from cluster import Cluster, why_not
from waiting import wait_until

from vcrd.cache.files import Cache, key_of

ROOT = Path(__file__).resolve().parents[2]
MISSING = why_not() or (
    None
    if importlib.util.find_spec("megatron.training")
    else "this megatron-core has no megatron.training, which the scripts need"
)
pytestmark = [pytest.mark.skipif(MISSING is not None, reason=MISSING or ""), pytest.mark.timeout(400)]
ITERATIONS = 40
# Losses from the log, with seven digits.
LOSS = re.compile(r" iteration +(\d+)/ +\d+ .*? lm loss: ([0-9.E+-]+)")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    # The path of a socket must be short.
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a teacher checkpoint."""
    folder = tmp_path_factory.mktemp("weights") / "teacher"
    pretrain.save_weights(folder, pretrain.TEACHER, 120)
    return folder


class Submitted:
    """A batch script of the repository with settings for a CPU, in a separate run directory."""

    def __init__(self, cluster: Cluster, run_dir: Path, teacher: Path, **settings: str) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.settings = {
            "GPUS_PER_NODE": "0",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "RUN_DIR": str(run_dir),
            "TEACHER_CHECKPOINT": str(teacher),
            # On several lines and with a quote, as users write them.
            "STUDENT_ARGS": f"{pretrain.STUDENT}\n --tensor-model-parallel-size '2'\n --train-iters {ITERATIONS} "
            f"--eval-interval 1000 --save-interval 10",
            "TEACHER_ARGS": f"{pretrain.TEACHER} --global-batch-size 1 --pipeline-model-parallel-size 2",
            "RESTART_PAUSE": "1",
            "DOCTOR": "no",
            "VCRD_VOCAB_SIZE": "127",
            "VCRD_PAYLOAD": "float32",
            **settings,
        }
        self.number = ""

    def submit(self, *words: str) -> Submitted:
        """Runs sbatch with these arguments from the checkout; the log is in the run directory."""
        self.run_dir.mkdir(exist_ok=True)
        line = f"source examples/slurm/env.sh && sbatch --parsable --output={self.run_dir}/%j.log {' '.join(words)}"
        self.number = self.cluster.run("bash", "-c", line, cwd=ROOT, **self.settings)
        return self

    @property
    def log(self) -> str:
        path = self.run_dir / f"{self.number}.log"
        return path.read_text() if path.exists() else ""

    def reach(self, iteration: int) -> None:
        """Waits until the log of the student shows this iteration."""
        self.wait_for(rf" iteration +{iteration}/")

    def wait_for(self, words: str, seconds: float = 150) -> None:
        """Waits until the log has a match of `words`, or the job has ended."""

        def found() -> bool:
            return bool(re.search(words, self.log)) or self.state in ENDED

        wait_until(found, seconds, f"the log of job {self.number} has {words!r}", lambda: self.log[-3000:])
        assert re.search(words, self.log), self.log[-3000:]

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)

    def end(self, seconds: float = 200) -> None:
        """Waits for the end."""
        wait_until(
            lambda: self.state in ENDED,
            seconds,
            f"job {self.number} has ended",
            lambda: f"{self.state}\n{self.log[-3000:]}",
        )

    def finish(self) -> dict[int, str]:
        """Waits for a successful end. Returns the loss of each iteration."""
        self.end()
        assert self.state == "COMPLETED", self.log[-5000:]
        return self.losses()

    @property
    def saved(self) -> int:
        """The iteration of the last checkpoint."""
        return int((self.run_dir / "student" / "latest_checkpointed_iteration.txt").read_text())

    @property
    def resumed(self) -> int:
        """The iteration from which the last start continued."""
        found = re.findall(r"successfully loaded checkpoint from .* at iteration (\d+)", self.log)
        return int(found[-1])

    def losses(self) -> dict[int, str]:
        """The loss of each iteration, from the last time that it ran."""
        return {int(iteration): loss for iteration, loss in LOSS.findall(self.log)}


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")
DISTILL = ("--nodes=2", ":", "--nodes=2", "examples/slurm/distill.sbatch")


@pytest.fixture(scope="module")
def undisturbed(cluster, teacher, tmp_path_factory):
    """An undisturbed run with the doctor."""
    doctor = {"DOCTOR": "look", "DOCTOR_ARGS": "--student tp=2 --teacher pp=2 --seconds 0.5"}
    job = Submitted(cluster, tmp_path_factory.mktemp("undisturbed") / "run", teacher, **doctor).submit(
        *DISTILL
    )
    job.reach(1)
    assert len(set(cluster.nodes_of(job.number))) == 4  # two for the student and two others for the teacher
    job.finish()
    return job


@pytest.fixture(scope="module")
def whole(undisturbed):
    """The losses of the undisturbed run."""
    return undisturbed.losses()


def test_a_student_and_a_teacher_on_different_nodes(whole):
    assert list(whole) == list(range(1, ITERATIONS + 1))
    assert float(whole[ITERATIONS]) < float(whole[1])


def test_the_doctor_checks_every_node_and_measures_the_link(undisturbed):
    assert "all 4 came, from 4 nodes" in undisturbed.log
    assert re.search(r"link +[0-9.]+ GB/s from rank [23] .* to rank [01] ", undisturbed.log)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_stop_and_later_pre_empted_saves_and_runs_again(
    cluster, teacher, whole, tmp_path
):
    """Told as by `--signal=B:TERM@300` near its time limit, the job puts itself into the queue again."""
    job = Submitted(cluster, tmp_path / "run", teacher).submit(*DISTILL)
    job.reach(3)
    cluster.run("scancel", "--batch", "--signal=TERM", job.number)
    job.wait_for("stopped and saved with status 0")
    stopped = job.saved
    assert stopped >= 3
    assert max(job.losses()) == stopped  # no iteration runs twice
    job.reach(stopped + 3)
    assert job.resumed == stopped
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 5",
    )
    wait_until(
        lambda: cluster.job(urgent) == "COMPLETED", 120, "the urgent job has run", lambda: job.log[-3000:]
    )
    assert stopped + 3 <= job.saved < ITERATIONS
    assert_same(job.finish(), whole, stopped, job.resumed)


@pytest.mark.slow
def test_a_killed_teacher_and_then_a_lost_node(cluster, teacher, whole, tmp_path):
    job = Submitted(cluster, tmp_path / "run", teacher).submit(*DISTILL)
    job.reach(3)
    subprocess.run(["pkill", "-KILL", "-f", f"serve_teacher.py --load {teacher}"], check=True)
    job.wait_for("it starts again in 1 seconds")
    job.reach(12)
    lost = cluster.nodes_of(job.number)[-1]  # a node of the teacher
    cluster.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    wait_until(lambda: job.state != "RUNNING", 60, "the job has lost a node")
    assert job.state in ("PENDING", "COMPLETING", "REQUEUED")
    assert ITERATIONS not in job.losses()
    cluster.resume(lost)
    assert_same(job.finish(), whole, job.resumed)


@pytest.mark.slow
def test_one_teacher_job_serves_student_jobs(cluster, teacher, whole, tmp_path):
    students = {"STUDENTS_DIR": str(tmp_path / "students"), "VCRD_CONNECT_TIMEOUT": "60"}
    first = Submitted(cluster, tmp_path / "one", teacher, **students)
    first.submit("--nodes=2", "examples/slurm/student.sbatch")
    serving = Submitted(cluster, tmp_path / "teacher", teacher, **students)
    serving.submit("--nodes=2", "examples/slurm/teacher.sbatch")
    assert first.finish() == whole
    second = Submitted(cluster, tmp_path / "two", teacher, **students)
    second.submit("--nodes=2", "examples/slurm/student.sbatch")
    assert second.finish() == whole
    assert not list((tmp_path / "students").iterdir())
    serving.finish()  # because no further student came
    served = int(re.search(r"^served (\d+) micro-batches$", serving.log, re.MULTILINE)[1])
    assert served >= 2 * 4 * ITERATIONS  # two students, four micro-batches per step, and some prefetched ones


@pytest.mark.slow
@pytest.mark.parametrize("data", ["a file", "the training's"])
def test_a_cache_is_filled_and_filled_again(cluster, teacher, tmp_path, data):
    """By two writers on two nodes, with the teacher on two others."""
    np.save(tmp_path / "data.npy", np.random.default_rng(1).integers(0, 127, (10, 16)))
    settings = {"VCRD_SEQUENCE_LENGTH": "16"}
    if data == "a file":
        settings["CACHE_ARGS"] = f"--data '{tmp_path}/data.npy'\n --micro-batch 2"
    first, again = (
        Submitted(cluster, tmp_path / "run", teacher, **settings).submit(
            "--nodes=2", ":", "--nodes=2", "examples/slurm/cache.sbatch"
        )
        for _ in range(2)
    )
    for job in (first, again):
        job.finish()
    figures = re.compile(rf"{tmp_path}/run/cache: (\d+) sequences written \((\d+) more were there\)")
    (written, found), (more, all_found) = (
        map(int, figures.search(job.log).groups()) for job in (first, again)
    )
    assert written > 0 and more == 0 and all_found == written + found
    if data == "a file":
        assert written == 10
        assert all(
            key_of(row) in Cache(tmp_path / "run/cache")
            for row in torch.from_numpy(np.load(tmp_path / "data.npy"))
        )


@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled_and_leaves_no_process(cluster, teacher, tmp_path):
    job = Submitted(cluster, tmp_path / "run", teacher).submit(*DISTILL)
    job.reach(2)
    cluster.run("scancel", job.number)
    wait_until(lambda: not cluster.run("squeue", "--noheader"), 60, "no job is left")
    assert job.state == "CANCELLED"
    wait_until(
        lambda: not _processes(str(job.run_dir)),
        30,
        "all of its processes have ended",
        lambda: _processes(str(job.run_dir)),
    )


@pytest.mark.slow
def test_a_teacher_that_cannot_start_ends_the_job_with_its_error(cluster, teacher, tmp_path):
    settings = {"TEACHER_RESTARTS": "1", "VCRD_CONNECT_TIMEOUT": "3600", "TEACHER_ARGS": "--no-such-argument"}
    job = Submitted(cluster, tmp_path / "run", teacher, **settings).submit(*DISTILL)
    job.end()
    assert job.state == "FAILED"
    assert "2 times in a row; it is not started again" in job.log
    assert "unrecognized arguments: --no-such-argument" in job.log


@pytest.mark.slow
def test_a_teacher_with_wrong_arguments_is_not_restarted(cluster, teacher, tmp_path):
    nowhere = tmp_path / "nowhere"
    settings = {"VCRD_CONNECT_TIMEOUT": "3600", "TEACHER_ARGS": f"{pretrain.TEACHER} --load {nowhere}"}
    job = Submitted(cluster, tmp_path / "run", teacher, **settings).submit(*DISTILL)
    job.end()
    assert job.state == "FAILED"
    assert "the teacher's arguments are wrong, see above; it is not started again" in job.log
    assert f"--load: expected the folder of a Megatron checkpoint, got {nowhere}" in job.log
    assert "it starts again" not in job.log


@pytest.mark.slow
def test_a_student_that_crashes_ends_the_job(cluster, teacher, tmp_path):
    job = Submitted(cluster, tmp_path / "run", teacher).submit(*DISTILL)
    job.reach(3)
    rank = _processes(f"pretrain_vcrd.py .*--save {job.run_dir}/student").split()[0]
    subprocess.run(["kill", "-KILL", rank], check=True)
    job.end()
    assert job.state == "FAILED"
    assert "runs again" not in job.log and "Restarts=0" in cluster.run("scontrol", "show", "job", job.number)
    assert not list(job.run_dir.glob(".stopped*"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"STUDENT_ARGS": ""}, "STUDENT_ARGS must hold Megatron's arguments of the student, got none"),
        ({"TEACHER_ARGS": "--seed '7"}, "TEACHER_ARGS has a quote that is not closed: --seed '7"),
        (
            {"TEACHER_CHECKPOINT": "/nowhere"},
            "TEACHER_CHECKPOINT must be the folder of a Megatron checkpoint",
        ),
        ({"RUN_DIR": "/proc/nowhere"}, "RUN_DIR and STUDENTS_DIR must be folders that can be made"),
    ],
)
def test_a_wrong_setting_ends_the_job_at_once_with_a_message(cluster, teacher, tmp_path, settings, says):
    job = Submitted(cluster, tmp_path / "run", teacher, **settings).submit(*DISTILL)
    job.end()
    assert job.state == "FAILED"
    assert job.log.splitlines()[-1].startswith(f"vcrd: {says}") and job.log.count("\n") <= 3


def test_a_job_submitted_from_another_folder_is_an_error(cluster, tmp_path):
    script = ROOT / "examples/slurm/distill.sbatch"
    number = cluster.run("sbatch", "--parsable", "--output=log", ":", str(script), cwd=tmp_path)
    wait_until(lambda: cluster.job(number) in ENDED, 60, "the job has ended")
    assert cluster.job(number) == "FAILED"
    assert (tmp_path / "log").read_text() == (
        f"vcrd: there is no examples/slurm/env.sh in {tmp_path}: submit from the checkout\n"
    )


@pytest.mark.slow
def test_the_example_of_the_page_runs(cluster, tmp_path):
    """With other folders, and the packages of `make build` in place of the build."""
    python = page_environment.create(tmp_path / "venv", page_environment.installed_by_make("build"))
    page = (ROOT / "docs/cluster.md").read_text()
    (text,) = re.findall(r"## Without GPUs\n.*?```bash\n(.*?)```", page, re.DOTALL)
    for word, ours in (
        ("make build PYTHON=python3.12\n", ""),
        ("PYTHON=$PWD/.venv/cp312/bin/python", f"PYTHON={python}"),
        ("RUN_DIR=$PWD/vcrd-run", f"RUN_DIR={tmp_path}"),
        ("sbatch ", f"sbatch --parsable --output={tmp_path}/log "),
    ):
        assert text.count(word) == 1, word
        text = text.replace(word, ours)
    done = cluster.run("bash", "-c", text, cwd=ROOT, seconds=200, PYTHONPATH="")
    number = done.splitlines()[-1]
    log = tmp_path / "log"
    wait_until(
        lambda: cluster.job(number) in ENDED, 200, "the job has ended", lambda: log.read_text()[-3000:]
    )
    assert cluster.job(number) == "COMPLETED", log.read_text()[-3000:]
    assert "vcrd doctor: 4 processes" in log.read_text()
    assert [int(iteration) for iteration, _ in LOSS.findall(log.read_text())] == list(range(1, 21))


def assert_same(losses: dict[int, str], whole: dict[int, str], *resumed: int) -> None:
    """Digit by digit, except the second step after a start, which Megatron logs as the mean of the first two."""
    different = {number for number in whole if losses.get(number) != whole[number]}
    assert different <= {start + 2 for start in resumed}, (different, losses, whole)


def _processes(word: str) -> str:
    return subprocess.run(["pgrep", "-af", word], capture_output=True, text=True).stdout
