"""What the demo does, in numbers: one dataclass, filled by the command line and handed to both jobs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "demo"

# Ten of the teacher's thirty layers. Found by leaving out, one after the other, the layer without which the
# divergence on CHAMP problems grew least: every third layer at even distances starts at twice the divergence.
KEPT_LAYERS = (0, 1, 2, 8, 19, 20, 24, 27, 28, 29)

TEACHER_STAGES = 2
STUDENT_TENSOR_SIZE = 3


@dataclass(frozen=True)
class DemoSettings:
    """steps: optimizer steps. micro_batches x micro_batch_size problems make a step. held_out: problems to measure
    on. learning_rate: the highest, after a short warm-up. sequence_length: longer solutions are cut."""

    output: str
    cache: str = str(CACHE)
    port: int = 29600
    steps: int = 28
    micro_batches: int = 2
    micro_batch_size: int = 2
    sequence_length: int = 384
    held_out: int = 12
    learning_rate: float = 1e-3
    seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def distill(self):
        """The method's own defaults; only the link's address, its time-outs and where records go are the demo's."""
        from vcrd.megatron import DistillSettings

        return DistillSettings().replaced(
            address=f"127.0.0.1:{self.port}",
            credits=4,
            timeout=120.0,
            connect_timeout=240.0,
            telemetry_dir=str(self.folder / "records"),
        )

    @classmethod
    def load(cls, path: Path) -> DemoSettings:
        return cls(**json.loads(path.read_text()))
