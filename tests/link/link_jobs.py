"""Two jobs of real processes for the tests of the link: a student's world and one world per teacher replica.

Processes come from a fork server that has imported torch once. Each writes what it prints to a file, and an
exception ends it as it would end a script: traceback, exit status 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from fork_server import context
from ports import free_port

from benchmarks.gpu.ranks import ONE_GPU
from vcrd.link import LinkSettings, StudentLink, TeacherLink, TeacherPlace
from vcrd.link.transport import fake


@dataclass
class Layout:
    """What runs: sizes of both sides. pipeline: ranks of a replica before its last stage, one stage each. patience:
    seconds to wait for a lost job to come back; None: the settings say it."""

    student_tensor: int = 1
    student_context: int = 1
    student_data: int = 1
    teacher_tensor: int = 1
    pipeline: int = 0
    replicas: int = 1
    vocab: int = 50
    student_padded: int = 0
    teacher_padded: int = 0
    sequence: int = 16
    settings: dict = field(default_factory=dict)
    patience: float | None = None

    def __post_init__(self) -> None:
        self.student_padded = self.student_padded or padded(self.vocab, self.student_tensor)
        self.teacher_padded = self.teacher_padded or padded(self.vocab, self.teacher_tensor)

    @property
    def students(self) -> int:
        return self.student_tensor * self.student_context * self.student_data

    @property
    def teachers(self) -> int:
        """Ranks of one replica: the earlier stages, then the last stage's tensor ranks."""
        return self.pipeline + self.teacher_tensor

    def student(self, rank: int) -> dict:
        return dict(
            vocab_size=self.vocab,
            padded_vocab_size=self.student_padded,
            sequence_length=self.sequence,
            tensor_rank=rank % self.student_tensor,
            tensor_size=self.student_tensor,
            context_rank=rank // self.student_tensor % self.student_context,
            context_size=self.student_context,
            data_rank=rank // (self.student_tensor * self.student_context),
            data_size=self.student_data,
        )

    def teacher(self, replica: int, rank: int) -> dict:
        last = rank >= self.pipeline
        return dict(
            vocab_size=self.vocab,
            padded_vocab_size=self.teacher_padded,
            sequence_length=self.sequence,
            place=TeacherPlace(
                replica=replica,
                replicas=self.replicas,
                tensor_rank=rank - self.pipeline if last else 0,
                tensor_size=self.teacher_tensor,
                is_last_stage=last,
            ),
        )


DEVICE = "VCRD_TESTS_DEVICE"


def device() -> torch.device:
    """Where the models of these tests compute: what a job gives to the link lies there, and what it gets."""
    return torch.device(os.environ.get(DEVICE, "cpu"))


def padded(vocab: int, tensor_size: int) -> int:
    return -(-vocab // tensor_size) * tensor_size


def true_logits(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    """What the tests' teacher answers to tokens [b, s]: float32 [s, b, vocab], different everywhere."""
    tokens = tokens.long().T[..., None]
    place = torch.arange(tokens.shape[0])[:, None, None]
    column = torch.arange(vocab)
    # Irrational steps: no two entries of a row agree, and no float16 holds them exactly.
    return ((tokens * 0.7548776662 + place * 0.5698402910 + column * 1.2207440846) % 19.0).float() - 7.0


def join_world(rank: int, size: int, port: int) -> None:
    """This process's default group, as torchrun would set it up."""
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    backend = "gloo" if device().type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


class Jobs:
    """Processes under way, each with a name, its output in a file, and no way to outlive the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, BaseProcess] = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join(10)

    def start(self, name: str, target, *args) -> None:
        path = str(self.folder / name)
        process = context().Process(target=_run, args=(path, device(), target, args), name=name)
        process.start()
        self.processes[name] = process

    def world(self, name: str, size: int, target, *args) -> None:
        """`size` processes `name`0.. that share a default group and run target(rank, *args)."""
        port = free_port()
        for rank in range(size):
            self.start(f"{name}{rank}", _in_world, rank, size, port, target, args)

    def wait(self, seconds: float = 90) -> dict[str, int | None]:
        """Exit status by name; None for what was still running at the end of that time."""
        deadline = time.monotonic() + seconds
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return {name: process.exitcode for name, process in self.processes.items()}

    def succeed(self, seconds: float = 90) -> None:
        failed = {name: code for name, code in self.wait(seconds).items() if code != 0}
        assert not failed, f"{failed}\n" + "\n".join(f"--- {name}\n{self.output(name)}" for name in failed)

    def output(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def await_output(self, name: str, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output(name):
            assert time.monotonic() < deadline, f"{name} did not say {text!r}: {self.output(name)}"
            time.sleep(0.02)

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes[name].pid, number)

    def kill(self, name: str) -> None:
        """kill -9, whether it still runs or not; returns when it is gone."""
        with suppress(ProcessLookupError):
            self.signal(name, signal.SIGKILL)
        self.processes[name].join(10)


def _run(path: str, where: torch.device, target, args) -> None:
    torch.set_num_threads(1)
    os.environ[DEVICE] = str(where)
    if where.type == "cuda":
        os.environ |= ONE_GPU | {"NCCL_HOSTID": Path(path).name}
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        target(*args)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    if fake.broken:  # said already
        sys.exit(1)


def _in_world(rank: int, size: int, port: int, target, args) -> None:
    join_world(rank, size, port)
    target(rank, *args)
    dist.destroy_process_group()


def connected(settings: LinkSettings) -> tuple[StudentLink, TeacherLink]:
    """A link of one rank with one rank, both in this process, whose rendezvous stands."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(
            TeacherLink.connect,
            settings,
            **Layout().teacher(0, 0),
            group=None,
            tensor_group=None,
            device=device(),
        )
        student = StudentLink.connect(settings, **Layout().student(0), device=device())
        return student, coming.result()


def exchange(student: StudentLink, teacher: TeacherLink, number: int) -> None:
    student.request(torch.zeros(1, 4, dtype=torch.long))
    (request,) = teacher.next_batch(1)
    teacher.respond(request, torch.zeros(4, 1, Layout().teacher_padded, device=device()))
    assert student.receive(number).logits.shape == (4, 1, Layout().vocab)


def part(student: StudentLink, teacher: TeacherLink) -> None:
    student.close()
    assert teacher.next_batch(1) is None
    teacher.close()
