"""Sizes of models and trainings."""

from __future__ import annotations

from dataclasses import replace

from train import Sizes

CONFIGS = {
    "tiny": Sizes(  # for tests only
        teacher=(16, 1, 1),
        student=(8, 1, 1),
        teacher_steps=40,
        good_enough=(0.0, 1.0),
        student_steps=5,
        batch=4,
        steps=4,
        renewed=2,
        problems=8,
        seeds=2,
        rates=(1e-3, 3e-3),
    ),
    "small": Sizes(),
    # Settings where the calibration may matter more: `small` with worse teachers, or with students that know less.
    # The teacher of `formats` jumps over the wanted share, so only the other tasks are compared (docs/evidence.md).
    "worse-teacher": replace(Sizes(), good_enough=(0.60, 0.75)),
    "early-student": replace(Sizes(), begun=0.05),
    # For privileged.py on a loaded machine: smaller teachers that err, and students that know little.
    "light": replace(
        Sizes(),
        teacher=(48, 3, 4),
        teacher_batch=32,
        teacher_rate=4e-3,
        good_enough=(0.30, 0.75),
        begun=0.05,
        watched=100,
    ),
    # For one H100 and 16 cores: four times the parameters, five times the tokens.
    "large": replace(
        Sizes(),
        teacher=(128, 4, 8),
        student=(48, 4, 6),
        teacher_steps=4000,
        teacher_rate=2e-3,
        student_steps=4000,
        student_rate=4e-3,
        batch=32,
        steps=300,
        problems=512,
    ),
}
