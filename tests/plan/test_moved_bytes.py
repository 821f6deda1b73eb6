"""The bytes of the plan equal those of real processes, for every rank and payload."""

from __future__ import annotations

import pytest
from link_jobs import Jobs
from moved_jobs import PAYLOADS, Case, run_student, run_teacher
from ports import free_port

CASES = {
    "one to one": Case(vocab=7, student_padded=7, teacher_padded=7, state_dtype="float32"),
    "student wider, data ranks": Case(
        vocab=50, student_tensor=2, student_padded=50, data=2, teacher_tensor=1, teacher_padded=64, before=1
    ),
    "teacher wider, context ranks": Case(
        vocab=101, student_tensor=2, student_padded=256, context=2, teacher_tensor=3, teacher_padded=102
    ),
    "replicas": Case(
        vocab=33, student_padded=33, data=3, teacher_tensor=2, teacher_padded=36, replicas=2, state_size=5
    ),
    "empty shards": Case(vocab=5, student_tensor=3, student_padded=9, teacher_tensor=3, teacher_padded=9),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_transfers_the_planned_bytes(name, tmp_path):
    case, port = CASES[name], free_port()
    with Jobs(tmp_path) as jobs:
        jobs.world("student", case.students, run_student, case, port)
        for replica in range(case.replicas):
            jobs.world(f"teacher{replica}.", case.teachers, run_teacher, replica, case, port)
        jobs.succeed(300)
        for rank in range(case.students):
            assert jobs.output(f"student{rank}").split()[::2] == list(PAYLOADS)
