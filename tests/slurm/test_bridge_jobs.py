"""The batch scripts of examples/bridge, submitted to a real Slurm."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import hugging_face
import pytest
from cluster import Cluster, why_not
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
MISSING = why_not() or (
    None if importlib.util.find_spec("megatron.bridge") else "Megatron-Bridge needs Python 3.12"
)
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
    pytest.mark.timeout(900),
    pytest.mark.slow,
]
ITERATIONS = 30
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


def test_a_student_job_that_is_told_to_stop_saves_and_runs_again(tmp_path_factory):
    # The path of a socket must be short.
    folder = tmp_path_factory.mktemp("bridge")
    hugging_face.save(folder / "llama", "Llama", layers=6, tie_word_embeddings=False)
    settings = {
        "GPUS_PER_NODE": "0",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "STUDENTS_DIR": str(folder / "students"),
        "RUN_DIR": str(folder / "run"),
        "DOCTOR": "no",
        "VCRD_CONNECT_TIMEOUT": "240",
        "TEACHER_HF": str(folder / "llama"),
        "TEACHER_ARGS": "--tp 2 --seq-length 32",
        "STUDENT_HF": str(folder / "llama"),
        "KEEP_LAYERS": "0,2-4",
        "DATA": str(hugging_face.write_chats(folder / "data", 48)),
        "STUDENT_ARGS": f"--pp 2 --seq-length 32 train.train_iters={ITERATIONS} train.global_batch_size=4",
    }
    with Cluster(folder / "c", nodes=4) as cluster:
        teacher, student = (
            cluster.run(
                *("bash", "-c"),
                "source examples/slurm/env.sh && sbatch --parsable --nodes=2 "
                f"--output={folder}/{name}.log examples/bridge/{name}.sbatch",
                cwd=ROOT,
                **settings,
            )
            for name in ("teacher", "student")
        )
        log = folder / "student.log"

        def says(words: str) -> None:
            def found() -> bool:
                text = log.read_text() if log.exists() else ""
                return bool(re.search(words, text)) or cluster.job(student) in ENDED

            wait_until(found, 300, f"the log has {words!r}", lambda: log.read_text()[-3000:])
            assert re.search(words, log.read_text()), log.read_text()[-3000:]

        says(r"iteration +3/")
        cluster.run("scancel", "--batch", "--signal=TERM", student)
        says("stopped and saved with status 0")
        wait_until(
            lambda: cluster.job(student) in ENDED,
            400,
            "the student has ended",
            lambda: log.read_text()[-3000:],
        )
        assert cluster.job(student) == "COMPLETED", log.read_text()[-3000:]
        text = log.read_text()
        assert "successfully loaded checkpoint" in text
        # No iteration runs twice, and none is left out.
        assert [int(n) for n in re.findall(r"iteration +(\d+)/.*?lm loss", text)] == list(
            range(1, ITERATIONS + 1)
        )
        cluster.run("scancel", teacher)
