"""Scenarios for the tests: small round numbers, one value changed at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vcrd.plan.scenario import Gpu, Model, Scenario

GPU = Gpu("test", bf16=1e15, fp8=2e15, memory=80e9, bandwidth=4e12, host=50e9)
# 1000 columns, no multiple of anything: padded to 1024 by one tensor rank, by two, and by four.
TEACHER = Model("teacher", 50_000_000, 10_000_000, hidden=512, layers=8, vocab=1000, attention=1024)
STUDENT = Model("student", 2_000_000, 2_000_000, hidden=256, layers=4, vocab=1000, attention=256, tied=True)


def scenario(**changes: Any) -> Scenario:
    base = Scenario(
        teacher=TEACHER,
        student=STUDENT,
        teacher_gpu=GPU,
        student_gpu=GPU,
        sequence=100,
        batch=2,
        micro_batches=3,
        top_k=10,
        network=1e9,
        teacher_mfu=0.5,
        student_mfu=0.25,
    )
    return replace(base, **changes)
