"""What the checks are asked about: the processes, the settings of the run, and what the command's options say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vcrd.doctor.world import World
from vcrd.link.settings import LinkSettings
from vcrd.plan.scenario import Scenario


@dataclass(frozen=True)
class Job:
    """run_dir: what all nodes are to share; None where nothing was said. ports: to be free on every node. gpus: that
    every node must have at least; 0 where nothing was said. link: the settings of the link, defaults where they cannot
    be read. scenario: both layouts, None without; models_known: whether it has the models' sizes too. seconds: that
    the link is measured. patience: seconds that one check may take. during_run: whether a run has the GPUs and the
    ports already. secret: of the link, once it is read; None where that cannot be done in time.
    """

    world: World
    environment: Mapping[str, str]
    link: LinkSettings = field(default_factory=LinkSettings)
    run_dir: str | None = None
    ports: tuple[int, ...] = ()
    gpus: int = 0
    scenario: Scenario | None = None
    models_known: bool = False
    seconds: float = 2.0
    patience: float = 60.0
    secret: str | None = None
    during_run: bool = False

    @property
    def first_on_node(self) -> bool:
        return self.world.local_rank == 0

    @property
    def tensor_size(self) -> int:
        """The larger of both sides'; 1 where no layout is known."""
        if self.scenario is None:
            return 1
        return max(self.scenario.student_tensor, self.scenario.teacher_tensor)
