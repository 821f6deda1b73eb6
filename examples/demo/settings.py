"""The settings of the demo: one dataclass from the command line, for both jobs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CACHE = Path(__file__).parents[2] / "build" / "demo"

# Ten of the teacher's thirty layers. A greedy search removed one layer after the other, each time the one whose removal
# increased the divergence on CHAMP problems the least. Every third layer at even distances has twice the divergence.
KEPT_LAYERS = (0, 1, 2, 8, 19, 20, 24, 27, 28, 29)


@dataclass(frozen=True)
class DemoSettings:
    """steps: optimizer steps. A step has micro_batches x micro_batch_size problems. held_out: problems for evaluation.
    learning_rate: the maximum, after a short warm-up. sequence_length: longer solutions are cut. gpu: both jobs run on
    the first GPU. bfloat16: the dtype of both models, otherwise float32; the optimizer keeps float32 weights."""

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
    teacher_stages: int = 2
    student_tensor_size: int = 3
    gpu: bool = False
    bfloat16: bool = False

    def on_one_gpu(self) -> DemoSettings:
        """Both jobs share one GPU, so each has one process. Larger and more steps, as a step takes less time."""
        return replace(
            self,
            **{"gpu": True, "bfloat16": True, "teacher_stages": 1, "student_tensor_size": 1},
            **{"steps": 60, "micro_batch_size": 4},
        )

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.bfloat16 else torch.float32

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def distill(self):
        """The defaults of vcrd, except the address and timeouts of the link and the folder of the records."""
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
