"""A student long after its teacher died in the middle of a transfer, where torch's monitors look for what went wrong.

Over NCCL the student trains on for a minute, its default group on NCCL and with the monitors' timeouts set low. An
error of one process group can end the whole process minutes later; the link has none, so nothing may happen.
"""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch.distributed as dist
from link_jobs import Jobs, Layout, device, join_world
from ports import free_port
from rejoin_jobs import run_student, run_teacher, settings_for

from vcrd.link import LinkSettings

LAYOUT = Layout(
    student_data=2, teacher_tensor=2, vocab=40_000
)  # responses of 5 MB, of which the sockets hold a part
STEPS, DIES_SENDING = 24, 3
PAUSE = {"nccl": 3.0}  # seconds between two steps: the last twenty take a minute
MONITORS = {
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "10",
    "TORCH_NCCL_COORD_CHECK_MILSEC": "500",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1000",
}

pytestmark = [pytest.mark.timeout(170)]


def run_watched_student(rank: int, port: int, settings: LinkSettings, pause: float) -> None:
    os.environ.update(MONITORS)
    join_world(rank, LAYOUT.students, port)
    print("default group", type(dist.group.WORLD._get_backend(device())).__name__, flush=True)
    run_student(rank, LAYOUT, settings, STEPS, pause)
    dist.destroy_process_group()


def run_teacher_that_dies(rank: int, replica: int, layout: Layout, settings: LinkSettings) -> None:
    """Its second rank, in the middle of a response; the first one has sent its own or is about to."""
    run_teacher(rank, replica, layout, settings, DIES_SENDING if rank == 1 else -1)


def weights_of(jobs: Jobs, name: str, settings: LinkSettings, pause: float, dies: bool) -> list[str]:
    """The digest that each student rank gives in the end."""
    port, students = free_port(), [f"{name}{rank}" for rank in range(LAYOUT.students)]
    for rank, student in enumerate(students):
        jobs.start(student, run_watched_student, rank, port, settings, pause)
    if dies:
        jobs.world("dying", LAYOUT.teachers, run_teacher_that_dies, 0, LAYOUT, settings)
        for rank, status in ((1, -signal.SIGKILL), (0, 1)):
            jobs.processes[f"dying{rank}"].join(60)
            assert jobs.processes[f"dying{rank}"].exitcode == status, jobs.output(f"dying{rank}")
    jobs.world(f"teacher of {name}", LAYOUT.teachers, run_teacher, 0, LAYOUT, settings)
    for each in [*students, *(f"teacher of {name}{rank}" for rank in range(LAYOUT.teachers))]:
        jobs.processes[each].join(180)
        assert jobs.processes[each].exitcode == 0, jobs.output(each)
    found = [jobs.output(student) for student in students]
    expected = "ProcessGroupNCCL" if device().type == "cuda" else "ProcessGroupGloo"
    assert all(f"default group {expected}\n" in output for output in found)
    assert all(("is lost to" in output) == dies for output in found)
    return [re.search("weights (\\w+)", output)[1] for output in found]


def test_a_student_lives_on_and_its_weights_are_those_of_a_quiet_run(each_transport_at_leisure, tmp_path):
    with Jobs(tmp_path) as jobs:
        quiet = weights_of(jobs, "student", settings_for(free_port()), 0.0, dies=False)
        pause = PAUSE.get(each_transport_at_leisure, 0.0)
        assert weights_of(jobs, "student again", settings_for(free_port()), pause, dies=True) == quiet
