"""Sizes of the models and trainings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from examples.demo.settings import KEPT_LAYERS


@dataclass(frozen=True)
class Sizes:
    """One configuration.

    families: names for `runs.family_of`, the first one with several correct next steps. longer: whether their problems
    are the longer ones. pool: training problems of each. model: "smollm2", or "tiny" for tests. teacher_layers: layers
    of the model. student_layers: those of them that the student has. compute: dtype of the matrix products. Teacher and
    student train on worked solutions until they solve a share in `good_enough` and in `begun` of `watched` held-out
    problems, which is measured every `look` steps. batch, steps, rate: of the distillation. renewed: steps after which
    solutions are sampled again. problems: held out, all families together. together: rows that are generated at once.
    """

    families: tuple[str, ...] = ("underspecified:reductions", "tasks:arithmetic")
    longer: bool = False
    pool: int = 8192
    model: str = "smollm2"
    teacher_layers: tuple[int, ...] = tuple(range(30))
    student_layers: tuple[int, ...] = KEPT_LAYERS
    compute: str = "bfloat16"
    teacher_batch: int = 32
    teacher_steps: int = 2000
    teacher_rate: float = 3e-4
    teacher_look: int = 50
    good_enough: tuple[float, float] = (0.75, 0.92)
    student_batch: int = 32
    student_steps: int = 1000
    student_rate: float = 3e-4
    student_look: int = 10
    begun: tuple[float, float] = (0.12, 0.30)
    watched: int = 128
    batch: int = 16
    steps: int = 150
    rate: float = 2e-4
    renewed: int = 5
    problems: int = 512
    together: int = 128
    seeds: int = 3


CONFIGS = {
    "tiny": Sizes(  # for tests only
        families=("tasks:formats", "tasks:arithmetic"),
        pool=40,
        model="tiny",
        teacher_layers=(0, 1),
        student_layers=(1,),
        compute="float32",
        teacher_batch=4,
        teacher_steps=4,
        teacher_look=2,
        good_enough=(0.0, 1.0),
        student_batch=4,
        student_steps=2,
        student_look=2,
        begun=(0.0, 1.0),
        watched=4,
        batch=4,
        steps=4,
        rate=1e-3,
        renewed=2,
        problems=8,
        together=3,
        seeds=2,
    ),
    # Two cores.
    "cpu": Sizes(teacher_layers=KEPT_LAYERS, student_layers=(0, 1, 28, 29)),
    # One H100: SmolLM2 as it is, and as in the demo.
    "gpu": replace(
        Sizes(),
        longer=True,
        pool=16384,
        teacher_batch=256,
        teacher_look=25,
        student_batch=256,
        student_look=2,
        watched=256,
        batch=512,
        steps=1152,  # 24 M tokens
        renewed=16,
        together=8192,
    ),
}
