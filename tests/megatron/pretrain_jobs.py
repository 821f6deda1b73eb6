"""Runs the pretraining script and the teacher's, as a user would, in any layout, from the same initial weights."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from forked_scripts import Scripts
from ports import free_port

ROOT = Path(__file__).resolve().parents[2]
CPU = (
    "--distributed-backend gloo --use-cpu-initialization --transformer-impl local --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion "
    "--no-rope-fusion"
)
SHAPE = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--position-embedding-type rope --untie-embeddings-and-output-weights"
)
DATA = (
    "--attention-dropout 0 --hidden-dropout 0 "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 8 --mock-data "
    "--init-method-std 0.3 --num-workers 0"
)
MODEL = f"{SHAPE} {DATA}"
# 127 true columns: without the true vocabulary, tensor ranks would pad and count differently.
TEACHER = f"{CPU} {MODEL} --hidden-size 24 --num-attention-heads 6 --seed 7 --micro-batch-size 1"
TRAINING = "--micro-batch-size 2 --global-batch-size 8 --eval-iters 0 --lr 3e-3 --log-interval 1"
STUDENT = f"{CPU} {MODEL} {TRAINING}"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear"


@dataclass(frozen=True)
class Run:
    """A student's and a teacher's layout: processes, and arguments of Megatron that say how they share the work."""

    processes: int = 1
    student: str = ""
    teacher_processes: int = 1  # 0: the teacher is in the student's own ranks
    teacher: str = ""
    experts: bool = False
    shared: str = (
        ""  # arguments that change the model or the loss: a run is compared with one that has the same
    )


class Failed(AssertionError):
    """The last lines of both jobs' outputs."""


def save_weights(folder: Path, arguments: str, seconds: float, form: str = "torch_dist") -> None:
    """Saves a model of Megatron's own initial weights, in the distributed format or the legacy one ("torch")."""
    if not (folder / "latest_checkpointed_iteration.txt").exists():
        text = f"{arguments} --save {folder} --save-interval 1 --ckpt-format {form} --micro-batch-size 2"
        _finish([_start(1, "examples/make_checkpoint.py", text, folder.with_suffix(".log"), 0)], seconds)


def curve(folder: Path, run: Run, steps: int, seconds: float = 120, more: str = "") -> list[float]:
    """The loss of each step, as Megatron logs it (7 digits)."""
    student, teacher = STUDENT, f"{TEACHER} {more}"
    if run.experts:
        student += f" {EXPERTS}"
    weights = folder / ("experts" if run.experts else "student")
    save_weights(weights, student, seconds)
    save_weights(folder / "teacher", TEACHER, seconds)
    from_weights = f"--load {weights} --finetune --no-load-optim --no-load-rng"
    student += (
        f" {run.shared} {run.student} {from_weights} --train-iters {steps} --eval-interval {steps} {more}"
    )
    if run.teacher_processes:
        teacher += f" --global-batch-size 1 {run.teacher} --load {folder / 'teacher'}"
    else:
        student += f" --vcrd-local-teacher {folder / 'teacher'}"
    return losses(train(folder, student, teacher, run.processes, run.teacher_processes, seconds), steps)


def train(
    folder: Path,
    student: str,
    teacher: str,
    processes: int = 1,
    teacher_processes: int = 1,
    seconds: float = 120,
    script: str = "examples/pretrain_vcrd.py",
) -> str:
    """What the student's job printed. student, teacher: all their arguments; no job for a teacher of 0 processes."""
    port, logs = free_port(), Path(tempfile.mkdtemp(dir=folder))
    jobs = []
    if teacher_processes:
        jobs += [_start(teacher_processes, "examples/serve_teacher.py", teacher, logs / "teacher.log", port)]
    _finish([*jobs, _start(processes, script, student, logs / "student.log", port)], seconds)
    return (logs / "student.log").read_text()


def losses(text: str, steps: int) -> list[float]:
    """Of each step, in what a student's job printed."""
    found = re.findall(r" iteration +\d+/.*? lm loss: ([0-9.E+-]+)", text)
    if len(found) != steps:
        raise Failed(f"expected {steps} losses, got {len(found)}\n{text[-3000:]}")
    return [float(value) for value in found]


def _start(processes: int, script: str, arguments: str, log: Path, port: int) -> Scripts:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("VCRD_")},
        "PYTHONPATH": str(ROOT),
        "VCRD_ADDRESS": f"127.0.0.1:{port or free_port()}",
        "VCRD_PAYLOAD": "float32",
        "VCRD_VOCAB_SIZE": "127",
        "VCRD_CONNECT_TIMEOUT": "90",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    return Scripts(processes, [str(ROOT / script), *arguments.split()], environment, log, free_port())


def _finish(jobs: list[Scripts], seconds: float) -> None:
    """Waits for all; stops all, and raises Failed, when one fails or takes too long."""
    try:
        for job in reversed(jobs):
            job.wait(seconds)
        failed = [job for job in jobs if job.returncode != 0]
    finally:
        for job in jobs:
            job.kill()
    if failed:
        raise Failed("\n".join(f"{job.output.name}:\n{job.output.read_text()[-4000:]}" for job in failed))
